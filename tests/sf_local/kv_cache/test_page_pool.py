"""PagePool against a simple model: how many owners each page has, and which pages are kept."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_local.kv_cache.page_pool import PagePool


def check(pool: PagePool, owners: Counter[int], kept: set[int]) -> None:
    """The pool agrees with the model: page -> owners, and the pages that the cache keeps."""
    pool.check_integrity()
    used = set(owners.elements())
    assert all(0 < page < pool.num_pages for page in used | kept)
    assert (pool.num_used, pool.num_cached) == (len(used), len(kept - used))
    assert pool.num_free + pool.num_used + pool.num_cached == pool.num_pages - 1
    assert {page for page in range(pool.num_pages) if pool.is_locked(page)} == used


def check_random_operations(data: st.DataObject, num_pages: int) -> None:
    pool, owners, kept = PagePool(num_pages), Counter[int](), set[int]()
    for _ in range(data.draw(st.integers(0, 30), label="steps")):
        used = set(owners.elements())
        choices = {
            "allocate": range(pool.num_free + 1),
            "retain": sorted(used | kept),
            "release": sorted(owners.elements()),
            "release too often": sorted(set(range(num_pages)) - used),
            "keep": sorted(used - kept),
            "drop": sorted(kept),
        }
        action = data.draw(st.sampled_from([name for name in choices if choices[name]]))
        choice = data.draw(st.sampled_from(choices[action]), label=action)
        if action == "allocate":
            expected = list(pool.next_pages)[:choice]
            pages = pool.allocate(choice)
            assert pages == expected
            assert len(pages) == choice and not set(pages) & (used | kept)
            owners.update(pages)
        elif action == "retain":
            pool.retain([choice])
            owners[choice] += 1
        elif action == "release":
            pool.release([choice])
            owners[choice] -= 1
        elif action == "release too often":
            with pytest.raises(ValueError, match=f"page {choice} is released twice"):
                pool.release([choice])
        elif action == "keep":
            pool.keep(choice)
            kept.add(choice)
        else:
            pool.drop(choice)
            kept.remove(choice)
        check(pool, owners, kept)
    pool.release(list(owners.elements()))
    for page in kept:
        pool.drop(page)
    check(pool, Counter(), set())
    assert pool.num_free == num_pages - 1


@settings(max_examples=200)
@given(st.data(), st.integers(2, 12))
def test_behaves_like_the_model(data: st.DataObject, num_pages: int) -> None:
    check_random_operations(data, num_pages)


@pytest.mark.slow
@settings(max_examples=1000)
@given(st.data(), st.integers(2, 12))
def test_behaves_like_the_model_many_times(data: st.DataObject, num_pages: int) -> None:
    check_random_operations(data, num_pages)


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


def test_a_kept_page_outlives_its_owners_and_comes_back_to_use() -> None:
    pool = PagePool(4)
    [page] = pool.allocate(1)
    pool.keep(page)
    pool.release([page])
    assert (pool.num_free, pool.num_used, pool.num_cached) == (2, 0, 1)
    with pytest.raises(ValueError, match=f"page {page} "):
        pool.release([page])
    pool.retain([page])
    assert (pool.num_free, pool.num_used, pool.num_cached) == (2, 1, 0)
    pool.drop(page)
    assert (pool.num_free, pool.num_used, pool.num_cached) == (2, 1, 0)
    pool.release([page])
    assert (pool.num_free, pool.num_used, pool.num_cached) == (3, 0, 0)
    pool.check_integrity()


def test_mistakes_of_the_caller_fail_at_once() -> None:
    pool = PagePool(4)
    for count in (4, -1):
        with pytest.raises(AssertionError):
            pool.allocate(count)
    with pytest.raises(AssertionError, match="page 1 is free"):
        pool.retain([1])
    with pytest.raises(AssertionError, match="page 1 is free"):
        pool.keep(1)
    with pytest.raises(AssertionError, match="page 1 is not kept"):
        pool.drop(1)
    with pytest.raises(AssertionError, match="at least 2"):
        PagePool(1)
    [page] = pool.allocate(1)
    pool.keep(page)
    with pytest.raises(AssertionError, match="kept already"):
        pool.keep(page)
    pool.check_integrity()


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._free.append(1),
        lambda pool: pool._free.append(0),
        lambda pool: pool._free.pop(),
        lambda pool: pool._owners.__setitem__(1, 1),
        lambda pool: setattr(pool, "num_cached", 1),
    ],
)
def test_check_integrity_sees_damage(damage: Callable[[PagePool], None]) -> None:
    pool = PagePool(4)
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity()
