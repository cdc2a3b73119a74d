"""A trial before anything is touched: do all backends of this server hold the same metadata, and is it what
the generator writes?

SGLang's own methods run on copies of the first and the last backend, over a small token table. Whatever a
release or a model does otherwise shows here, and is then left to SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .family import Installed, UnsupportedError
from .generation import Generation
from .own_path import Batch, Shadow, decode_batch
from .sglang_metadata import unknown_fields
from .verification import difference

# What SGLang's methods may set on a backend; `init_cuda_graph_state` of an aliased one is not called.
_SET_BY_INIT = frozenset(
    {"decode_cuda_graph_metadata", "dsa_drop_wide_page_table", "_multi_ctas_kv_counter_buffer"}
)
_BS = 3


@dataclass(frozen=True)
class TrialResult:
    """`generator` is None where ours writes the same, else why it does not serve here."""

    generator: str | None


def run_trial(installed: Installed, wrapper: Any, topk: int) -> TrialResult:
    """Raises UnsupportedError where backends must not share their metadata."""
    first = wrapper.attn_backends[0]
    device = first.req_to_token.device
    tables = _token_table(topk, first, device)
    indices = sorted({0, len(wrapper.attn_backends) - 1})
    own = _planned(installed, wrapper, indices, tables, topk)
    ours = _planned(installed, wrapper, [0], tables, topk)
    prefix = installed.family.prefix
    reason: str | None = None
    for lengths in ([5, 130, topk + 77], [1, 64, 65]):
        batch = _batch(installed, first, lengths, device)
        own.replay(batch, _BS)
        if len(indices) == 2:
            wrong = difference(own.metadata(0, _BS), own.metadata(1, _BS), prefix, topk, indices[1])
            # The derived fields of some backends are stale in SGLang's own path: no reason not to share.
            if wrong is not None and wrong.field not in ("paged_mqa_schedule_metadata", "topk_v2_plan"):
                raise UnsupportedError(f"the draft backends differ from each other: {wrong}")
        reason = reason or _why_not_generated(installed, first, own, ours, batch, topk)
    return TrialResult(reason)


def _planned(
    installed: Installed, wrapper: Any, indices: list[int], tables: torch.Tensor, topk: int
) -> Shadow:
    """A shadow over the small token table, with its one batch size planned."""
    shadow = Shadow(installed, wrapper, indices)
    for backend in shadow.backends:
        backend.req_to_token = tables
        backend.max_context_len = topk + 100
        before = dict(vars(backend))
    shadow.init_state(_BS, _BS)
    changed = {name for name, value in vars(backend).items() if before.get(name) is not value}
    if changed - _SET_BY_INIT:
        raise UnsupportedError(
            f"init_cuda_graph_state sets what is not known: {sorted(changed - _SET_BY_INIT)}"
        )
    shadow.capture(_batch(installed, backend, [1] * _BS, tables.device))
    return shadow


def _why_not_generated(
    installed: Installed, backend: Any, own: Shadow, ours: Shadow, batch: Batch, topk: int
) -> str | None:
    metadata = ours.metadata(0, _BS)
    unknown = unknown_fields(metadata, installed.family.prefix)
    if unknown:
        return f"SGLang's metadata has more fields: {', '.join(unknown)}"
    try:
        generation = Generation(installed, ours.backends[:1], [metadata], batch, topk)
        generation.run()
    except (ImportError, RuntimeError, UnsupportedError) as error:
        return str(error)
    wrong = difference(own.metadata(0, _BS), metadata, installed.family.prefix, topk, 0)
    if wrong is not None and wrong.field not in ("paged_mqa_schedule_metadata", "topk_v2_plan"):
        return f"SGLang computes something else: {wrong}"
    return None


def _token_table(topk: int, backend: Any, device: torch.device) -> torch.Tensor:  # [4, topk + some], int32
    width = topk + 128 + (getattr(backend, "speculative_num_draft_tokens", None) or 0)
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(0, 1 << 20, (4, width), generator=generator, dtype=torch.int32)
    return table.to(device)


def _batch(installed: Installed, backend: Any, lengths: list[int], device: torch.device) -> Batch:
    # Of int32 lengths every backend would keep the same tensor, and a difference between them would not show.
    seq_lens = torch.tensor(lengths, dtype=torch.int64)
    return decode_batch(
        seq_lens.to(device),
        torch.tensor([2, 1, 3][: len(lengths)], device=device),
        seq_lens,
        installed.module.ForwardMode.DECODE,
    )
