"""RadixCache: which pages hold the keys and values of which token sequences.

A tree after SGLang's RadixAttention (Zheng et al. 2024), of one node a page: its tokens, and the
pages that continue them. Only leaves may be partly filled. What a page in the tree holds for its
tokens never changes, but a running request may still fill the slots after them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sf_local.kv_cache.page_pool import PagePool

Tokens = tuple[int, ...]  # at most a page of them


@dataclass(eq=False)
class Node:
    """A page, and the tokens in it, which follow those of its parents."""

    tokens: Tokens
    page: int
    parent: Node | None
    children: dict[Tokens, Node] = field(default_factory=dict)
    keys: list[Tokens] = field(default_factory=list)  # the children's tokens, sorted


@dataclass(frozen=True)
class Match:
    """The longest cached prefix: whole pages, which can be shared, and part of one, to be copied.

    The first `num_partial` tokens of `partial_page` follow those of `pages`.
    """

    pages: list[int]
    partial_page: int = 0
    num_partial: int = 0


class RadixCache:
    """Keeps pages of a PagePool for prompts that begin alike.

    `match` locks nothing: retain the pages it returns, or copy them, before the next `evict`.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.pool, self.page_size = pool, page_size
        self._root = Node((), 0, None)
        # Least recently used first; a node always comes before its parents.
        self._nodes: OrderedDict[Node, None] = OrderedDict()

    def __len__(self) -> int:
        """The number of nodes, one page each."""
        return len(self._nodes)

    def match(self, tokens: Sequence[int]) -> Match:
        """The longest cached prefix of `tokens`; it may end inside a page."""
        node: Node = self._root
        pages: list[int] = []
        for start in range(0, len(tokens), self.page_size):
            chunk = tuple(tokens[start : start + self.page_size])
            child = node.children.get(chunk) if len(chunk) == self.page_size else None
            if child is None:
                partial, count = self._nearest(node, chunk)
                self._touch(partial or node)
                return Match(pages, partial.page if partial else 0, count)
            pages.append(child.page)
            node = child
        self._touch(node)
        return Match(pages)

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> list[int]:
        """Keep the caller's `pages`, which hold `tokens`; the last may be partly filled.

        Returns the pages to go on with: a full page of the same tokens that is in the cache already
        takes the place of the caller's, and so does its ownership.
        """
        node: Node = self._root
        result: list[int] = []
        for index, page in enumerate(pages[: -(-len(tokens) // self.page_size)]):
            chunk = tuple(tokens[index * self.page_size : (index + 1) * self.page_size])
            node = node.children.get(chunk) or self._add(node, chunk, page)
            if node.page != page and len(chunk) == self.page_size:
                self.pool.retain([node.page])
                self.pool.release([page])
                page = node.page
            result.append(page)
        self._touch(node)
        return [*result, *pages[len(result) :]]

    def evict(self, count: int) -> int:
        """Free up to `count` pages, least recently used leaves first; returns how many."""
        victims: list[Node] = []
        for node in self._nodes:
            if len(victims) == count:
                break
            if not node.children and not self.pool.is_locked(node.page):
                self._detach(node)
                victims.append(node)
        for node in victims:
            del self._nodes[node]
            self.pool.drop(node.page)
        return len(victims)

    def forget(self, pages: Sequence[int]) -> None:
        """Take partly filled pages out of the cache, those of `pages` that are in it."""
        for node in [node for node in self._nodes if node.page in pages]:
            self._remove(node)

    def clear(self) -> None:
        """Forget everything. Pages that have owners stay theirs."""
        for node in self._nodes:
            self.pool.drop(node.page)
        self._nodes.clear()
        self._root = Node((), 0, None)

    def check_integrity(self) -> None:
        """Assert that tree and list of nodes agree, and that only leaves are partly filled."""
        found = list(self._walk())
        assert len(found) == len(self._nodes) and set(found) == set(self._nodes)
        assert len({node.page for node in found}) == len(found), "a page is in two nodes"
        for node in [self._root, *found]:
            assert sorted(node.children) == node.keys
            assert not node.children or node.parent is None or len(node.tokens) == self.page_size
            assert all(child.parent is node for child in node.children.values())

    def _add(self, node: Node, chunk: Tokens, page: int) -> Node:
        """Add a child, which replaces a partly filled one that it extends.

        Returns an existing child instead if that holds all tokens of `chunk`.
        """
        nearest, common = self._nearest(node, chunk)
        if nearest is not None and common == len(chunk):
            return nearest
        if nearest is not None and common == len(nearest.tokens):
            self._remove(nearest)
        child = Node(chunk, page, node)
        node.children[chunk] = child
        insort(node.keys, chunk)
        self._nodes[child] = None
        self.pool.keep(page)
        return child

    def _nearest(self, node: Node, chunk: Tokens) -> tuple[Node | None, int]:
        """The child that shares most tokens with `chunk`, and how many.

        It is one of the two neighbours of `chunk` among the sorted keys.
        """
        best, most = None, 0
        at = bisect_left(node.keys, chunk)
        for key in node.keys[max(at - 1, 0) : at + 1]:
            common = common_prefix_len(key, chunk)
            if common > most:
                best, most = node.children[key], common
        return best, most

    def _touch(self, node: Node | None) -> None:
        """Make a node, and then its parents, the most recently used."""
        while node is not None and node.parent is not None:
            self._nodes.move_to_end(node)
            node = node.parent

    def _detach(self, node: Node) -> None:
        """Take a node from its parent, but not from the list of nodes."""
        assert node.parent is not None
        del node.parent.children[node.tokens]
        del node.parent.keys[bisect_left(node.parent.keys, node.tokens)]

    def _remove(self, node: Node) -> None:
        self._detach(node)
        del self._nodes[node]
        self.pool.drop(node.page)

    def _walk(self) -> Iterator[Node]:
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()


def common_prefix_len(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginnings."""
    same, end = 0, min(len(a), len(b))
    if a[:end] == b[:end]:
        return end
    while same + 1 < end:  # a[:same] is common, a[:end] is not; slices compare without Python
        middle = (same + end) // 2
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            end = middle
    return same
