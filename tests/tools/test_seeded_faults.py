"""Faults in a toy package, whose tests catch some of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.fault_sites import Fault, draw, find_sites, locate
from tests.tools.seeded_faults import Result, Suite

TOY = '''\
"""A pool."""

SIZE = 4


class Pool:
    def __init__(self) -> None:
        self.taken = 0

    def take(self, count: int) -> int:
        """Numbers in a docstring, as 7, are not drawn."""
        if self.taken + count > SIZE:
            raise ValueError(f"only {SIZE - 0} are there")
        self.taken += count
        return divmod(self.taken, 2)[1]

    def __repr__(self) -> str:
        return "Pool" * 1
'''
TESTS = """\
import subprocess
import sys

import pytest

from toy.pool import Pool


@pytest.fixture(scope="module")
def pool():
    return Pool()


def test_nothing(pool):
    assert pool


def test_take(pool):
    assert [pool.take(1), pool.take(1)] == [1, 0]
    with pytest.raises(ValueError):
        pool.take(3)


def test_take_elsewhere():
    subprocess.run([sys.executable, "-c", "from toy.pool import Pool; Pool().take(1)"], check=True)
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    files = {"toy/__init__.py": "", "toy/pool.py": TOY, "tests/test_pool.py": TESTS}
    for name, text in files.items():
        path = tmp_path / "toy_tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "toy_tree"


def test_what_is_drawn(toy: Path) -> None:
    sites = find_sites(toy)
    assert {(fault.before, fault.after) for fault in sites} == {
        ("0", "1"),
        ("1", "2"),
        ("2", "3"),
        ("self.taken = 0", "pass"),
        ("self.taken += count", "pass"),
        ("self.taken + count > SIZE", ">="),
        ("divmod(self.taken, 2)", "2, self.taken"),
    }
    drawn: list[Fault] = []
    draw({"toy": list(sites)}, 3, 1, seed=0, try_one=lambda _, fault: not drawn.append(fault))
    assert len({fault.kind for fault in drawn}) == 3


def test_a_fault_is_found_in_another_tree(toy: Path, tmp_path: Path) -> None:
    before = find_sites(toy)
    toy.joinpath("toy/pool.py").rename(toy / "toy/pages.py")
    text = TOY.replace("def take(self, count: int)", "\n    def take_pages(self, count: int, x=0)")
    toy.joinpath("toy/pages.py").write_text(text)
    after = find_sites(toy)
    for fault, site in before.items():
        found = locate(fault, after)
        assert found is not None and (found.path, found.text) == ("toy/pages.py", site.text)


def test_faults_are_caught_or_survive(toy: Path, tmp_path: Path) -> None:
    pytest.importorskip("coverage")
    pytest.importorskip("xdist")
    suite, sites = Suite(toy, tmp_path / "record"), find_sites(toy)
    assert suite.record(["-n", "2"]) == 0
    suite.load()
    faults = {fault.before: fault for fault in sites}

    def run(before: str) -> Result:
        return suite.run("toy", faults[before], sites[faults[before]], time_limit=600)

    caught, surviving = run("2"), run("self.taken + count > SIZE")
    assert (caught.verdict, caught.by) == ("caught", "tests/test_pool.py::test_take")
    assert (surviving.verdict, surviving.by) == ("survived", "")
    assert surviving.num_tests == 2  # one of them in a subprocess
    assert len(suite.tests_of(sites[faults["self.taken = 0"]])) == 3  # two through a fixture
    assert (suite.tree / "toy/pool.py").read_text() == TOY
