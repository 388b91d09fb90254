"""RadixCache against a flat table of everything it should keep, with made-up page contents."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_local.kv_cache.page_pool import PagePool
from sf_local.kv_cache.radix_cache import Match, RadixCache, Tokens, common_prefix_len


def shared_len(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def prefixes(tokens: Tokens) -> list[Tokens]:
    return [tokens[: i + 1] for i in range(len(tokens))]


class Oracle:
    """Every kept page by the path of all tokens up to its end; least recently used first."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: dict[Tokens, int] = {}

    def longest(self, tokens: Tokens) -> int:
        return max((shared_len(path, tokens) for path in self.pages), default=0)

    def ends(self, length: int) -> list[int]:
        """Where the pages of a path end: 2, 4, 5 for five tokens in pages of two."""
        return [min(i + self.page_size, length) for i in range(0, length, self.page_size)]

    def use(self, path: Tokens) -> None:
        """Move a path behind all others, and what it continues behind that."""
        for end in reversed(self.ends(len(path))):
            self.pages[path[:end]] = self.pages.pop(path[:end])

    def insert(self, tokens: Tokens, pages: Sequence[int]) -> list[int]:
        """The pages that the caller has afterwards."""
        used, result = tokens, list(pages)
        for index, end in enumerate(self.ends(len(tokens))):
            path, start = tokens[:end], index * self.page_size
            same_page = [p for p in self.pages if start < len(p) <= start + self.page_size]
            holders = [p for p in same_page if p[:end] == path]
            for beginning in [p for p in same_page if p == path[: len(p)] and len(p) < end]:
                del self.pages[beginning]
            if not holders:
                self.pages[path] = pages[index]
            elif end == start + self.page_size:
                result[index] = self.pages[path]
            else:
                used = min(holders)
        self.use(used)
        return result

    def evict(self, count: int, is_locked: Callable[[int], bool]) -> set[int]:
        """The pages that have to go, one leaf after the other."""
        evicted: set[int] = set()
        for _ in range(count):
            parents = {p[:end] for p in self.pages for end in self.ends(len(p))[:-1]}
            leaves = (p for p in self.pages if p not in parents and not is_locked(self.pages[p]))
            if (path := next(leaves, None)) is not None:
                evicted.add(self.pages.pop(path))
        return evicted


@dataclass(eq=False)
class Owner:
    """Tokens that were computed into pages."""

    tokens: Tokens
    pages: list[int]


