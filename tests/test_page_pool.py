"""PagePool against a simple model: a dict of owners."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_local.page_pool import PagePool


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(2, 20))
def test_behaves_like_a_dict_of_owners(data: st.DataObject, num_pages: int) -> None:
    pool, owners = PagePool(num_pages), dict[int, int]()
    for _ in range(data.draw(st.integers(0, 30), label="steps")):
        free = num_pages - 1 - len(owners)
        some_owned = st.lists(st.sampled_from(sorted(owners) or [0]), unique=True, min_size=1)
        action = data.draw(st.sampled_from(["allocate", "retain", "release"]))
        if action == "allocate":
            pages = pool.allocate(data.draw(st.integers(0, free), label="count"))
            assert not owners.keys() & pages
            owners |= dict.fromkeys(pages, 1)
        elif owners and action == "retain":
            pages = data.draw(some_owned, label="retained")
            pool.retain(pages)
            owners |= {page: owners[page] + 1 for page in pages}
        elif owners:
            pages = data.draw(some_owned, label="released")
            pool.release(pages)
            owners |= {page: owners[page] - 1 for page in pages}
            owners = {page: count for page, count in owners.items() if count}
        pool.check_integrity()
        assert pool.num_free == num_pages - 1 - len(owners)
        assert 0 not in owners and all(0 < page < num_pages for page in owners)
    for page, count in owners.items():
        pool.release([page] * count)
    pool.check_integrity()
    assert pool.num_free == num_pages - 1


def test_gives_out_every_page_but_zero() -> None:
    pool = PagePool(9)
    assert sorted(pool.allocate(8)) == list(range(1, 9))
    assert pool.num_free == 0
    assert pool.allocate(0) == []


@pytest.mark.parametrize("retained", [0, 1, 3])
def test_a_release_too_many_raises(retained: int) -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    for _ in range(retained):
        pool.retain(pages)
    for _ in range(retained + 1):
        pool.release(pages)
    with pytest.raises(ValueError, match=f"page {pages[0]} is released twice"):
        pool.release(pages)
    pool.check_integrity()
    assert pool.num_free == 3


def test_the_same_page_twice_in_one_release_raises() -> None:
    pool = PagePool(4)
    [page] = pool.allocate(1)
    with pytest.raises(ValueError, match=f"page {page} "):
        pool.release([page, page])
    pool.check_integrity()


@pytest.mark.parametrize("page", [0, 3])
def test_a_page_never_given_out_cannot_be_released(page: int) -> None:
    pool = PagePool(4)
    with pytest.raises(ValueError, match=f"page {page} "):
        pool.release([page])
    pool.check_integrity()


def test_a_caller_that_does_not_look_at_num_free_fails_at_once() -> None:
    pool = PagePool(4)
    for count in (4, -1):
        with pytest.raises(AssertionError):
            pool.allocate(count)
    with pytest.raises(AssertionError, match="page 1 is free"):
        pool.retain([1])
    with pytest.raises(AssertionError, match="at least 2"):
        PagePool(1)
    pool.check_integrity()
