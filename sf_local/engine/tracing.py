"""Trace: what one device does when, and what becomes of each of its requests, as slices of time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sf_local.engine.generation import Generation
from sf_local.engine.trace_file import Event, TraceFile
from sf_local.request.batch import Chunk
from sf_local.request.request import Request

STEPS = "steps"
CALLS = ("images", "prefill", "decode")  # parts in which the device computes, and the host beside
PARTS = ("queue", "copies", *CALLS, "sampling", "masks", "text", "other")
TRACKS = {name: number for number, name in enumerate((STEPS, *PARTS), 1)}
IN_STEP, BESIDE, REQUEST = "step", "beside", "request"  # categories of slices


@dataclass
class _Track:
    """A request's row of slices: what it does now, since when, and what is to be told of that."""

    number: int
    name: str
    since: int
    args: dict[str, Any]
    num_computed: int = 0


class Trace:
    """The slices of one device, in nanoseconds since the file was opened.

    A step is always at one of PARTS, so that the slices of these, of category "step", add up to it.
    What the host does while the device computes, and between two steps, has the category "beside".
    A request is always at something as well, from the call of the engine to its end.

    All is called on the device's thread, but `end` and "text", which another may call once that one
    has ended or waits for a lost device.

    number: of the device in its engine, from 0 on. name: what the device's tracks are headed with.
    """

    def __init__(self, file: TraceFile, number: int, name: str) -> None:
        self._file = file
        self._pid, self._requests_pid = 2 * number + 1, 2 * number + 2
        self._parts: list[tuple[str, dict[str, Any]]] = []  # of a step, each inside the one before
        self._slices: list[Event] = []  # of the step under way
        self._since = self._step_began = self._num_steps = 0
        self._requests: dict[Request, _Track] = {}
        self._name_process(self._pid, name)
        self._name_process(self._requests_pid, f"requests of {name}")
        for track, tid in TRACKS.items():
            self._name_thread(self._pid, tid, track)

    # Steps

    def begin_step(self, started_at: float) -> None:
        """A step began at this `time.perf_counter()`; it is at "queue"."""
        self._since = self._step_began = self._time(started_at)
        self._parts = [("queue", {})]

    def end_step(self, is_kept: bool, running: int, waiting: int) -> None:
        """The step ended with so many requests. is_kept: whether it computed anything; else its
        slices are dropped."""
        self._cut()
        self._parts = []
        slices, self._slices = self._slices, []
        if is_kept:
            for event in slices:
                self._file.add(event)
            args = {"step": self._num_steps}
            self._add(TRACKS[STEPS], "step", STEPS, self._step_began, self._since, args)
            self._file.add(
                {"name": "requests", "ph": "C", "pid": self._pid, "tid": TRACKS[STEPS],
                 "ts": self._since / 1000, "args": {"running": running, "waiting": waiting}}
            )  # fmt: skip
            self._num_steps += 1
        self._file.flush()

    def becomes(self, part: str) -> None:
        """The step is at another part from here on."""
        self._cut()
        self._parts[-1] = part, {}

    @contextmanager
    def part(self, name: str, **args: Any) -> Iterator[None]:
        """The block is this part of a step. args: what the slice tells."""
        if not self._parts or self._parts[-1][0] in CALLS:
            began = self._now()
            try:
                yield
            finally:
                self._add(TRACKS[name], name, BESIDE, began, self._now(), args)
            return
        self._cut()
        self._parts.append((name, args))
        try:
            yield
        finally:
            self._cut()
            self._parts.pop()

    def _cut(self) -> None:
        """End the slice of the part that the step is at."""
        now, (name, args) = self._now(), self._parts[-1]
        if now > self._since:
            args = {"step": self._num_steps, **args}
            event = _slice(self._pid, TRACKS[name], name, IN_STEP, self._since, now, args)
            self._slices.append(event)
        self._since = now

    # Requests

    def add(self, generation: Generation) -> None:
        """A request came; it was prepared from `started_at` on, and waits since `ready_at`."""
        request = generation.request
        args = {"prompt_tokens": len(request.prompt_ids)}
        track = _Track(request.sequence, "prepare", self._time(generation.started_at), args)
        self._requests[request] = track
        self._name_thread(self._requests_pid, track.number + 1, f"request {track.number}")
        self._enter(track, "queue", self._time(generation.ready_at))

    @contextmanager
    def call(self, name: str, chunks: Sequence[Chunk], **args: Any) -> Iterator[None]:
        """The block is a call of the model, of CALLS, that computes these chunks."""
        began = self._now()
        for chunk in chunks:
            self._begin_call(name, chunk, began)
        numbers = [chunk.request.sequence for chunk in chunks]
        try:
            with self.part(name, requests=numbers, **args):
                yield
        finally:
            ended = self._now()
            for chunk in chunks:
                if (track := self._requests.get(chunk.request)) is not None:
                    self._enter(track, "wait", ended)

    def _begin_call(self, name: str, chunk: Chunk, began: int) -> None:
        track = self._requests.get(chunk.request)
        if track is None:
            return
        self._settle(track, chunk.request)
        if chunk.start < track.num_computed:  # its pages were taken, and it computes again
            track.name = "preempted"
        self._enter(track, name, began, start=chunk.start, end=chunk.end)
        if name != "images":
            track.num_computed = chunk.end

    def end(self, request: Request, reason: str) -> None:
        """A request ended; nothing if it is not known, or has ended before."""
        track = self._requests.pop(request, None)
        if track is None:
            return
        self._settle(track, request)
        now = self._now()
        self._enter(track, "ended", now)
        args = {
            "request": track.number, "prompt_tokens": len(request.prompt_ids),
            "cached_tokens": request.num_cached or 0, "completion_tokens": len(request.output_ids),
        }  # fmt: skip
        self._file.add(
            {"name": reason, "ph": "i", "s": "t", "pid": self._requests_pid,
             "tid": track.number + 1, "ts": now / 1000, "args": args}
        )  # fmt: skip

    def _settle(self, track: _Track, request: Request) -> None:
        """It waits no longer in the queue if the scheduler has taken it."""
        if track.name == "queue" and request.scheduled_at is not None:
            self._enter(track, "wait", self._time(request.scheduled_at))

    def _enter(self, track: _Track, name: str, at: int, **args: Any) -> None:
        """End the slice of what a request did, and begin another."""
        if at > track.since:
            told = {"request": track.number, **track.args}
            event = _slice(
                self._requests_pid, track.number + 1, track.name, REQUEST, track.since, at, told
            )
            self._file.add(event)
        track.name, track.since, track.args = name, at, args

    # Events

    def _now(self) -> int:
        return self._time(time.perf_counter())

    def _time(self, seconds: float) -> int:
        return round((seconds - self._file.opened_at) * 1e9)

    def _add(
        self, tid: int, name: str, category: str, began: int, ended: int, args: dict[str, Any]
    ) -> None:
        self._file.add(_slice(self._pid, tid, name, category, began, ended, args))

    def _name_process(self, pid: int, name: str) -> None:
        self._file.add({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}})
        index = {"sort_index": pid}
        self._file.add({"name": "process_sort_index", "ph": "M", "pid": pid, "args": index})

    def _name_thread(self, pid: int, tid: int, name: str) -> None:
        place = {"ph": "M", "pid": pid, "tid": tid}
        self._file.add({"name": "thread_name", **place, "args": {"name": name}})
        self._file.add({"name": "thread_sort_index", **place, "args": {"sort_index": tid}})


def _slice(
    pid: int, tid: int, name: str, category: str, began: int, ended: int, args: dict[str, Any]
) -> Event:
    """A complete event; its times are in microseconds, with three digits behind the point."""
    return {
        "name": name, "cat": category, "ph": "X", "pid": pid, "tid": tid, "ts": began / 1000,
        "dur": (ended - began) / 1000, "args": args,
    }  # fmt: skip
