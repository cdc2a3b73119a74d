"""A trial before anything is touched: do the backends of this server hold what their kind's field map says,
and is it what the generator writes?

SGLang's own methods run on copies of the first and the last backend, over a small token table. Whatever a
release or a model does otherwise shows here, and is then left to SGLang.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from .family import Installed, UnsupportedError
from .fields import MetadataForm, attribute
from .generation import Generation
from .own_path import Batch, Shadow, decode_batch
from .verification import difference

_BS = 3
_SPARE = 64  # tokens that drafts may add
# Stale in some backends of SGLang's own path: no reason not to share.
_MAY_BE_STALE = ("paged_mqa_schedule_metadata", "topk_v2_plan")


@dataclass(frozen=True)
class TrialResult:
    """`generator` is None where ours writes the same, else why it does not serve here."""

    generator: str | None


def run_trial(installed: Installed, wrapper: Any) -> TrialResult:
    """Raises UnsupportedError where backends must not share their metadata."""
    first = wrapper.attn_backends[0]
    form = installed.form(first)
    device = first.req_to_token.device
    longest = max(form.topk, form.page_size) + 77
    tables = _token_table(longest, first, device)
    indices = sorted({0, len(wrapper.attn_backends) - 1})
    own = _planned(installed, form, wrapper, indices, tables, longest)
    ours = _planned(installed, form, wrapper, indices if form.fields.by_step else [0], tables, longest)
    reason: str | None = None
    for lengths in ([5, 130, longest], [1, 64, 65]):
        batch = _batch(installed, lengths, device)
        own.replay(batch, _BS)
        if not form.fields.by_step:
            _require_equal(form, own, indices)
        reason = reason or _why_not_generated(installed, form, own, ours, batch)
    return TrialResult(reason)


def _planned(
    installed: Installed,
    form: MetadataForm,
    wrapper: Any,
    indices: list[int],
    tables: torch.Tensor,
    longest: int,
) -> Shadow:
    """A shadow over the small token table, with its one batch size planned."""
    shadow = Shadow(installed, wrapper, indices)
    context = longest + _SPARE
    for backend in shadow.backends:
        backend.req_to_token = tables
        translator = attribute(backend, "kv_index_translator")
        if translator is not None:
            backend.kv_index_translator = copy.copy(translator)
            backend.kv_index_translator.req_to_token = tables
        backend.max_context_len = context
        if hasattr(backend, "max_num_pages"):
            backend.max_num_pages = -(-context // form.page_size)
        before = dict(vars(backend))
    shadow.init_state(_BS, _BS)
    changed = {name for name, value in vars(backend).items() if before.get(name) is not value}
    unknown = changed - form.fields.set_by_init
    if unknown:
        raise UnsupportedError(f"init_cuda_graph_state sets what is not known: {sorted(unknown)}")
    shadow.capture(_batch(installed, [1] * _BS, tables.device))
    return shadow


def _require_equal(form: MetadataForm, own: Shadow, indices: list[int]) -> None:
    if len(indices) == 2:
        wrong = difference(form, own.metadata(0, _BS), own.metadata(1, _BS), indices[1])
        if wrong is not None and wrong.field not in _MAY_BE_STALE:
            raise UnsupportedError(f"the draft backends differ from each other: {wrong}")


def _why_not_generated(
    installed: Installed, form: MetadataForm, own: Shadow, ours: Shadow, batch: Batch
) -> str | None:
    sets = [ours.metadata(i, _BS) for i in range(len(ours.backends))]
    unknown = form.unknown(sets[0])
    if unknown:
        return f"SGLang's metadata has more fields: {', '.join(unknown)}"
    try:
        Generation(installed, form, ours.backends, sets, batch).run()
    except (ImportError, RuntimeError, UnsupportedError) as error:
        return str(error)
    for i, found in enumerate(sets):
        wrong = difference(form, own.metadata(i, _BS), found, i)
        if wrong is not None and wrong.field not in _MAY_BE_STALE:
            return f"SGLang computes something else: {wrong}"
    return None


def _token_table(longest: int, backend: Any, device: torch.device) -> torch.Tensor:
    """[4, longest + some], int32"""
    width = longest + 2 * _SPARE + (getattr(backend, "speculative_num_draft_tokens", None) or 0)
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(0, 1 << 20, (4, width), generator=generator, dtype=torch.int32)
    return table.to(device)


def _batch(installed: Installed, lengths: list[int], device: torch.device) -> Batch:
    # Of int32 lengths every backend would keep the same tensor, and a difference between them would not show.
    seq_lens = torch.tensor(lengths, dtype=torch.int64)
    return decode_batch(
        seq_lens.to(device),
        torch.tensor([2, 1, 3][: len(lengths)], device=device),
        seq_lens,
        installed.module.ForwardMode.DECODE,
    )
