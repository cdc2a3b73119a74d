"""The copy of a step's tensors into the static inputs of a captured graph: sources are new at every step.

`fused_copy_replay_data` is mini-sglang's six copies in one launch; `ReplayCopyPlan` does the same for any
fields, with the destinations checked once. Errors read ``<operator>: <field>: expected <...>, found
<...>``; nothing is written when one is raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ._library import operator
from ._plan import Plan


@dataclass(frozen=True)
class ReplayField:
    """One static input of a graph. int32, unit inner stride.

    name: of 1 to 31 letters, digits and underscores; errors call the tensors dst_<name> and src_<name>.
    destination: [most requests + extra], or a table [most requests, most columns] with any row stride.
    extra: live elements beyond the batch size; 1 for a prefix sum. 0 for a table.
    """

    name: str
    destination: torch.Tensor
    extra: int = 0


class ReplayCopyPlan(Plan):
    """Copies one source a field into the fields' destinations, in one launch; up to 12 fields.

    The destinations are checked here, the sources at every run. No two tensors may overlap. A run allocates
    nothing and reads no device memory on the host; it can be captured, but then copies from the same
    addresses ever after.
    """

    def __init__(self, fields: Sequence[ReplayField]) -> None:
        if not fields:
            raise RuntimeError("replay_copy: fields: expected at least one, found 0")
        super().__init__(
            fields[0].destination.device.type,
            "replay_copy",
            [field.destination for field in fields],
            ",".join(field.name for field in fields),
            [field.extra for field in fields],
            run_name=f"replay_copy_run_{len(fields)}",
        )

    def run(self, sources: Sequence[torch.Tensor], batch_size: int, width: int = 0) -> None:
        """Copies `source[: batch_size + extra]` of every vector and `source[:batch_size, :width]` of every
        table.

        sources: in the order of the fields; int32, unit inner stride, at least as large as what is copied.
        batch_size: 0 is nothing to do; more than a destination holds is an error.
        width: live columns of the tables; 0 leaves them alone.
        """
        if torch.compiler.is_compiling():
            self._once(*self._arguments, list(sources), batch_size, width)
        else:
            self._run(self._plan, batch_size, width, *sources)


def fused_copy_replay_data(
    src_input_ids: torch.Tensor,  # [>= batch_size], int32, as all tensors here
    src_out_loc: torch.Tensor,  # [>= batch_size]
    src_cu_seqlens_k: torch.Tensor,  # [>= batch_size + 1]
    src_positions: torch.Tensor,  # [>= batch_size]
    src_seq_lens: torch.Tensor,  # [>= batch_size]
    src_page_table: torch.Tensor,  # [>= batch_size, >= max_seqlen_k], any row stride
    dst_input_ids: torch.Tensor,  # destinations: at least as large
    dst_out_loc: torch.Tensor,
    dst_cu_seqlens_k: torch.Tensor,
    dst_positions: torch.Tensor,
    dst_seq_lens: torch.Tensor,
    dst_page_table: torch.Tensor,
    batch_size: int,
    max_seqlen_k: int,
) -> None:
    """mini-sglang's copy of a decode batch into the static inputs of its captured graph, in one launch; CPU
    tensors serve as well.

    Copied are the first batch_size elements of each vector (of cu_seqlens_k one more) and the first
    max_seqlen_k columns of batch_size rows of the page table, max_seqlen_k counting its columns, whatever
    the page size. batch_size 0 is nothing to do; max_seqlen_k 0 leaves the page table alone. The tensors
    have unit inner stride and lie apart; a tensor that is too small for batch_size or max_seqlen_k is an
    error. The call holds no tensor: one that is captured needs its tensors as long as the graph.
    """
    operator(dst_input_ids.device.type, "fused_copy_replay_data")(
        src_input_ids,
        src_out_loc,
        src_cu_seqlens_k,
        src_positions,
        src_seq_lens,
        src_page_table,
        dst_input_ids,
        dst_out_loc,
        dst_cu_seqlens_k,
        dst_positions,
        dst_seq_lens,
        dst_page_table,
        batch_size,
        max_seqlen_k,
    )
