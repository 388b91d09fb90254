"""`Engine(trace=...)`, judged by the rules of Chrome's format and by what the outputs of the
same requests tell."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sf_local import Engine, Output, SamplingParams
from sf_local.errors import EngineError, RequestError
from tests.support.child import run_program
from tests.support.pictures import picture
from tests.support.running import Runners
from tests.support.tiny import SeeingModel, TinyModel
from tests.tools.count_calls import count_calls

PROMPT = [5, 100, 33, 7, 250, 12]
PARAMS = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
LONG = replace(PARAMS, max_new_tokens=240)
TRACKS = [
    "steps", "queue", "copies", "images", "prefill", "decode", "sampling", "masks", "text", "other",
]  # fmt: skip

Event = dict[str, Any]
Track = tuple[int, int]  # the ids of its process and thread


def read(path: Path, is_closed: bool = True) -> list[Event]:
    """The events of a file; of one that was not closed, by the format's only leave: the closing
    bracket of the array may be missing."""
    text = path.read_text()
    assert text.endswith("\n]\n") is is_closed
    events: list[Event] = json.loads(text if is_closed else text + "]")
    assert text.count("\n") == len(events) + (2 if is_closed else 0), "an event a line"
    check(events)
    return events


def check(events: list[Event]) -> None:
    """What the format says of these events: their fields, and that slices of a thread lie apart or
    inside one another."""
    for event in events:
        assert event["ph"] in "XMCi" and event["name"] and isinstance(event["pid"], int)
        if event["ph"] == "M":
            [(key, value)] = event["args"].items()
            kind = {"name": str, "sort_index": int}[key]
            assert isinstance(value, kind) and event["name"].endswith(("_name", "_sort_index"))
            continue
        assert event["ts"] >= 0 and isinstance(event["tid"], int)
        assert event["ph"] != "X" or event["dur"] > 0
        assert event["ph"] != "i" or event["s"] in "gpt"
        assert event["ph"] != "C" or all(isinstance(v, int) for v in event["args"].values())
    for slices in by_track(events).values():
        ends: list[int] = []
        for begin, end in sorted(map(span, slices), key=lambda s: (s[0], -s[1])):
            while ends and ends[-1] <= begin:
                ends.pop()
            assert not ends or end <= ends[-1], "it ends after the one around it"
            ends.append(end)


def span(event: Event) -> tuple[int, int]:
    """Begin and end in nanoseconds, of which times in microseconds have three digits."""
    begin, length = (round(1000 * event[key]) for key in ("ts", "dur"))
    assert (begin / 1000, length / 1000) == (event["ts"], event["dur"])
    return begin, begin + length


def length(event: Event) -> int:
    begin, end = span(event)
    return end - begin


def by_track(events: list[Event]) -> dict[Track, list[Event]]:
    found: dict[Track, list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            found[event["pid"], event["tid"]].append(event)
    return found


def named(events: list[Event]) -> dict[str, list[Event]]:
    """The slices of each thread, by its name, in order."""
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    tracks = by_track(events)
    assert tracks.keys() <= names.keys()
    return {name: sorted(tracks[track], key=span) for track, name in names.items()}


def requests(events: list[Event]) -> dict[int, list[Event]]:
    """The slices of each request, by its number."""
    tracks = named(events).items()
    return {int(name.split()[1]): own for name, own in tracks if name.startswith("request ")}


def ends(events: list[Event]) -> dict[int, str]:
    """How each request ended."""
    last = [event for event in events if event["ph"] == "i" and "request" in event["args"]]
    assert len({event["args"]["request"] for event in last}) == len(last)
    return {event["args"]["request"]: event["name"] for event in last}


def outputs_of(tiny: TinyModel, path: Path, **options: Any) -> list[Output]:
    """A batch of short and long prompts, forks among them, and grammars."""
    story = [7, *range(20, 150)]
    prompts = [PROMPT, [9, 8], [*story, 5, 6], [*story, 9, 4], [*story[:60], 3], PROMPT, [3]]
    free, drawn = PARAMS, replace(PARAMS, temperature=1.0, seed=3)
    regex = replace(drawn, regex="[a-z ]*", ignore_eos=False)
    params = [free, drawn, free, free, free, regex, replace(free, max_new_tokens=0)]
    with Engine(tiny.artifact, trace=path, **options) as engine:
        return engine.generate(prompts, params)


@pytest.fixture(scope="module")
def traced(
    tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Event], list[Output]]:
    path = tmp_path_factory.mktemp("trace") / "out.json"
    outputs = outputs_of(tiny, path, prefill_tokens=64)
    return read(path), outputs


def test_tracks(traced: tuple[list[Event], list[Output]]) -> None:
    events, outputs = traced
    tracks = named(events)
    assert list(tracks) == [*TRACKS, *(f"request {output.request_id}" for output in outputs)]
    assert [name for name in TRACKS if not tracks[name]] == ["images"]
    processes = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert processes == ["artifact on cpu", "requests of artifact on cpu"]
    for name in TRACKS[1:]:
        assert {event["name"] for event in tracks[name]} <= {name}
    counters = [event["args"] for event in events if event["ph"] == "C"]
    assert len(counters) == len(tracks["steps"])
    assert max(counter["running"] for counter in counters) > 1
    [opened] = [event for event in events if event["name"] == "trace opened"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", opened["args"]["time"])


def test_the_spans_of_a_step_are_all_of_it(traced: tuple[list[Event], list[Output]]) -> None:
    """To the nanosecond: each begins where the one before ends. What the host does meanwhile lies
    beside a call."""
    tracks = named(traced[0])
    every = [event for name in TRACKS[1:] for event in tracks[name]]
    parts = defaultdict(list)
    for event in every:
        if event["cat"] == "step":
            parts[event["args"]["step"]].append(span(event))
    assert [event["args"]["step"] for event in tracks["steps"]] == [*range(len(tracks["steps"]))]
    for step in tracks["steps"]:
        own = sorted(parts.pop(step["args"]["step"]))
        assert sum(end - begin for begin, end in own) == length(step)
        assert (own[0][0], own[-1][1]) == span(step)
        assert all(a[1] == b[0] for a, b in pairwise(own))
    assert not parts
    calls = [span(event) for name in ("prefill", "decode") for event in tracks[name]]
    beside = [event for event in every if event["cat"] == "beside"]
    assert {event["name"] for event in beside} == {"masks", "text"}
    steps = [span(event) for event in tracks["steps"]]
    for event in beside:
        begin, end = span(event)
        is_in_step = any(a <= begin < b for a, b in steps)
        assert any(a <= begin and end <= b for a, b in calls) is is_in_step


def test_requests_are_at_something_from_the_call_to_the_end(
    traced: tuple[list[Event], list[Output]],
) -> None:
    """Times and tokens are those that the outputs tell."""
    events, outputs = traced
    tracks = requests(events)
    assert ends(events) == {output.request_id: output.finish_reason for output in outputs}
    for output in outputs:
        assert output.request_id is not None
        own = tracks[output.request_id]
        assert all(event["args"]["request"] == output.request_id for event in own)
        assert all(span(a)[1] == span(b)[0] for a, b in pairwise(own))
        assert [event["name"] for event in own[:3]] == ["prepare", "queue", "wait"]
        assert own[0]["args"]["prompt_tokens"] == output.prompt_tokens
        assert sum(map(length, own)) / 1e9 >= output.latency
        assert length(own[1]) / 1e9 == pytest.approx(output.queue_time, abs=1e-8)
        computed = [(e["args"]["start"], e["args"]["end"]) for e in own if "start" in e["args"]]
        assert computed[0][0] == output.cached_tokens
        assert all(a[1] == b[0] for a, b in pairwise(computed))
        assert computed[-1][1] >= output.prompt_tokens + max(output.completion_tokens - 1, 0)
    long = tracks[2]
    assert [e["name"] for e in long if e["name"] != "wait"][2:5] == ["prefill"] * 3  # chunks


def test_calls_are_those_of_their_requests(traced: tuple[list[Event], list[Output]]) -> None:
    tracks = named(traced[0])
    for name in ("prefill", "decode"):
        of_requests = defaultdict(set)
        for number, own in requests(traced[0]).items():
            for event in own:
                if event["name"] == name:
                    of_requests[span(event)[0]].add(number)
        of_calls = [event["args"]["requests"] for event in tracks[name]]
        assert [of_requests[begin] for begin in sorted(of_requests)] == [*map(set, of_calls)]


def test_images(make_seeing: Callable[..., SeeingModel], tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    with Engine(make_seeing("idefics3").artifact, trace=path) as engine:
        engine.generate(f"{engine.image_token}a", PARAMS, images=[picture(20, 20)])
    events = read(path)
    encoded = named(events)["images"]
    assert encoded and all(event["args"]["tiles"] >= 1 for event in encoded)
    shown = [event for event in requests(events)[0] if event["name"] == "images"]
    assert len(shown) == len(encoded)


def test_other_ends(tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timeouts, cancelled and failed requests, preempted ones, and those that closing ends."""
    path, runners = tmp_path / "out.json", Runners()
    with Engine(tiny.artifact, kv_pages=34, trace=path, _make_runner=runners) as engine:
        engine.generate(PROMPT, replace(PARAMS, timeout=0.0))
        handle = engine.submit(PROMPT, LONG)
        next(handle.deltas())  # which is dropped
        assert handle.result().finish_reason == "abort"
        decode = runners[0].decode

        async def fail(*_: Any) -> Any:
            monkeypatch.setattr(runners[0], "decode", decode)
            raise RuntimeError("injected")

        monkeypatch.setattr(runners[0], "decode", fail)
        with pytest.raises(EngineError):
            engine.generate(PROMPT, PARAMS)
        handles = [engine.submit([*PROMPT, i], replace(LONG, max_new_tokens=150)) for i in (1, 2)]
        for handle in handles:
            handle.result()
        assert engine.stats()["preemptions"]
        last = engine.submit(PROMPT, LONG)
    with pytest.raises(EngineError):
        last.result()
    events = read(path)
    assert ends(events) == {
        0: "timeout", 1: "abort", 2: "error", 3: "length", 4: "length", 5: "error"
    }  # fmt: skip
    tracks = requests(events)
    assert [event["name"] for event in tracks[0]] == ["prepare", "queue"]
    assert "preempted" in {event["name"] for event in tracks[3] + tracks[4]}
    for own in tracks.values():
        assert all(span(a)[1] == span(b)[0] for a, b in pairwise(own))


