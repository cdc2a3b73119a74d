"""Copies of several tensors, and every method of the seeds that carries them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from sglang.benchmark_metadata.measure import Call, synchronize
from sglang.srt.layers.attention.nsa.replicate import FusedCopier, Region

POISON = -0x5A5A5A5B


@dataclass(frozen=True)
class Pairs:
    """Sources and destinations of the same shapes, int32, none of them sliced any more."""

    srcs: tuple[torch.Tensor, ...]  # [n] or [rows, cols], int32
    dsts: tuple[torch.Tensor, ...]

    @classmethod
    def vectors(cls, sizes: Sequence[int], device: torch.device) -> Pairs:
        """Views of one flat buffer on each side, so that `flat` has something to copy; 16-byte aligned."""
        padded = [-(-size // 4) * 4 for size in sizes]
        sides = [torch.zeros(sum(padded), dtype=torch.int32, device=device) for _ in range(2)]
        sides[0].random_(0, 1 << 30)
        srcs, dsts = (tuple(part[:size] for part, size in zip(side.split(padded), sizes)) for side in sides)
        return cls(srcs, dsts)

    @property
    def bytes_moved(self) -> int:
        """Read and written."""
        return sum(8 * src.numel() for src in self.srcs)

    @property
    def regions(self) -> tuple[Region, ...]:
        return tuple(Region(src, (dst,)) for src, dst in zip(self.srcs, self.dsts))

    def holds(self, call: Call) -> bool:
        """Whether `call` brings every element over."""
        for dst in self.dsts:
            dst.fill_(POISON)
        synchronize(self.dsts[0].device)  # some methods do not wait for the current stream
        call()
        return all(torch.equal(src, dst) for src, dst in zip(self.srcs, self.dsts))

    def check(self, calls: dict[str, Call]) -> None:
        wrong = [name for name, call in calls.items() if not self.holds(call)]
        if wrong:
            raise RuntimeError(f"these methods did not copy what they were given: {wrong}")


def copy_each(pairs: Pairs) -> Call:
    """One `copy_` for each tensor."""
    zipped = list(zip(pairs.dsts, pairs.srcs))

    def call() -> None:
        for dst, src in zipped:
            dst.copy_(src)

    return call


def copy_foreach(pairs: Pairs) -> Call:
    return partial(torch._foreach_copy_, list(pairs.dsts), list(pairs.srcs))


def copy_on_streams(pairs: Pairs) -> Call:
    """Each `copy_` on a stream of its own, made beforehand; the current stream waits for all."""
    zipped = [(dst, src, torch.cuda.Stream(dst.device)) for dst, src in zip(pairs.dsts, pairs.srcs)]

    def call() -> None:
        current = torch.cuda.current_stream()
        for dst, src, stream in zipped:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                dst.copy_(src)
        for _, _, stream in zipped:
            current.wait_stream(stream)

    return call


def copy_through_cat(pairs: Pairs) -> Call:
    """`torch.cat` into one flat buffer, then one `copy_` out of it for each tensor."""
    sizes = [src.numel() for src in pairs.srcs]
    flat = pairs.srcs[0].new_empty(sum(sizes))
    pieces = [piece.view(src.shape) for piece, src in zip(flat.split(sizes), pairs.srcs)]

    def call() -> None:
        torch.cat([src.reshape(-1) for src in pairs.srcs], out=flat)
        for dst, piece in zip(pairs.dsts, pieces):
            dst.copy_(piece)

    return call


def copy_flat(pairs: Pairs) -> Call:
    """One `copy_` of the buffers behind `Pairs.vectors`: possible only where both sides lie flat already."""
    src, dst = (side[0]._base for side in (pairs.srcs, pairs.dsts))
    return partial(dst.copy_, src)


def copy_triton(pairs: Pairs) -> Call:
    """One Triton launch, its table of pointers built once."""
    from sglang.benchmark_metadata.triton_batched_copy import BatchedCopy

    return partial(BatchedCopy(pairs.regions).run, -1)


def copy_fused(pairs: Pairs) -> Call:
    """The library's kernel, planned: what the project uses."""
    return partial(FusedCopier(pairs.regions).run, -1)


METHODS: dict[str, Callable[[Pairs], Call]] = {
    "copy_": copy_each,
    "foreach": copy_foreach,
    "streams": copy_on_streams,
    "cat": copy_through_cat,
    "flat": copy_flat,
    "triton": copy_triton,
    "fused": copy_fused,
}
NEEDS_CUDA = ("streams", "triton")
COLOURS = {
    "copy_": "#b2182b",
    "foreach": "#fdae61",
    "streams": "#c2a5cf",
    "cat": "#9970ab",
    "flat": "#888888",
    "triton": "#80b1d3",
    "fused": "#2166ac",
}


def methods_on(device: torch.device, pairs: Pairs, names: Sequence[str] = tuple(METHODS)) -> dict[str, Call]:
    """The named methods that the device has, checked."""
    chosen = [name for name in names if device.type == "cuda" or name not in NEEDS_CUDA]
    calls = {name: METHODS[name](pairs) for name in chosen}
    pairs.check(calls)
    return calls
