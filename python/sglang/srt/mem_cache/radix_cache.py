"""The prefix cache: pages of finished and running requests, found again by the tokens that they hold."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence


class TreeNode:
    """One page. The path from the root spells the tokens before it."""

    __slots__ = ("children", "depth", "key", "last_used", "page", "parent", "ref_count")

    def __init__(self, parent: TreeNode | None, key: tuple[int, ...], page: int) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.depth: int = parent.depth + 1 if parent else 0  # pages from the root to here, this one included
        self.children: dict[tuple[int, ...], TreeNode] = {}
        self.ref_count = 0
        self.last_used = 0

    def path(self) -> Iterator[TreeNode]:
        """This node and its ancestors, deepest first, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def pages(self) -> list[int]:
        """The pages from the root to here, in the order of their tokens."""
        return [node.page for node in self.path()][::-1]


class RadixCache:
    """A trie with one page a node.

    A page's key is its tokens and the `lookahead_tokens` after them: when speculating, the draft layer's
    keys at the last position of a page depend on the token after it, so pages that differ there differ.

    Locks cover whole paths. Therefore whatever hangs below an unlocked node is unlocked too, and every
    unlocked page can be evicted, leaves first, the least recently used first.
    """

    def __init__(self, page_size: int, lookahead_tokens: int = 0, enabled: bool = True) -> None:
        self.page_size = page_size
        self.lookahead_tokens = lookahead_tokens
        self.enabled = enabled
        self.root = TreeNode(None, (), 0)
        self.num_pages = 0
        self.locked_pages = 0
        self._clock = 0
        self._leaves: list[tuple[int, TreeNode]] = []  # a heap; entries that are no longer true are skipped

    @property
    def evictable_pages(self) -> int:
        return self.num_pages - self.locked_pages

    def nodes(self) -> Iterator[TreeNode]:
        """All nodes but the root."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def match(self, tokens: Sequence[int]) -> TreeNode:
        """The deepest node whose key lies wholly in `tokens`; lock it before anything else may evict."""
        node = self.root
        while (child := node.children.get(self.key(tokens, node.depth))) is not None:
            node = child
        return node

    def extend(self, node: TreeNode, tokens: Sequence[int], pages: Sequence[int]) -> TreeNode:
        """Hands `pages`, which hold `tokens` from the start on, to the cache; returns the last one's node.

        `node` is a locked node on the path of `tokens`. Where the cache already has a page, it keeps its
        own: the caller still owns those of `pages` that are not in the result's `pages()`.
        """
        if not self.enabled:
            return node
        for page in pages[node.depth :]:
            key = self.key(tokens, node.depth)
            assert len(key) == self.page_size + self.lookahead_tokens, (len(tokens), len(pages))
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = TreeNode(node, key, page)
                self.num_pages += 1
                self._touch(child)
            node = child
        return node

    def lock(self, node: TreeNode) -> None:
        """Keeps the node and its ancestors until `unlock`."""
        for step in node.path():
            self.locked_pages += step.ref_count == 0
            step.ref_count += 1

    def unlock(self, node: TreeNode) -> None:
        for step in node.path():
            assert step.ref_count > 0, f"page {step.page} is unlocked more often than locked"
            step.ref_count -= 1
            if step.ref_count == 0:
                self.locked_pages -= 1
                self._touch(step)

    def evict(self, count: int) -> list[int]:
        """Drops up to `count` unlocked pages and returns them: they are the caller's again."""
        evicted: list[int] = []
        while len(evicted) < count and self._leaves:
            last_used, node = heapq.heappop(self._leaves)
            if node.parent is None or node.last_used != last_used or node.children or node.ref_count:
                continue
            parent = node.parent
            del parent.children[node.key]
            node.parent = None
            self.num_pages -= 1
            evicted.append(node.page)
            if parent is not self.root and not parent.children and not parent.ref_count:
                heapq.heappush(self._leaves, (parent.last_used, parent))
        return evicted

    def key(self, tokens: Sequence[int], depth: int) -> tuple[int, ...]:
        """The key of page `depth` of a sequence; shorter than a key where the sequence is too short."""
        start = depth * self.page_size
        return tuple(tokens[start : start + self.page_size + self.lookahead_tokens])

    def _touch(self, node: TreeNode) -> None:
        self._clock += 1
        node.last_used = self._clock
        if node.children:
            return
        heapq.heappush(self._leaves, (self._clock, node))
        if len(self._leaves) > 2 * self.num_pages + 64:  # a hot leaf left many entries behind
            self._leaves = [(n.last_used, n) for n in self.nodes() if not n.children and not n.ref_count]
            heapq.heapify(self._leaves)