def test_replicas(tiny: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    with Engine(tiny.artifact, ["cpu", "cpu"], kv_pages=40, trace=path) as engine:
        engine.generate([[i, 2, 3] for i in range(40)], PARAMS)
    events = read(path)
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert len(names) == len(set(names.values())) == 4
    assert {e["pid"] for e in events if e["ph"] == "X"} == set(names)


KILLED = """
import os, signal, sys
from sf_local import Engine, SamplingParams
engine = Engine(sys.argv[1], trace=sys.argv[2])
stream = engine.stream([5, 6], SamplingParams(max_new_tokens=240, temperature=0, ignore_eos=True))
for _ in zip(range(3), stream):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_its_steps(tiny: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    done = subprocess.run([sys.executable, "-c", KILLED, tiny.artifact, path], timeout=100)
    assert done.returncode == -signal.SIGKILL
    tracks = named(read(path, is_closed=False))
    assert len(tracks["decode"]) >= 3 and tracks["request 0"]
    with Engine(tiny.artifact, trace=path) as engine:  # which may be written over
        engine.generate(PROMPT, PARAMS)
    assert len(named(read(path))["decode"]) == 11


def test_a_full_disk(tiny: TinyModel, tmp_path: Path) -> None:
    """A limit of the file's size stands for it: a write is cut short, and the next one fails."""
    program = """
import logging, os, resource, sys
from sf_local import Engine, SamplingParams
logging.basicConfig(stream=sys.stdout, format="%(message)s")
params = SamplingParams(max_new_tokens=100, temperature=0, ignore_eos=True)
with Engine(sys.argv[1], trace=sys.argv[2]) as engine:
    expected = engine.generate([5, 6], params).token_ids
    limit = os.path.getsize(sys.argv[2]) + 10_001
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    print(engine.generate([5, 6], params).token_ids == expected)
    print(engine.generate([5, 6], params).token_ids == expected)
print(limit)
"""
    path = tmp_path / "out.json"
    line, *same, limit = run_program(program, tiny.artifact, path).splitlines()
    assert line.startswith(f"trace='{path}': [Errno 27]") and same == ["True", "True"]
    assert int(limit) - 3_000 < path.stat().st_size <= int(limit)
    assert len(named(read(path, is_closed=False))["decode"]) > 100


def test_no_room_at_all(tiny: TinyModel, tmp_path: Path) -> None:
    program = """
import resource, sys
from sf_local import Engine
resource.setrlimit(resource.RLIMIT_FSIZE, (5, -1))
try:
    Engine(sys.argv[1], trace=sys.argv[2])
except Exception as error:
    print(error)
"""
    told = run_program(program, tiny.artifact, tmp_path / "out.json")
    assert "cannot be written: [Errno 27]" in told and "has room" in told


def paths(folder: Path) -> Iterator[tuple[Any, str]]:
    yield folder, "Is a directory.*give a file in a folder that exists"
    yield folder / "none" / "out.json", "No such file.*give a file in a folder that exists"
    yield "", "trace='' cannot be written"
    yield "a\0b", "cannot be written: embedded null"
    yield 1, "trace=1 must be the path of a file, or None"
    yield True, "trace=True must be"
    yield "/dev/null", "is no regular file"


def test_paths_that_are_refused(tiny: TinyModel, tmp_path: Path) -> None:
    for path, message in paths(tmp_path):
        with pytest.raises(RequestError, match=message):
            Engine(tiny.artifact, trace=path)
    assert not list(tmp_path.iterdir())
    other = tmp_path / "weights.gguf"
    other.write_text("GGUF")
    with pytest.raises(RequestError, match="is no trace, so it is not overwritten; delete it"):
        Engine(tiny.artifact, trace=str(other))
    assert other.read_text() == "GGUF"


def test_a_file_is_of_one_engine(tiny: TinyModel, tmp_path: Path) -> None:
    """Until that is closed, whatever names the file, and in other processes as well."""
    path, link = tmp_path / "out.json", tmp_path / "link.json"
    link.symlink_to(path)
    with Engine(tiny.artifact, trace=path) as engine:
        for name in (path, link):
            with pytest.raises(RequestError, match="is written by another engine; give each"):
                Engine(tiny.artifact, trace=name)
        engine.generate(PROMPT, PARAMS)
    assert len(named(read(path))["decode"]) == 11
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process would
        with pytest.raises(RequestError, match="is written by another engine"):
            Engine(tiny.artifact, trace=path)
    with pytest.raises(RequestError, match="kv_pages=0"):
        Engine(tiny.artifact, kv_pages=0, trace=path)
    with Engine(tiny.artifact, trace=link):
        pass


def test_an_engine_that_does_not_start(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves the file to the next one, though somebody keeps the error."""
    path = tmp_path / "out.json"

    def make_runner(*_: Any) -> Any:
        raise RuntimeError("injected")

    with pytest.raises(Exception, match="injected") as raised:
        Engine(tiny.artifact, trace=path, _make_runner=make_runner)
    read(path)
    Engine(tiny.artifact, trace=path).shutdown()
    assert raised.value.__traceback__ is not None


def test_closing(tiny: TinyModel, tmp_path: Path) -> None:
    """By hand, twice; by dropping the engine; and at the end of a program."""
    path = tmp_path / "out.json"
    engine = Engine(tiny.artifact, trace=path)
    for _ in range(2):
        engine.shutdown()
    read(path)
    engine = Engine(tiny.artifact, trace=path)
    engine.generate(PROMPT, PARAMS)
    del engine
    deadline = time.monotonic() + 60
    while not path.read_text().endswith("]\n") and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert len(named(read(path))["decode"]) == 11
    program = """
import sys
from sf_local import Engine, SamplingParams
engine = Engine(sys.argv[1], trace=sys.argv[2])
handle = engine.submit([5, 6], SamplingParams(max_new_tokens=240, ignore_eos=True))
next(iter(handle))
"""
    run_program(program, tiny.artifact, path)
    assert ends(read(path)) in ({0: "error"}, {0: "abort"})


def test_a_forked_child(tiny: TinyModel, tmp_path: Path) -> None:
    """It neither writes to its parent's file, nor closes it, nor keeps it locked."""
    program = """
import os, sys, time, signal
from sf_local import Engine, SamplingParams
from sf_local.errors import RequestError
artifact, path = sys.argv[1:]
params = SamplingParams(max_new_tokens=200, temperature=0, ignore_eos=True)
engine = Engine(artifact, trace=path)
handle = engine.submit([5, 6], params)
next(iter(handle.deltas()))
child = os.fork()
if child == 0:
    signal.alarm(60)
    engine.shutdown()
    try:
        Engine(artifact, trace=path)
    except RequestError as error:
        assert "another engine" in str(error)
    with Engine(artifact, trace=path + ".child") as own:
        own.generate([5, 6], params)
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
engine.generate([5, 6], params)
child = os.fork()
if child == 0:
    time.sleep(60)
engine.shutdown()
Engine(artifact, trace=path + ".again").shutdown()
os.rename(path, path + ".first")
Engine(artifact, trace=path).shutdown()
os.link(path + ".first", path + ".same")
Engine(artifact, trace=path + ".same").shutdown()
os.kill(child, signal.SIGKILL)
"""
    path = tmp_path / "out.json"
    assert run_program(program, tiny.artifact, path) == "7\n"
    for name in (path, path.with_name("out.json.child"), path.with_name("out.json.same")):
        read(name)
    assert len(named(read(path.with_name("out.json.child")))["decode"]) == 199


def test_nothing_is_called_without_a_trace(tiny: TinyModel) -> None:
    calls = count_calls(tiny.artifact, rows=4, steps=20)
    assert not [name for name, *_ in calls.by_function() if "trac" in name]


def test_a_handle_of_os_is_not_left_open(tiny: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    Engine(tiny.artifact, trace=path).shutdown()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        Engine(tiny.artifact, trace=path).shutdown()
        with pytest.raises(RequestError):
            Engine(tiny.artifact, trace=tmp_path)
    assert len(os.listdir("/proc/self/fd")) <= before
