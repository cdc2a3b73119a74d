"""Compares the metadata that backends hold with the torch reference, and names the first difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .metadata import (
    Extent,
    MetadataField,
    NSAFlashMLAMetadata,
    NSAMetadata,
    PrecomputedMetadata,
    as_backend_metadata,
    fields_of,
)
from .nsa_backend_mtp_precompute import MetadataInputs, precompute_metadata


@dataclass(frozen=True)
class MetadataDifference:
    """One element that is not what it must be; `column` is None in a vector."""

    field: str
    backend: int
    row: int
    column: int | None
    expected: int
    found: int

    def __str__(self) -> str:
        place = f"row {self.row}" if self.column is None else f"row {self.row}, column {self.column}"
        return (
            f"stale or wrong metadata: {self.field} of backend {self.backend}, {place}: "
            f"expected {self.expected}, found {self.found}"
        )


class MetadataMismatchError(RuntimeError):
    """A replay would read metadata that differs from the reference."""

    def __init__(self, difference: MetadataDifference) -> None:
        super().__init__(str(difference))
        self.difference = difference


def first_difference(
    reference: PrecomputedMetadata, metadata: NSAMetadata, backend: int = 0
) -> MetadataDifference | None:
    """The first live element, in field, row and column order, in which `metadata` differs."""
    for field in fields_of(metadata.shape.mode):
        expected, found = field.of(reference), field.of(metadata)
        if expected is None or found is None:
            continue
        found = found[tuple(slice(n) for n in expected.shape)]
        wrong = (expected != found) & _live(field, reference, expected)
        if wrong.any():
            return _first_of(wrong, field.backend, backend, expected, found)
    return None


def stale_schedule(
    reference: PrecomputedMetadata, metadata: NSAMetadata, backend: int = 0
) -> MetadataDifference | None:
    """The first element of a kernel's schedule that is not what the reference's lengths ask for."""
    of = as_backend_metadata(reference)
    for schedule in metadata.reader.schedules:
        expected = schedule.compute(of)
        wrong = expected != schedule.target
        if wrong.any():
            return _first_of(wrong, schedule.name, backend, expected, schedule.target)
    return None


def _first_of(
    wrong: torch.Tensor, name: str, backend: int, expected: torch.Tensor, found: torch.Tensor
) -> MetadataDifference:
    at = tuple(wrong.nonzero()[0].tolist())
    row, column = at if len(at) == 2 else (at[0], None)
    return MetadataDifference(name, backend, row, column, int(expected[at]), int(found[at]))


def check_metadata(
    inputs: MetadataInputs,
    backends: Sequence[tuple[NSAMetadata, int]],
    fixed: Sequence[NSAFlashMLAMetadata | None],
) -> None:
    """Raises MetadataMismatchError where a backend, given with its length offset, is not up to date.

    `fixed` is what each backend's FlashMLA metadata was at capture; it must never change.
    """
    references: dict[int, PrecomputedMetadata] = {}
    for index, ((metadata, offset), flashmla_metadata) in enumerate(zip(backends, fixed)):
        if offset not in references:
            references[offset] = precompute_metadata(inputs, seqlens_offset=offset)
        reference = replace(references[offset], flashmla_metadata=flashmla_metadata)
        difference = first_difference(reference, metadata, index) or stale_schedule(
            reference, metadata, index
        )
        if difference is not None:
            raise MetadataMismatchError(difference)


def _live(
    field: MetadataField, reference: PrecomputedMetadata, expected: torch.Tensor
) -> torch.Tensor | bool:
    """Which elements of a field readers may read: table columns below the row's length."""
    if not field.is_table:
        return True
    per = reference.shape.page_size if field.extent is Extent.PAGED_TABLE else 1
    columns = torch.arange(expected.shape[1], device=expected.device, dtype=torch.int32)
    return columns[None, :] * per < reference.seqlens_expanded[:, None]
