"""PagePool: which KV pages are free, and how many owners each other page has.

Pure Python; it hands out page ids and never touches device memory. Page 0 is never given out:
padded rows write there.
"""

from collections.abc import Sequence


class PagePool:
    """Reference counts of pages 1 .. num_pages - 1.

    Whoever gets a page from `allocate` or adds an owner with `retain` must `release` it once.
    """

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 2, f"num_pages={num_pages}: page 0 is never used, so at least 2"
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._owners = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one owner each; the caller has checked `num_free`."""
        assert 0 <= count <= self.num_free, f"{count} pages asked for, {self.num_free} free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def retain(self, pages: Sequence[int]) -> None:
        """Add one owner to each page."""
        for page in pages:
            assert self._owners[page] > 0, f"page {page} is free"
            self._owners[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop one owner of each page; raises ValueError if a page has none."""
        for page in pages:
            if self._owners[page] == 0:
                raise ValueError(f"page {page} is released twice")
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)

    def check_integrity(self) -> None:
        """Assert that every page is free or owned, never both, and page 0 neither."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        owned = {page for page, owners in enumerate(self._owners) if owners}
        assert not free & owned, f"pages both free and owned: {free & owned}"
        assert free | owned == set(range(1, self.num_pages)), "a page is lost, or page 0 is in use"
