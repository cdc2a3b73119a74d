"""The prefix cache against a dictionary from whole prefixes to pages."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache.radix_cache import RadixCache, TreeNode

PAGE = 2


@dataclass
class Reference:
    """Knows for each cached page all tokens up to its end and the lookahead."""

    lookahead: int
    pages: dict[tuple[int, ...], int] = field(default_factory=dict)

    def prefix(self, tokens: list[int], depth: int) -> tuple[int, ...] | None:
        end = (depth + 1) * PAGE + self.lookahead
        return tuple(tokens[:end]) if end <= len(tokens) else None

    def match(self, tokens: list[int]) -> list[int]:
        pages: list[int] = []
        while (page := self.pages.get(self.prefix(tokens, len(pages)))) is not None:
            pages.append(page)
        return pages


@dataclass
class Holder:
    """A request: its locked node and the pages that it still owns."""

    node: TreeNode
    owned: list[int]


TOKENS = st.lists(st.integers(0, 1), max_size=12)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), TOKENS),
        st.tuples(st.just("release"), st.integers(0, 100)),
        st.tuples(st.just("evict"), st.integers(0, 8)),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(lookahead=st.sampled_from([0, 1]), steps=STEPS)
def test_cache_equals_dictionary(lookahead: int, steps: list[tuple[str, list[int] | int]]) -> None:
    cache, reference = RadixCache(PAGE, lookahead), Reference(lookahead)
    holders: list[Holder] = []
    next_page = 1
    for action, argument in steps:
        if action == "insert":
            node = cache.match(argument)
            assert node.pages() == reference.match(argument)
            cache.lock(node)
            count = max(len(argument) - lookahead, 0) // PAGE
            pages = node.pages() + list(range(next_page, next_page + count - node.depth))
            next_page += count
            end = cache.extend(node, argument, pages)
            for depth, page in enumerate(pages):
                reference.pages.setdefault(reference.prefix(argument, depth), page)
            cache.lock(end)
            cache.unlock(node)
            assert end.pages() == reference.match(argument)
            holders.append(Holder(end, pages))
        elif action == "release" and holders:
            cache.unlock(holders.pop(argument % len(holders)).node)
        elif action == "evict":
            evictable = cache.evictable_pages
            evicted = cache.evict(argument)
            assert len(evicted) == min(argument, evictable)
            held = {page for holder in holders for page in holder.node.pages()}
            assert not held & set(evicted)
            reference.pages = {key: page for key, page in reference.pages.items() if page not in evicted}
        check_books(cache, reference, holders)
    for holder in holders:
        cache.unlock(holder.node)
    assert sorted(cache.evict(cache.num_pages)) == sorted(reference.pages.values())
    assert not list(cache.nodes())


def check_books(cache: RadixCache, reference: Reference, holders: list[Holder]) -> None:
    nodes = list(cache.nodes())
    assert sorted(node.page for node in nodes) == sorted(reference.pages.values())
    locked = {page for holder in holders for page in holder.node.pages()}
    assert {node.page for node in nodes if node.ref_count} == locked
    assert (cache.num_pages, cache.locked_pages) == (len(nodes), len(locked))
    for node in nodes:  # no page outlives the page before it
        assert node.parent is cache.root or node.parent in nodes


def put(cache: RadixCache, tokens: list[int], pages: list[int]) -> None:
    cache.extend(cache.root, tokens, pages)


def touch(cache: RadixCache, tokens: list[int]) -> None:
    node = cache.match(tokens)
    cache.lock(node)
    cache.unlock(node)


def test_least_recently_used_leaf_goes_first() -> None:
    cache = RadixCache(PAGE)
    put(cache, [1, 1, 2, 2], [1, 2])
    put(cache, [1, 1, 3, 3], [1, 3])
    put(cache, [4, 4], [4])
    touch(cache, [1, 1, 2, 2])
    assert cache.evict(2) == [3, 4]
    assert cache.evict(9) == [2, 1]  # a parent only after its last child


def test_a_used_parent_outlives_its_children() -> None:
    cache = RadixCache(PAGE)
    put(cache, [1, 1, 2, 2], [1, 2])
    put(cache, [4, 4], [4])
    touch(cache, [1, 1])
    assert cache.evict(2) == [2, 4]
    assert cache.match([1, 1]).pages() == [1]


def test_lookahead_token_is_part_of_the_key() -> None:
    cache = RadixCache(PAGE, lookahead_tokens=1)
    put(cache, [1, 1, 2], [1])
    put(cache, [1, 1, 3], [2])
    assert [cache.match([1, 1, token]).pages() for token in (2, 3, 4)] == [[1], [2], []]
    assert cache.match([1, 1]).pages() == []


def test_the_first_page_for_a_key_stays() -> None:
    cache = RadixCache(PAGE)
    put(cache, [1, 1], [1])
    node = cache.extend(cache.root, [1, 1, 2, 2], [7, 8])
    assert node.pages() == [1, 8]


def test_disabled_cache_keeps_nothing() -> None:
    cache = RadixCache(PAGE, enabled=False)
    assert cache.extend(cache.root, [1, 1], [1]) is cache.root
    assert cache.match([1, 1]) is cache.root
    assert cache.num_pages == 0


def test_unlocking_twice_is_a_bug() -> None:
    cache = RadixCache(PAGE)
    put(cache, [1, 1], [1])
    with pytest.raises(AssertionError, match="page 1 is unlocked more often"):
        cache.unlock(cache.match([1, 1]))


def test_a_hot_page_does_not_grow_the_cache() -> None:
    cache = RadixCache(PAGE)
    put(cache, [1, 1], [1])
    for _ in range(1000):
        touch(cache, [1, 1])
    assert len(cache._leaves) < 100
    assert cache.evict(1) == [1]
