"""Seeds faults into the sources, one at a time, and reports which of them the tests catch.

Two commands; the first runs the whole suite once and takes about twice as long as that does:

    python -m tests.tools.seeded_faults record RECORD [--root TREE] [PYTEST ARGUMENTS]
    python -m tests.tools.seeded_faults run RECORD [--root TREE] [--out faults.json]

`record` writes into the folder RECORD which tests execute which line: a `.coverage` file whose
contexts are the tests, also in subprocesses and on shortfin's threads. What ran in a fixture that
several tests share counts for all of them. `run` draws faults, applies each to a copy of the tree,
and runs the tests that execute its line, the quickest first, until one fails. Both work on copies
inside RECORD.

To see whether another tree, such as one after a restructuring, catches no less than an old one:

    ... run OLD_RECORD --root OLD --also NEW --redraw --out faults.json
    ... run NEW_RECORD --root NEW --faults faults.json --out result.json

With `--redraw`, faults are drawn until N of them are caught; those that were not stand in
faults.json as "drawn_again". A fault is found again, in any file, by its function and the text of
its statement; `--also` leaves out what NEW does not have.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from pathlib import Path

from tests.tools import fault_recorder
from tests.tools.fault_sites import Fault, Site, by_area, draw, find_sites, locate

ROOT = Path(__file__).parents[2]
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "__pycache__")
COVERAGE_FILE = """\
[run]
parallel = true
branch = true
data_file = {record}/.coverage
include = {tree}/*
omit = {tree}/tests/*
"""


@dataclass(frozen=True)
class Result:
    """What became of a fault.

    verdict: "caught", "survived", "timeout" (none had failed by then), "missing" (the tree has no
    such place) or "broken" (pytest could not start).
    """

    area: str
    fault: Fault
    verdict: str
    by: str = ""  # the test that caught it
    path: str = ""
    line: int = 0
    num_tests: int = 0
    seconds: float = 0.0

    def line_of_table(self) -> str:
        where, fault = f"{self.path}:{self.line} {self.fault.function}", self.fault
        change = f"{fault.statement}: {fault.before} -> {fault.after}"
        return f"{self.verdict:9}{self.area:10}{self.seconds:6.1f}s {where}: {change}  {self.by}"


class Suite:
    """A copy of a tree whose tests are run, with fault or without."""

    def __init__(self, root: Path, record: Path) -> None:
        self._record, self.tree = record.resolve(), record.resolve() / "copy" / "tree"
        self._cache = self._record / "cache"
        shutil.rmtree(self.tree.parent, ignore_errors=True)
        shutil.copytree(root, self.tree, ignore=NOT_COPIED)
        if (shared := root.resolve().parent / "shared").is_dir():  # golden data of some tests
            (self.tree.parent / "shared").symlink_to(shared)
        _link_cache(self._cache)

    def record(self, arguments: Sequence[str]) -> int:
        """Run tests and write down what they execute; returns pytest's exit status."""
        hooks = self._record / "hooks"
        hooks.mkdir(exist_ok=True)
        shutil.copy(fault_recorder.__file__, hooks)
        (hooks / "sitecustomize.py").write_text("import fault_recorder\n\nfault_recorder.start()\n")
        settings = self._record / "coveragerc"
        settings.write_text(COVERAGE_FILE.format(record=self._record, tree=self.tree))
        env = self._env(hooks) | {
            "COVERAGE_PROCESS_START": str(settings),
            fault_recorder.TESTS: str(self._record / "tests.json"),
        }
        quiet = "-Wignore::pytest.PytestAssertRewriteWarning"  # it is imported by sitecustomize
        command = [*self._pytest(), quiet, "-p", "fault_recorder"]
        status = subprocess.run([*command, *arguments], cwd=self.tree, env=env).returncode
        combine = [sys.executable, "-m", "coverage", "combine", "-q", f"--rcfile={settings}"]
        subprocess.run(combine, cwd=self.tree, check=True)
        return status

    def load(self) -> None:
        """Read what `record` has written."""
        from coverage import CoverageData

        self._tests = json.loads((self._record / "tests.json").read_text())
        data = CoverageData(str(self._record / ".coverage"))
        data.read()
        self._contexts = cache(lambda path: data.contexts_by_lineno(str(self.tree / path)))
        self._built = self._artifacts()

    def tests_of(self, site: Site) -> list[str]:
        """Tests that execute a site, the quickest first, then those that share what it makes.

        The models that tests share are built by `compile` within the first test that asks for one.
        """
        lines = self._contexts(site.path)
        contexts = set(chain.from_iterable(lines.get(line, ()) for line in site.lines))
        direct = self._tests.keys() & contexts
        keys = contexts - self._tests.keys()
        if site.path.startswith("compile/"):
            keys |= {key for test in direct for key in self._tests[test]["fixtures"]}
        sharing = {t for t, test in self._tests.items() if keys & {*test["fixtures"]}} - direct
        return sorted(direct, key=self._seconds) + sorted(sharing, key=self._seconds)

    def run(self, area: str, fault: Fault, site: Site, time_limit: float) -> Result:
        """Seed a fault, and take it out again."""
        path, tests = self.tree / site.path, self.tests_of(site)
        source, started_at = path.read_bytes(), time.monotonic()
        verdict, by = "survived", ""
        if tests:
            site.apply(self.tree)
            try:
                verdict, by = self._judge(tests, time_limit)
                while by in tests and self._judge([by], time_limit)[0] != "caught":
                    # It fails only after others, perhaps without the fault as well
                    tests.remove(by)
                    verdict, by = self._judge(tests, time_limit)
            finally:
                path.write_bytes(source)
                for artifact in self._artifacts() - self._built:
                    shutil.rmtree(artifact, ignore_errors=True)
        seconds = round(time.monotonic() - started_at, 1)
        return Result(area, fault, verdict, by, site.path, site.lines[0], len(tests), seconds)

    def _judge(self, tests: list[str], time_limit: float) -> tuple[str, str]:
        """The verdict, and the test that failed."""
        log = self._record / "pytest.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [*self._pytest(), "-x", *tests], cwd=self.tree, env=self._env(), stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(time_limit)
            except subprocess.TimeoutExpired:
                return "timeout", ""
            finally:
                _kill_group(process)
        if status == 4:  # usage, or conftest.py cannot be imported
            return "broken", ""
        failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - |$)", log.read_text(), re.MULTILINE)
        return ("survived" if status in (0, 5) else "caught"), failed[1] if failed else ""

    def _pytest(self) -> list[str]:
        cache, temporary = self._record / "pytest_cache", self._record / "tmp"
        return [
            sys.executable, "-m", "pytest", "-q", "-ra", f"--rootdir={self.tree}",
            f"--basetemp={temporary}", "-o", f"cache_dir={cache}",
        ]  # fmt: skip

    def _env(self, *folders: Path) -> dict[str, str]:
        """No bytecode: a fault can leave a file's size and time of change as they were."""
        given = map(Path, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
        paths = [*folders, self.tree, *(path for path in given if path.resolve() != ROOT)]
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "SF_LOCAL_CACHE": str(self._cache),
        }

    def _artifacts(self) -> set[Path]:
        return set(self._cache.glob("artifacts/*"))

    def _seconds(self, test: str) -> tuple[float, str]:
        return self._tests[test]["seconds"], test


def _link_cache(cache: Path) -> None:
    """Links to what the user's cache has: faulty artifacts must not lie among them."""
    users = Path(os.environ.get("SF_LOCAL_CACHE", Path.home() / ".cache" / "sf-local"))
    for path in (*users.glob("artifacts/*"), *users.glob("models/*")):
        link = cache / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(path)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """A test process and all that it started, which it has for itself."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Report:
    """Results, printed and written as they come."""

    def __init__(self, out: Path, is_redraw: bool) -> None:
        self._out, self._is_redraw, self._results = out, is_redraw, list[Result]()

    def add(self, result: Result) -> bool:
        """Whether the fault counts: of those that are drawn again, only if it was caught."""
        self._results.append(result)
        print(result.line_of_table(), flush=True)
        kept = [r for r in self._results if r.verdict == "caught" or not self._is_redraw]
        again = [r for r in self._results if r not in kept]
        content = {"faults": [*map(asdict, kept)], "drawn_again": [*map(asdict, again)]}
        self._out.write_text(json.dumps(content, indent=1))
        return result in kept

    def __str__(self) -> str:
        counts = Counter(result.verdict for result in self._results)
        return ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())


def _run(options: argparse.Namespace) -> None:
    suite, report = Suite(options.root, options.record), Report(options.out, options.redraw)
    suite.load()
    sites = find_sites(suite.tree)

    def try_one(area: str, fault: Fault) -> bool:
        site = locate(fault, sites)
        if site is None:
            return report.add(Result(area, fault, "missing"))
        return report.add(suite.run(area, fault, site, options.time_limit))

    if options.faults:
        for entry in json.loads(options.faults.read_text())["faults"]:
            try_one(entry["area"], Fault(**entry["fault"]))
    else:
        others = find_sites(options.also) if options.also else sites
        drawn = {
            fault: site
            for fault, site in sites.items()
            if suite.tests_of(site) and locate(fault, others)
        }
        draw(by_area(drawn), options.number, options.per_area, options.seed, try_one)
    print(report)


def main() -> None:
    parser = argparse.ArgumentParser(description="Seed faults, and see whether tests catch them.")
    commands = parser.add_subparsers(dest="command", required=True)
    record, run = commands.add_parser("record"), commands.add_parser("run")
    for command in (record, run):
        command.add_argument("record", type=Path, help="folder for what `record` finds")
        command.add_argument("--root", type=Path, default=ROOT, help="the tree; by default this")
    run.add_argument("--faults", type=Path, help="take these, draw none")
    run.add_argument("--redraw", action="store_true", help="draw until `number` are caught")
    run.add_argument("--also", type=Path, help="draw only what this tree has as well")
    run.add_argument("--number", type=int, default=40)
    run.add_argument("--per-area", type=int, default=4, help="at least so many in each area")
    run.add_argument("--seed", type=int, default=1)
    run.add_argument("--time-limit", type=float, default=600, help="seconds for a fault")
    run.add_argument("--out", type=Path, default=Path("faults.json"))
    options, arguments = parser.parse_known_args()
    if options.command == "record":
        sys.exit(Suite(options.root, options.record).record(arguments))
    if arguments:
        parser.error(f"unknown arguments: {' '.join(arguments)}")
    _run(options)


if __name__ == "__main__":
    main()
