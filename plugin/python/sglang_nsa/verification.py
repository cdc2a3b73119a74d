"""Compares the backends' metadata with what SGLang's own path computes, derived fields included."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .fields import MetadataForm, tensor_fields
from .nsa.metadata import as_precomputed
from .nsa.metadata_check import MetadataDifference, MetadataMismatchError, first_difference
from .own_path import Shadow

# Up to so many rows the planner of top-k leaves its buffer unwritten, and nobody reads it.
_TOPK_PLAN_ROWS = 30


def difference(
    form: MetadataForm, expected: Any, found: Any, backend: int, apart_from: torch.Tensor | None = None
) -> MetadataDifference | None:
    """The first element in which `found` differs from `expected`, both SGLang metadata of one batch size.

    What lies in `apart_from` itself, the runner's buffer of lengths, is left out. Of FlashMLA's tiles the
    splits alone are compared: its kernel leaves a part of each tile unwritten, another in each release.
    """
    view = replace(form.view(found, apart_from), flashmla_metadata=None)
    first = first_difference(as_precomputed(form.view(expected)), view, backend)
    if first is not None:
        return replace(first, field=form.name(first.field))
    for name, value, other in _tensors_besides(form, expected, found):
        if view.cache_seqlens_int32 is None and other.data_ptr() == apart_from.data_ptr():
            continue
        if name.endswith("topk_v2_plan"):
            if found.cache_seqlens_int32.shape[0] <= _TOPK_PLAN_ROWS:
                continue
            value, other = _topk_items(value), _topk_items(other)
        wrong = _unequal(name, value, other, backend)
        if wrong is not None:
            return wrong
    return None


def _tensors_besides(
    form: MetadataForm, expected: Any, found: Any
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, expected, found) of what the generator does not write, groups of tensors taken apart."""
    for name in form.besides(expected):
        value, other = getattr(expected, name), getattr(found, name)
        if isinstance(value, torch.Tensor):
            yield name, value, other
        elif name == "flashmla_metadata":
            yield name, value.num_splits, other.num_splits
        elif dataclasses.is_dataclass(value):
            for inner, tensor in tensor_fields(value):
                if isinstance(tensor, torch.Tensor):
                    yield f"{name}.{inner}", tensor, getattr(other, inner)


def _unequal(name: str, value: torch.Tensor, other: torch.Tensor, backend: int) -> MetadataDifference | None:
    if value.shape != other.shape:
        return MetadataDifference(name, backend, 0, None, value.shape[0], other.shape[0])
    wrong = value.reshape(value.shape[0], -1) != other.reshape(value.shape[0], -1)
    if not wrong.any():
        return None
    row, column = wrong.nonzero()[0].tolist()
    pair = (int(tensor.reshape(value.shape[0], -1)[row, column]) for tensor in (value, other))
    return MetadataDifference(name, backend, row, column if value.dim() > 1 else None, *pair)


def _topk_items(plan: torch.Tensor) -> torch.Tensor:
    """What is read of a plan of top-k: (threshold, N), then N pairs (row, length) in any order."""
    items = plan[1 : 1 + int(plan[0, 1])]  # [N, 2], int32
    return torch.cat((plan[:1], items[items[:, 0].argsort()]))


class Verifier:
    """A second set of metadata, kept by SGLang's own path, for every captured batch size."""

    def __init__(self, shadow: Shadow, form: MetadataForm) -> None:
        self.shadow, self.form = shadow, form
        self.checked = 0

    def compute(self, batch: Any, bs: int) -> None:
        """SGLang's own metadata for the batch of this replay."""
        self.shadow.refresh(batch, bs)

    def check(self, backends: list[Any], bs: int, apart_from: torch.Tensor | None = None) -> None:
        """Raises MetadataMismatchError where a backend differs from what was last computed for `bs`.
        `apart_from`: the runner's buffer of lengths, if it holds another batch's by now."""
        seen: set[int] = set()
        for index, backend in enumerate(backends):
            found = backend.decode_cuda_graph_metadata[bs]
            if id(found) in seen:
                continue
            seen.add(id(found))
            expected = self.shadow.metadata(index if self.form.fields.by_step else 0, bs)
            wrong = difference(self.form, expected, found, index, apart_from)
            if wrong is not None:
                raise MetadataMismatchError(wrong)
        self.checked += 1
