"""Records which test executes which line: a plugin of pytest, and the start of every process.

`sitecustomize` calls `start` in pytest's process and in all subprocesses, so this module stands
alone and imports little. The contexts of coverage are the tests' ids; what runs in a fixture that
several tests share has the fixture's key as its context.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import pluggy

CONTEXT, TESTS = "SEEDED_FAULTS_CONTEXT", "SEEDED_FAULTS_TESTS"  # environment variables
hookimpl = pluggy.HookimplMarker("pytest")

_seconds: dict[str, float] = defaultdict(float)  # by test
_fixtures: dict[str, list[str]] = {}  # keys of the shared ones, by test
_passed: set[str] = set()
_failed: set[str] = set()


def start() -> None:
    """Measure this process, in the context that its parent is in."""
    import coverage
    import wrapt

    coverage.process_startup()  # None where coverage's own .pth file was first
    if coverage.Coverage.current() is not None:
        _switch(os.environ.get(CONTEXT, ""))
        for name in ("sf_local.device", "sf_local.device.device"):
            wrapt.register_post_import_hook(_trace_workers, name)


def _trace_workers(module: Any) -> None:
    """Python's threads are traced from their start; shortfin's must be told to be."""
    if not hasattr(module, "Device"):
        return
    run = module.Device.run

    def traced(self: Any, coroutine: Any) -> None:
        self.worker.call_threadsafe(lambda: sys.settrace(threading.gettrace()))
        run(self, coroutine)

    module.Device.run = traced


def _switch(context: str) -> None:
    import coverage

    os.environ[CONTEXT] = context
    current = coverage.Coverage.current()
    if current is not None:
        current.switch_context(context)


@hookimpl(wrapper=True)
def pytest_runtest_protocol(item: Any) -> Any:
    definitions = (d for found in item._fixtureinfo.name2fixturedefs.values() for d in found)
    _fixtures[item.nodeid] = [_key(d) for d in definitions if d.scope != "function"]
    _switch(item.nodeid)
    try:
        return (yield)
    finally:
        _switch("")


@hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any) -> Any:
    if fixturedef.scope == "function":
        return (yield)
    before = os.environ[CONTEXT]
    _switch(_key(fixturedef))
    try:
        return (yield)
    finally:
        _switch(before)


def pytest_runtest_logreport(report: Any) -> None:
    _seconds[report.nodeid] += report.duration
    if report.failed:
        _failed.add(report.nodeid)
    elif report.passed and report.when == "call":
        _passed.add(report.nodeid)


@hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended; it knows the fixtures of its tests."""
    _fixtures.update(node.workeroutput.get("fixtures", {}))


def pytest_sessionfinish(session: Any) -> None:
    """Only tests that passed are kept: the others can catch nothing."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        import coverage

        output["fixtures"] = _fixtures
        if current := coverage.Coverage.current():
            current.save()  # the worker may be stopped before it exits
        return
    tests = {
        test: {"seconds": round(_seconds[test], 3), "fixtures": _fixtures[test]}
        for test in sorted(_passed - _failed)
    }
    Path(os.environ[TESTS]).write_text(json.dumps(tests, indent=1))


def _key(fixture: Any) -> str:
    return f"fixture {fixture.baseid}::{fixture.argname}"
