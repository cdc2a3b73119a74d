"""The page allocator against a set."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.mem_cache.allocator import PageAllocator


@given(
    num_pages=st.integers(1, 40), steps=st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60)
)
def test_pages_are_handed_out_once(num_pages: int, steps: list[tuple[bool, int]]) -> None:
    allocator, held = PageAllocator(num_pages), []
    for is_alloc, count in steps:
        if is_alloc:
            pages = allocator.alloc(count)
            if count > num_pages - len(held):
                assert pages is None
            else:
                assert len(pages) == count
                held += pages
        else:
            allocator.free(held[:count])
            del held[:count]
        assert len(set(held)) == len(held)
        assert set(held) | set(allocator.free_pages) == set(range(1, num_pages + 1))
        assert allocator.available == num_pages - len(held)


def test_fresh_pages_are_consecutive() -> None:
    allocator = PageAllocator(8)
    assert allocator.alloc(3) == [1, 2, 3]
    assert allocator.alloc(2) == [4, 5]
    allocator.free([1, 2, 3])
    assert allocator.alloc(3) == [1, 2, 3]


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([0], "page 0 "),
        ([5], "page 5 "),
        ([-1], "page -1 "),
        ([4], "page 4 is freed twice"),
        ([1, 1], "page 1 "),
    ],
)
def test_wrong_pages_are_refused(pages: list[int], message: str) -> None:
    allocator = PageAllocator(4)
    allocator.alloc(2)
    with pytest.raises(ValueError, match=message):
        allocator.free(pages)


def test_no_pages_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="num_pages must be at least 1, got 0"):
        PageAllocator(0)
