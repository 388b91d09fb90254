"""Scheduler driven by a fake runner, which records what it was told to compute."""

import random
from collections import defaultdict

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sf_local.page_pool import PagePool
from sf_local.request import Request, RequestStatus, SamplingParams
from sf_local.scheduler import MAX_CHUNK, Scheduler, Step


def make_request(prompt_len: int, max_new_tokens: int) -> Request:
    return Request(list(range(prompt_len)), SamplingParams(), max_new_tokens)


class FakeRunner:
    """The engine's loop without a model: every sampled token is the length so far."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.pool = PagePool(num_pages)
        self.scheduler = Scheduler(self.pool, page_size)
        self.finished: list[Request] = []
        self.computed: dict[Request, list[tuple[int, int]]] = defaultdict(list)

    def step(self) -> bool:
        step = self.scheduler.next_step()
        if step is None:
            return False
        self.check(step)
        request = step.request
        self.computed[request].append((step.start, step.end))
        request.num_computed = step.end
        if step.samples:
            request.output_ids.append(request.num_tokens)
            if len(request.output_ids) >= request.max_new_tokens:
                self.finish(request, "length")
        return True

    def finish(self, request: Request, reason: str) -> None:
        self.scheduler.finish(request, reason)
        self.finished.append(request)
        self.pool.check_integrity()

    def check(self, step: Step) -> None:
        request = step.request
        assert request.status is RequestStatus.RUNNING and request is self.scheduler.running
        assert step.start == request.num_computed < step.end <= request.num_tokens
        assert step.end - step.start <= MAX_CHUNK
        assert step.is_decode == bool(request.output_ids)
        assert len(request.pages) == -(-step.end // self.scheduler.page_size)
        assert len(set(request.pages)) == len(request.pages) and 0 not in request.pages
        self.pool.check_integrity()
        assert self.pool.num_free == self.pool.num_pages - 1 - len(request.pages)


def pages_for(shapes: list[tuple[int, int]], page_size: int) -> int:
    """Pages of the longest request, and page 0."""
    return 1 + max(-(-(prompt + new) // page_size) for prompt, new in shapes)


lengths = st.one_of(st.integers(1, 40), st.integers(MAX_CHUNK - 2, 3 * MAX_CHUNK))
shapes_of_requests = st.lists(st.tuples(lengths, st.integers(1, 20)), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(shapes_of_requests, st.sampled_from([1, 8, 16]))
@example([(MAX_CHUNK, 1), (MAX_CHUNK + 1, 2), (2 * MAX_CHUNK, 3)], 16)
def test_all_requests_finish_once_in_order(shapes: list[tuple[int, int]], page_size: int) -> None:
    runner = FakeRunner(pages_for(shapes, page_size), page_size)
    requests = [make_request(*shape) for shape in shapes]
    for request in requests:
        runner.scheduler.add(request)
    while runner.step():
        pass
    assert runner.finished == requests
    assert runner.pool.num_free == runner.pool.num_pages - 1
    for request in requests:
        steps = runner.computed[request]
        bounds = [0, *(end for _, end in steps)]
        assert [start for start, _ in steps] == bounds[:-1]  # no gap, no overlap
        assert bounds[-1] == request.num_tokens - 1  # the last token needs no computation
        assert len(request.output_ids) == request.max_new_tokens
        assert (request.status, request.finish_reason) == (RequestStatus.FINISHED, "length")
        assert request.pages == []


@settings(max_examples=200, deadline=None)
@given(shapes_of_requests, st.randoms(use_true_random=False))
def test_requests_come_and_go_at_any_time(
    shapes: list[tuple[int, int]], chance: random.Random
) -> None:
    runner = FakeRunner(pages_for(shapes, 8), 8)
    requests = [make_request(*shape) for shape in shapes]
    coming, alive = requests[:], list[Request]()
    while coming or runner.scheduler.waiting or runner.scheduler.running:
        if coming and chance.random() < 0.3:
            alive.append(coming.pop(0))
            runner.scheduler.add(alive[-1])
        alive = [request for request in alive if request.status is not RequestStatus.FINISHED]
        if alive and chance.random() < 0.1:
            runner.finish(chance.choice(alive), "abort")
        runner.step()
    assert len(runner.finished) == len(requests) and set(runner.finished) == set(requests)
    assert runner.pool.num_free == runner.pool.num_pages - 1
    ended = [request for request in runner.finished if request.finish_reason == "length"]
    assert ended == [request for request in requests if request in ended]
    for request in ended:
        assert len(request.output_ids) == request.max_new_tokens


def test_without_requests_there_is_nothing_to_do() -> None:
    assert Scheduler(PagePool(2), 8).next_step() is None


def test_a_second_finish_changes_nothing() -> None:
    runner = FakeRunner(10, 8)
    first, second = make_request(20, 5), make_request(3, 5)
    runner.scheduler.add(first)
    runner.scheduler.add(second)
    runner.step()
    runner.scheduler.finish(first, "stop")
    runner.scheduler.finish(first, "abort")
    assert (first.finish_reason, runner.pool.num_free) == ("stop", 9)
    runner.step()
    assert runner.scheduler.running is second


def test_finish_frees_a_running_request_and_drops_a_waiting_one() -> None:
    runner = FakeRunner(10, 8)
    requests = [make_request(20, 5) for _ in range(3)]
    for request in requests:
        runner.scheduler.add(request)
    runner.step()
    runner.scheduler.finish(requests[1], "abort")
    assert runner.scheduler.running is requests[0]
    assert list(runner.scheduler.waiting) == [requests[2]]
    assert runner.pool.num_free == 6
    runner.scheduler.finish(requests[0], "abort")
    assert runner.pool.num_free == 9
    step = runner.scheduler.next_step()
    assert step is not None and step.request is requests[2]


@pytest.mark.parametrize(
    ("prompt_len", "output", "step", "is_decode", "samples"),
    [
        (5, [], (0, 5), False, True),
        (5, [], (0, 3), False, False),
        (5, [9], (5, 6), True, True),
        (5, [9], (4, 6), False, True),  # a prompt's end and an answer, computed once more
    ],
)
def test_step_knows_what_it_is(
    prompt_len: int, output: list[int], step: tuple[int, int], is_decode: bool, samples: bool
) -> None:
    request = make_request(prompt_len, 10)
    request.output_ids += output
    assert Step(request, *step).is_decode is is_decode
    assert Step(request, *step).samples is samples
