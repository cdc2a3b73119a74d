"""Where the tensors of a case lie, and how two results are compared.

All tensors of a case lie in one byte buffer (`Arena`), apart from each other and surrounded by poison. A
case runs on a copy of the buffer on the device, the reference on a copy on the CPU, and the two must be equal
to the last byte: one comparison sees live elements, untouched elements and untouched sources alike.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

DECODE, TARGET_VERIFY, DRAFT_EXTEND = 0, 1, 2
POISON = 0xA5  # of every byte that is nobody's

DrawInt = Callable[[int, int], int]  # both ends included: a random generator's, or hypothesis'


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in an arena; in elements of its dtype."""

    name: str
    offset: int
    shape: tuple[int, ...]
    row_stride: int
    dtype: torch.dtype

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        strides = (1,) if len(self.shape) == 1 else (self.row_stride, 1)
        return torch.as_strided(buffer.view(self.dtype), self.shape, strides, self.offset)


@dataclass
class Arena:
    slots: list[Slot] = field(default_factory=list)
    num_bytes: int = 64

    def add(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, extra: int = 0, shift: int = 0
    ) -> Slot:
        """Reserves a tensor: `extra` elements after each row, its start `shift` past a 16-byte boundary."""
        size = dtype.itemsize
        rows, cols = shape if len(shape) == 2 else (1, shape[0])
        start = (self.num_bytes + 15) // 16 * 16 + shift * size
        slot = Slot(name, start // size, shape, cols + extra, dtype)
        self.slots.append(slot)
        self.num_bytes = start + max(rows, 1) * (cols + extra) * size + 16
        return slot

    def buffer(self) -> torch.Tensor:
        return torch.full(((self.num_bytes + 15) // 16 * 16,), POISON, dtype=torch.uint8)

    def explain(self, found: torch.Tensor, expected: torch.Tensor) -> str:
        """Names the first tensor and element that differ."""
        for slot in self.slots:
            wrong = (slot.view(found) != slot.view(expected)).nonzero()
            if len(wrong):
                at = tuple(wrong[0].tolist())
                values = slot.view(found)[at].item(), slot.view(expected)[at].item()
                return f"{slot.name}{list(at)}: found {values[0]}, expected {values[1]} ({len(wrong)} differ)"
        first = int((found != expected).nonzero()[0])
        return f"byte {first} between the tensors was overwritten"


def assert_same(arena: Arena, found: torch.Tensor, expected: torch.Tensor, case: object) -> None:
    found = found.cpu()
    if not torch.equal(found, expected):
        raise AssertionError(f"{arena.explain(found, expected)} in {case}")


def fill_random(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Random bytes, so that every bit of every element is copied."""
    limits = torch.iinfo(tensor.dtype)
    tensor.copy_(torch.randint(limits.min, limits.max, tensor.shape, generator=generator, dtype=tensor.dtype))


@contextlib.contextmanager
def huge_table(rows: int, width: int, device: str) -> Iterator[torch.Tensor]:
    """Zeros, [rows, width], int32. On the CPU: address space of which only the touched pages take memory."""
    if device != "cpu":
        yield torch.zeros(rows, width, dtype=torch.int32, device=device)
        return
    map_noreserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_noreserve
    memory = mmap.mmap(-1, rows * width * 4, flags=flags)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    yield torch.frombuffer(memory, dtype=torch.int32).view(rows, width)
