"""PagePool: which KV pages are free, used by requests, or only kept by the prefix cache.

Hands out page ids, and never touches device memory. Page 0 is never handed out: rows that only pad
a batch write there.
"""

from collections.abc import Iterator, Sequence


class PagePool:
    """Reference counts of pages 1 to num_pages - 1; num_free + num_used + num_cached is constant.

    Requests own pages: whoever gets one from `allocate`, or adds an owner with `retain`, must
    `release` it once. The cache is not an owner: it marks pages with `keep`, so that they outlive
    their owners, until `drop`. A page with an owner is locked; one that is only kept is evictable.
    """

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 2, f"num_pages={num_pages}: page 0 is never used, so at least 2"
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._owners = [0] * num_pages
        self._kept = [False] * num_pages
        self.num_cached = 0  # pages that the cache keeps and nobody owns

    @property
    def num_free(self) -> int:
        """Pages that can be allocated."""
        return len(self._free)

    @property
    def next_pages(self) -> Iterator[int]:
        """Pages that can be allocated, in the order in which they will be."""
        return reversed(self._free)

    @property
    def num_used(self) -> int:
        """Pages that have an owner."""
        return self.num_pages - 1 - self.num_free - self.num_cached

    def is_locked(self, page: int) -> bool:
        """Whether a page has an owner."""
        return self._owners[page] > 0

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one owner each; check `num_free` before."""
        assert 0 <= count <= self.num_free, f"{count} pages asked for, {self.num_free} free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def retain(self, pages: Sequence[int]) -> None:
        """Add one owner to each page; it must have one or be kept."""
        for page in pages:
            assert self._owners[page] or self._kept[page], f"page {page} is free"
            self.num_cached -= self._owners[page] == 0
            self._owners[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop one owner of each page; raises ValueError if a page has none."""
        for page in pages:
            if self._owners[page] == 0:
                raise ValueError(f"page {page} is released twice")
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._settle(page)

    def keep(self, page: int) -> None:
        """Let an owned page outlive its owners, for the cache."""
        assert self._owners[page] and not self._kept[page], f"page {page} is free, or kept already"
        self._kept[page] = True

    def drop(self, page: int) -> None:
        """End `keep`; the page becomes free once it has no owner."""
        assert self._kept[page], f"page {page} is not kept"
        self._kept[page] = False
        if self._owners[page] == 0:
            self.num_cached -= 1
            self._settle(page)

    def _settle(self, page: int) -> None:
        """Put a page that has lost its last owner, or its mark, where it belongs now."""
        if self._kept[page]:
            self.num_cached += 1
        else:
            self._free.append(page)

    def check_integrity(self) -> None:
        """Assert that every page but page 0 is exactly one of free, used and cached."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        used = {page for page, owners in enumerate(self._owners) if owners}
        cached = {page for page, kept in enumerate(self._kept) if kept} - used
        assert not free & used and not free & cached, "a page is free and in use"
        assert free | used | cached == set(range(1, self.num_pages)), (
            "a page is lost, or page 0 used"
        )
        assert (len(used), len(cached)) == (self.num_used, self.num_cached), "counts are off"
