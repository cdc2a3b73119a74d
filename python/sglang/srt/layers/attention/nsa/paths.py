"""The paths by which metadata gets into N backends, and the table that selects one.

Every path is a list of stages over static buffers, planned at capture and run at replay.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .kernels import load_kernels
from .metadata import (
    ALL_FIELDS,
    TABLE_FIELDS,
    MetadataBuffers,
    MetadataShape,
    NSAFlashMLAMetadata,
    NSAMetadata,
    as_precomputed,
)
from .metadata_generators import Destination, FusedGenerator, Generator, TorchGenerator
from .nsa_backend_mtp_precompute import MetadataInputs
from .replicate import COPIERS, NEEDS_KERNELS, Copier, FusedCopier, FusedReplication, plan_regions
from .schedules import Prepare

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetadataSelection:
    """What the user chose. `copy` 'auto' means fused, or torch where the library cannot be loaded."""

    enabled: bool = False  # SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA
    layout: str = "replicate"  # replicate | shared | in_graph | indirect
    copy: str = "auto"  # auto, or a key of COPIERS
    draft_seqlens: str = "step"  # step: draft step i counts i + 1 more than committed; or committed
    check_replays: bool = False  # SGLANG_NSA_VERIFY_METADATA

    @property
    def path(self) -> str:
        return self.layout if self.enabled else "recompute"

    def draft_offsets(self, draft_backends: int) -> tuple[int, ...]:
        """What each draft backend adds to the committed lengths."""
        return tuple(i + 1 if self.draft_seqlens == "step" else 0 for i in range(draft_backends))


@dataclass(frozen=True)
class MetadataMethods:
    """How stages are carried out."""

    copy: str
    generator: type[Generator]
    copier: type[Copier] | None  # None: the generation writes every backend itself


TORCH_METHODS = MetadataMethods("torch", TorchGenerator, COPIERS["torch"])


def select_methods(selection: MetadataSelection, device: torch.device) -> tuple[MetadataMethods, str | None]:
    """The methods to use, and why they are not the fused ones where 'auto' had to do without.

    Raises ImportError where a method of the library's is asked for by name and it cannot be loaded.
    """
    if not selection.enabled:
        return TORCH_METHODS, None
    if selection.copy not in ("auto", *COPIERS):
        raise ValueError(
            f"metadata copy method must be auto or one of {list(COPIERS)}, got {selection.copy!r}"
        )
    copy = "fused" if selection.copy == "auto" else selection.copy
    try:
        load_kernels(device.type)
    except ImportError as error:
        if selection.copy in NEEDS_KERNELS:
            raise
        return TORCH_METHODS, str(error)
    return MetadataMethods(copy, FusedGenerator, COPIERS[copy]), None


@functools.cache
def _warn_fallback(reason: str) -> None:
    """Warns once in a process, however many graphs fall back for that reason."""
    logger.warning("no fused metadata kernels, using torch from now on: %s", reason)


Stage = Callable[[int], None]  # given a bound of the row lengths


@dataclass(frozen=True)
class MetadataPath:
    """One way to keep the backends up to date."""

    plan: Callable[
        [MetadataMethods, MetadataInputs, Sequence[Destination], Sequence[MetadataBuffers]], list[Stage]
    ]
    shares_buffers: bool  # the backends alias one set
    in_graph: bool  # the stages are the first nodes of the captured function
    has_tables: bool = True  # False: readers follow req_to_token, and only what they declare is generated


def _recompute(
    methods: MetadataMethods,
    inputs: MetadataInputs,
    backends: Sequence[Destination],
    staging: Sequence[MetadataBuffers],
) -> list[Stage]:
    return [TorchGenerator(inputs, backends).run]


def _replicate(
    methods: MetadataMethods,
    inputs: MetadataInputs,
    backends: Sequence[Destination],
    staging: Sequence[MetadataBuffers],
) -> list[Stage]:
    if len(backends) == 1 or methods.copier is None:  # nothing to copy
        return _generate(methods, inputs, backends, staging)
    sets = [buffers.view(inputs.shape.bs) for buffers in staging]
    offsets = sorted({backend.seqlens_offset for backend in backends})
    generator = methods.generator(inputs, _one_table_owner(sets, offsets))
    regions = plan_regions([as_precomputed(s) for s in sets], [backend.metadata for backend in backends])
    copier = methods.copier(regions)
    if isinstance(generator, FusedGenerator) and isinstance(copier, FusedCopier):
        return [FusedReplication(generator, copier).run]
    return [generator.run, copier.run]


def _generate(
    methods: MetadataMethods,
    inputs: MetadataInputs,
    backends: Sequence[Destination],
    staging: Sequence[MetadataBuffers],
) -> list[Stage]:
    return [methods.generator(inputs, backends).run]


PATHS: dict[str, MetadataPath] = {
    "recompute": MetadataPath(_recompute, shares_buffers=False, in_graph=False),
    "replicate": MetadataPath(_replicate, shares_buffers=False, in_graph=False),
    "shared": MetadataPath(_generate, shares_buffers=True, in_graph=False),
    "in_graph": MetadataPath(_generate, shares_buffers=True, in_graph=True),
    "indirect": MetadataPath(_generate, shares_buffers=True, in_graph=True, has_tables=False),
}


def _one_table_owner(sets: Sequence[NSAMetadata], offsets: Sequence[int]) -> list[Destination]:
    """Destinations that alias one set of page tables: the one with the longest rows writes them."""
    longest = max(offsets, default=0)
    return [Destination(s, offset, owns_tables=offset == longest) for s, offset in zip(sets, offsets)]


def _schedule_stages(sets: Sequence[NSAMetadata]) -> list[Stage]:
    """Refreshes what depends on lengths beside the fields: of every backend, once where backends alias."""
    scheduled = {id(metadata): metadata for metadata in sets if metadata.reader.schedules}

    def refresh(max_len: int) -> None:
        for metadata in scheduled.values():
            metadata.refresh_schedules()

    return [refresh] if scheduled else []


def _one_call(stages: Sequence[Stage]) -> Stage:
    """What a replay calls: a single stage itself, so that nothing lies between it and the operator."""
    if len(stages) == 1:
        return stages[0]

    def run(max_len: int) -> None:
        for stage in stages:
            stage(max_len)

    return run


def _buffer_sets(
    shape: MetadataShape, count: int, device: torch.device, fields: frozenset[str] = ALL_FIELDS
) -> list[MetadataBuffers]:
    """`count` sets of length vectors over one set of page tables."""
    first = MetadataBuffers.create(shape, device, fields)
    return [first, *(first.with_own_lengths() for _ in range(count - 1))]


class GraphMetadata:
    """The metadata of N backends that one captured function reads, for every captured batch size.

    Owns all tensors involved. `capture` plans a batch size, `replay` brings its metadata up to date before
    the graph runs; on the in-graph path `run_in_graph` does it as the graph's first node.
    """

    def __init__(
        self,
        selection: MetadataSelection,
        max_shape: MetadataShape,
        offsets: Sequence[int],
        device: torch.device,
        methods: MetadataMethods | None = None,
        prepare: Prepare | None = None,
        reads: frozenset[str] = ALL_FIELDS,
        in_graph: bool = False,
    ) -> None:
        """`methods` replaces those that the selection stands for: what a benchmark compares. `prepare`
        makes what the metadata's reader needs beside it, once for each batch size and set of lengths, and
        `reads` is what the reader declares: layout indirect has nothing else. With `in_graph` the stages of
        any path are the graph's first nodes: where the lengths come out of the graph itself."""
        self.selection = selection
        self.prepare = prepare
        self.device = device
        self.width = max_shape.width
        self.max_shape = max_shape
        self.path = PATHS[selection.path]
        self.in_graph, self._checks = in_graph or self.path.in_graph, selection.check_replays
        self.offsets = tuple(offsets)
        self.methods, self.fallback_reason = (
            (methods, None) if methods is not None else select_methods(selection, device)
        )
        self.fallbacks = 0
        self.replays = 0
        if self.fallback_reason is not None and selection.copy == "auto":
            self.fallbacks += 1
            _warn_fallback(self.fallback_reason)
        distinct = sorted(set(offsets))
        if self.path.shares_buffers:
            fields = ALL_FIELDS if self.path.has_tables else reads - TABLE_FIELDS
            by_offset = dict(zip(distinct, _buffer_sets(max_shape, len(distinct), device, fields)))
            self.buffers = [by_offset[offset] for offset in offsets]
        else:
            self.buffers = [MetadataBuffers.create(max_shape, device) for _ in offsets]
        copies = selection.path == "replicate" and len(offsets) > 1 and self.methods.copier is not None
        self.staging = _buffer_sets(max_shape, len(distinct), device) if copies else []
        self.inputs: dict[int, MetadataInputs] = {}
        self.backends: dict[int, list[NSAMetadata]] = {}
        self._launch: dict[int, Stage] = {}  # what brings a batch size up to date, bound at capture
        self._fixed: dict[int, list[NSAFlashMLAMetadata | None]] = {}  # what readers held at capture

    def capture(self, inputs: MetadataInputs) -> list[NSAMetadata]:
        """Plans a batch size over the graph's static inputs; returns the metadata of each backend."""
        bs = inputs.shape.bs
        self.inputs[bs] = inputs
        distinct = {id(buffers): buffers for buffers in self.buffers}
        prepared = {key: self._view(buffers, inputs) for key, buffers in distinct.items()}
        self.backends[bs] = [prepared[id(buffers)] for buffers in self.buffers]
        flashmla = [metadata.flashmla_metadata for metadata in self.backends[bs]]
        self._fixed[bs] = [None if fixed is None else fixed.clone() for fixed in flashmla]
        self._or_fall_back(lambda: self._plan(bs))
        return self.backends[bs]

    def replay(self, bs: int, max_len: int) -> None:
        """Before a replay: all host-launched stages. `max_len` bounds the rows' lengths (-1: unknown)."""
        self.replays += 1
        if self.in_graph:
            return
        if max_len > self.width:
            max_len = self.width
        try:  # the hot path: one call
            self._launch[bs](max_len)
        except RuntimeError as error:
            self._fall_back(error)
            self._launch[bs](max_len)
        if self._checks:
            self.check(bs)

    def run_in_graph(self, bs: int, max_len: int = -1) -> None:
        """Inside the captured function, before the first layer. A graph of CUDA's knows no `max_len`."""
        if self.in_graph:
            self._or_fall_back(lambda: self._launch[bs](min(max_len, self.width)))

    def check(self, bs: int) -> None:
        """Raises MetadataMismatchError where the backends differ from the torch reference."""
        from .metadata_check import check_metadata

        check_metadata(self.inputs[bs], list(zip(self.backends[bs], self.offsets)), self._fixed[bs])

    @property
    def table_bytes(self) -> tuple[int, int]:
        """Bytes of page tables held by the backends, and what one set for each would take."""
        separate = len(self.offsets) * self.max_shape.table_bytes
        if not self.path.has_tables:
            return 0, separate
        held = {b.page_table_1.data_ptr(): b.table_bytes for b in self.buffers}
        return sum(held.values()), separate

    def _view(self, buffers: MetadataBuffers, inputs: MetadataInputs) -> NSAMetadata:
        metadata = buffers.view(inputs.shape.bs)
        if not self.path.has_tables:
            metadata = replace(metadata, requests=inputs.slot_table)
        return metadata.prepared(self.prepare)

    def _plan(self, bs: int) -> None:
        sets = self.backends[bs]
        if self.path.shares_buffers:
            distinct = dict(zip(self.offsets, sets))
            destinations = _one_table_owner(list(distinct.values()), list(distinct))
        else:
            destinations = [Destination(metadata, offset) for metadata, offset in zip(sets, self.offsets)]
        stages = self.path.plan(self.methods, self.inputs[bs], destinations, self.staging) if sets else []
        self._launch[bs] = _one_call(stages + _schedule_stages(sets))

    def _or_fall_back(self, action: Callable[[], None]) -> None:
        try:
            action()
        except RuntimeError as error:
            self._fall_back(error)
            action()

    def _fall_back(self, error: RuntimeError) -> None:
        """Where 'auto' chose kernels that fail, plans everything anew in torch; else raises the error."""
        if self.selection.copy != "auto" or self.methods == TORCH_METHODS:
            raise error
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise error  # the capture is lost; its warm-up runs would have fallen back
        _warn_fallback(str(error))
        self.fallbacks += 1
        self.fallback_reason = str(error)
        self.methods = TORCH_METHODS
        for bs in self.inputs:
            self._plan(bs)
