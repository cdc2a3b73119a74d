"""Which pages of the key-value cache are free."""

from __future__ import annotations

from collections.abc import Sequence


class PageAllocator:
    """Hands out pages 1 .. num_pages; page 0 belongs to the padding and is never handed out."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self._free_pages = list(range(num_pages, 0, -1))  # a stack: consecutive pages come out together
        self._is_free = bytearray([0] + [1] * num_pages)

    @property
    def available(self) -> int:
        return len(self._free_pages)

    @property
    def free_pages(self) -> Sequence[int]:
        return self._free_pages

    def alloc(self, count: int) -> list[int] | None:
        """`count` pages, or None where fewer are free."""
        if count > len(self._free_pages):
            return None
        pages = [self._free_pages.pop() for _ in range(count)]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Takes pages back. Raises ValueError for a page that does not exist or is free already."""
        for page in reversed(pages):
            if not 1 <= page <= self.num_pages:
                raise ValueError(f"page {page} does not exist: pages are 1 .. {self.num_pages}")
            if self._is_free[page]:
                raise ValueError(f"page {page} is freed twice")
            self._is_free[page] = 1
            self._free_pages.append(page)