class World:
    """Owners that share and fill pages as the scheduler's requests do."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.pool = PagePool(num_pages)
        self.cache, self.oracle = RadixCache(self.pool, page_size), Oracle(page_size)
        self.page_size = page_size
        self.contents: dict[int, list[Tokens]] = {}  # page -> for each slot all tokens up to it
        self.owners: list[Owner] = []
        self.inserted: list[Tokens] | None = []  # None once something was evicted

    def match(self, tokens: Tokens) -> Match:
        match = self.cache.match(tokens)
        full_len = len(match.pages) * self.page_size
        length = full_len + match.num_partial
        assert length == self.oracle.longest(tokens) and match.num_partial < self.page_size
        if self.inserted is not None:
            assert length == max((shared_len(old, tokens) for old in self.inserted), default=0)
        assert bool(match.partial_page) == bool(match.num_partial)
        assert self.holds(tokens[:length], [*match.pages, match.partial_page])
        paths = {page: path for path, page in self.oracle.pages.items()}
        self.oracle.use(paths[match.partial_page] if match.num_partial else tokens[:full_len])
        return match

    def start(self, tokens: Tokens) -> None:
        """A new owner, of what is cached and of new pages for the rest, if they can be had."""
        match = self.match(tokens)
        self.pool.retain(match.pages)
        owner = Owner(tokens[: len(match.pages) * self.page_size], match.pages)
        self.owners.append(owner)
        copied = tokens[: len(owner.tokens) + match.num_partial]
        source = self.contents.get(match.partial_page, [])
        assert source[: match.num_partial] == prefixes(copied)[len(owner.tokens) :]
        self.grow(owner, tokens[len(owner.tokens) :])

    def grow(self, owner: Owner, more: Tokens) -> None:
        tokens = owner.tokens + more
        missing = -(-len(tokens) // self.page_size) - len(owner.pages)
        if missing > self.pool.num_free:
            self.evict(missing - self.pool.num_free)
        if missing > self.pool.num_free:
            return
        owner.pages = owner.pages + self.pool.allocate(missing)
        for position in range(len(owner.tokens), len(tokens)):
            slots = self.contents.setdefault(owner.pages[position // self.page_size], [])
            slots[position % self.page_size :] = [tokens[: position + 1]]
        owner.tokens = tokens

    def insert(self, owner: Owner, length: int) -> None:
        tokens = owner.tokens[:length]
        before = owner.pages
        owner.pages = self.cache.insert(tokens, owner.pages)
        assert owner.pages == self.oracle.insert(tokens, before)
        if self.inserted is not None:
            self.inserted.append(tokens)

    def release(self, owner: Owner) -> None:
        self.pool.release(owner.pages)
        self.owners.remove(owner)

    def evict(self, count: int) -> None:
        num_cached = self.pool.num_cached
        locked = [page for page in self.kept if self.pool.is_locked(page)]
        expected = self.oracle.evict(count, self.pool.is_locked)
        before = self.kept
        assert self.cache.evict(count) == len(expected) == min(count, num_cached)
        assert before - self.kept == expected and self.kept >= set(locked)
        if expected:
            self.inserted = None

    def clear(self) -> None:
        self.cache.clear()
        self.oracle.pages.clear()
        self.inserted = []

    @property
    def kept(self) -> set[int]:
        return {node.page for node in self.cache._nodes}

    def holds(self, tokens: Tokens, pages: Sequence[int]) -> bool:
        slots = [
            self.contents[pages[i // self.page_size]][i % self.page_size]
            for i in range(len(tokens))
        ]
        return slots == prefixes(tokens)

    def check(self) -> None:
        self.pool.check_integrity()
        self.cache.check_integrity()
        owned = {page for owner in self.owners for page in owner.pages}
        assert self.kept == set(self.oracle.pages.values())
        assert len(self.cache) == len(self.oracle.pages)
        assert {p for p in range(self.pool.num_pages) if self.pool.is_locked(p)} == owned
        assert self.pool.num_cached == len(self.kept - owned)
        for owner in self.owners:
            assert self.holds(owner.tokens, owner.pages)
        for path, page in self.oracle.pages.items():
            start = (len(path) - 1) // self.page_size * self.page_size
            assert self.contents[page][: len(path) - start] == prefixes(path)[start:]


ACTIONS = {"start": 4, "match": 3, "insert": 6, "grow": 2, "release": 3, "evict": 1, "clear": 0.3}


def check_random_operations(chance: random.Random, page_size: int, num_steps: int) -> None:
    world = World(chance.randint(2, 24), page_size)
    alphabet = range(chance.randint(2, 3))
    popular = chance.choices(alphabet, k=4 * page_size)

    def some_tokens() -> Tokens:
        beginning = popular[: max(0, chance.randint(-page_size, len(popular)))]
        return (*beginning, *chance.choices(alphabet, k=chance.randint(0, page_size)))

    for action in chance.choices(list(ACTIONS), list(ACTIONS.values()), k=num_steps):
        if action == "evict":
            world.evict(chance.randint(0, 4))
        elif action == "clear":
            world.clear()
        elif action == "match":
            world.match(some_tokens())
        elif action == "start" or not world.owners:
            world.start(some_tokens())
        else:
            owner = chance.choice(world.owners)
            if action == "grow":
                world.grow(owner, some_tokens())
            elif action == "insert":
                world.insert(owner, min(chance.randint(0, 4 * page_size), len(owner.tokens)))
            else:
                world.release(owner)
        world.check()
    for owner in list(world.owners):
        world.release(owner)
    while len(world.cache):
        world.evict(1)
    world.check()
    assert world.pool.num_free == world.pool.num_pages - 1


@settings(max_examples=200)
@given(st.randoms(use_true_random=True), st.integers(1, 4), st.integers(1, 120))
def test_behaves_like_the_oracle(chance: random.Random, page_size: int, num_steps: int) -> None:
    check_random_operations(chance, page_size, num_steps)


@pytest.mark.slow
@settings(max_examples=1000)
@given(st.randoms(use_true_random=True), st.integers(1, 4), st.integers(1, 120))
def test_behaves_like_the_oracle_many_times(
    chance: random.Random, page_size: int, num_steps: int
) -> None:
    check_random_operations(chance, page_size, num_steps)


def cached(*sequences: Sequence[int], page_size: int = 4) -> RadixCache:
    """A cache that holds these sequences, without owners."""
    pool = PagePool(64)
    cache = RadixCache(pool, page_size)
    for tokens in sequences:
        pool.release(cache.insert(tokens, pool.allocate(-(-len(tokens) // page_size))))
    return cache


def test_matches_to_the_token() -> None:
    pool = PagePool(8)
    cache = RadixCache(pool, 4)
    a, b, c = cache.insert(range(10), pool.allocate(3))
    assert cache.match([]) == cache.match([1]) == Match([])
    assert cache.match([0, 1, 9]) == Match([], a, 2)
    assert cache.match(range(4)) == cache.match([0, 1, 2, 3, 9]) == Match([a])
    assert cache.match(range(7)) == Match([a], b, 3)
    assert cache.match(range(8)) == Match([a, b])
    assert cache.match(range(10)) == cache.match(range(20)) == Match([a, b], c, 2)


def test_a_longer_partial_page_takes_the_place_of_a_shorter_one() -> None:
    cache = cached([1], [1, 2], [1, 2, 3], [1, 2, 9], [1, 2])
    assert len(cache) == 2
    assert cache.match([1, 2, 3]).num_partial == cache.match([1, 2, 9]).num_partial == 3
    assert cache.pool.num_free == 61


def test_insert_adopts_full_pages_and_releases_ours() -> None:
    pool = PagePool(8)
    cache = RadixCache(pool, 2)
    theirs = cache.insert([1, 2, 3, 4, 5], pool.allocate(3))
    ours = pool.allocate(3)
    assert cache.insert([1, 2, 3, 4, 5], ours) == [*theirs[:2], ours[2]]
    assert (pool.num_free, pool.num_used) == (3, 4)
    pool.release(theirs)
    assert [pool.is_locked(page) for page in theirs] == [True, True, False]
    cache.check_integrity()


def test_pages_beyond_the_tokens_are_handed_back_untouched() -> None:
    pool = PagePool(8)
    cache = RadixCache(pool, 2)
    pages = pool.allocate(4)
    assert cache.insert([1, 2, 3], pages) == pages
    assert len(cache) == 2
    assert cache.insert([], pages) == pages


def test_eviction_spares_locked_pages_and_takes_the_oldest_leaf() -> None:
    cache = cached([1, 1], [2, 2], [3, 3], page_size=1)
    pool = cache.pool
    pages = cache.match([1, 1]).pages
    pool.retain(pages)
    cache.match([2, 2])
    assert cache.evict(1) == 1
    assert cache.match([3, 3]).pages == cache.match([3]).pages  # its leaf was the oldest
    assert cache.evict(99) == 3
    assert cache.match([1, 1]).pages == pages
    assert (len(cache), cache.evict(99)) == (2, 0)
    pool.release(pages)
    assert (cache.evict(99), pool.num_free) == (2, 63)


def test_inserting_again_is_a_use() -> None:
    cache = cached([1, 1, 1], [2, 2, 2], [1, 1])
    assert cache.evict(1) == 1
    assert cache.match([1, 1, 1]).num_partial == 3


def test_clear_leaves_locked_pages_to_their_owners() -> None:
    pool = PagePool(8)
    cache = RadixCache(pool, 2)
    kept = cache.insert([1, 2, 3], pool.allocate(2))
    pool.release(cache.insert([7, 7], pool.allocate(1)))
    cache.clear()
    assert (len(cache), pool.num_used, pool.num_cached) == (0, 2, 0)
    assert cache.match([1, 2, 3]) == Match([])
    assert cache.insert([1, 2, 3], kept) == kept
    pool.release(kept)
    assert (pool.num_cached, pool.num_free) == (2, 5)


@pytest.mark.parametrize(("a", "b", "length"), [("", "", 0), ("ab", "abc", 2), ("abd", "abc", 2)])
def test_common_prefix_len(a: str, b: str, length: int) -> None:
    assert common_prefix_len(a.encode(), b.encode()) == length
