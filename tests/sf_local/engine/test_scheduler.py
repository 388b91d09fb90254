"""Scheduler with a fake runner, whose pages hold what was really written into them.

Its model is a hash of all tokens so far, so generating one at a time makes a simple oracle.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sf_local.engine.scheduler import MAX_EXAMINED, Limits, Scheduler
from sf_local.kv_cache.page_pool import PagePool
from sf_local.kv_cache.radix_cache import Node, RadixCache
from sf_local.request.batch import Chunk, Step
from sf_local.request.params import ResolvedParams
from sf_local.request.request import Request, RequestStatus

GARBAGE = 0
LIMITS = Limits((1, 3), (1, 4), prefill_tokens=16)


def states(tokens: Sequence[int]) -> list[int]:
    """What a slot holds for each token: it depends on all tokens before it."""
    return list(accumulate(tokens, lambda state, token: hash((state, token)), initial=1))[1:]


def sample(tokens: Sequence[int]) -> int:
    return states(tokens)[-1] % 2


def is_finished(request: Request) -> str | None:
    """The reason, if the tokens so far are a whole answer."""
    tokens = request.tokens(0, request.num_tokens)
    if request.output_ids and not request.params.ignore_eos and states(tokens)[-1] % 37 == 0:
        return "stop"
    return "length" if len(request.output_ids) >= request.max_new_tokens else None


def generate(request: Request) -> Request:
    """The same request, served alone."""
    alone = Request(request.prompt_ids, request.params, request.max_new_tokens)
    while not (reason := is_finished(alone)):
        alone.append(sample(alone.tokens(0, alone.num_tokens)))
    alone.finish_reason = reason
    return alone


def make_request(
    prompt: Sequence[int], max_new_tokens: int, priority: int = 0, *, ignore_eos: bool = True
) -> Request:
    params = ResolvedParams(priority=priority, ignore_eos=ignore_eos)
    return Request(list(prompt), params, max_new_tokens)


class FakeRunner:
    """The engine's loop without a model; `check` proves that every page holds the right tokens."""

    def __init__(self, num_pages: int, page_size: int, limits: Limits = LIMITS) -> None:
        self.pool, self.page_size, self.limits = PagePool(num_pages), page_size, limits
        self.cache = RadixCache(self.pool, page_size)
        self.scheduler = Scheduler(self.pool, self.cache, limits)
        self.contents = [[GARBAGE] * page_size for _ in range(num_pages)]
        self.finished: list[Request] = []
        self.num_computed = Counter[Request]()
        self.logits = defaultdict[Request, set[int]](set)  # positions
        self.num_steps = 0

    def serve(self, *requests: Request) -> None:
        """Add these, and go on until nobody is left."""
        for request in requests:
            self.scheduler.add(request)
        while self.step():
            pass

    def step(self) -> Step:
        step = self.scheduler.next_step()
        self.num_steps += 1
        self.check_step(step)
        for source, destination in step.copies:
            self.contents[destination] = list(self.contents[source])
        self.check()
        for chunks in [*step.prefills, *step.decodes]:
            self.call([c for c in chunks if c.request.status is RequestStatus.RUNNING])
            self.check()
        return step

    def call(self, chunks: Sequence[Chunk]) -> None:
        padded = self.num_slots(max((c.end - c.start for c in chunks), default=0))
        for chunk in chunks:
            self.write(chunk, padded)
        for chunk in chunks:
            assert self.holds(chunk.request.tokens(0, chunk.end), chunk.request.pages)
        for chunk in chunks:
            self.num_computed[chunk.request] += chunk.end - chunk.start
            self.take_logits(chunk)
            self.scheduler.commit([chunk])
            if chunk.end == chunk.request.num_tokens:
                self.sample(chunk.request)

    def write(self, chunk: Chunk, padded: int) -> None:
        """The chunk's tokens, and garbage behind them, as far as the request has pages."""
        slots = states(chunk.request.tokens(0, chunk.end)) + [GARBAGE] * padded
        for position in range(chunk.start, chunk.start + padded):
            index, slot = divmod(position, self.page_size)
            if index < len(chunk.request.pages):
                self.contents[chunk.request.pages[index]][slot] = slots[position]

    def take_logits(self, chunk: Chunk) -> None:
        """Of what is wanted nothing may be missing once the prompt is computed."""
        request, wanted = chunk.request, chunk.request.first_logits
        if wanted is not None:
            assert chunk.end <= wanted or chunk.start >= wanted  # all of a chunk, or nothing
            self.logits[request] |= set(range(chunk.start, chunk.end))
            if chunk.end >= len(request.prompt_ids):
                assert self.logits[request] >= set(range(wanted, len(request.prompt_ids)))
                request.first_logits = None

    def sample(self, request: Request) -> None:
        """A token, and sometimes some that follow from it."""
        for _ in range(1 + self.num_forced()):
            if request.max_new_tokens:
                request.append(sample(request.tokens(0, request.num_tokens)))
            if reason := is_finished(request):
                self.finish(request, reason)
                break

    def num_forced(self) -> int:
        return 0

    def finish(self, request: Request, reason: str) -> None:
        assert request not in self.finished
        self.scheduler.finish(request, reason)
        self.finished.append(request)

    def fail(self, chunks: Sequence[Chunk], *, is_broken: bool) -> None:
        """A failed call, which wrote anything or nothing; a broken device loses all pages."""
        for chunk in chunks:
            self.finish(chunk.request, "abort")
        if is_broken:
            self.contents = [[GARBAGE] * self.page_size for _ in self.contents]
            self.scheduler.reset()

    # What must be true

    def num_slots(self, num_tokens: int) -> int:
        """The slots of the pages that many tokens need."""
        return -(-num_tokens // self.page_size) * self.page_size

    def holds(self, tokens: Sequence[int], pages: Sequence[int]) -> bool:
        slots = [slot for page in pages for slot in self.contents[page]]
        return slots[: len(tokens)] == states(tokens)

    def check_step(self, step: Step) -> None:
        scheduler, limits = self.scheduler, self.limits
        assert bool(step) == bool(scheduler.waiting or scheduler.running)  # no deadlock
        for chunk in [c for group in [*step.prefills, *step.decodes] for c in group]:
            request = chunk.request
            assert request in scheduler.running
            assert request.num_computed == chunk.start < chunk.end <= request.num_tokens
            assert len(request.pages) * self.page_size == self.num_slots(request.num_tokens)
        for group in step.prefills:
            self.check_prefill(group)
        served = Counter(chunk.request for group in step.prefills for chunk in group)
        assert not served or max(served.values()) == 1
        assert bool(step.prefills) == any(not r.is_decoding for r in self.scheduler.running)
        decoding = [chunk.request for group in step.decodes for chunk in group]
        assert decoding == [r for r in scheduler.running if r.is_decoding]
        assert all(len(group) <= limits.decode_batch_sizes[-1] for group in step.decodes)
        assert all(c.end - c.start == 1 for group in step.decodes for c in group)
        destinations = [destination for _, destination in step.copies]
        assert len(set(destinations)) == len(destinations)
        assert all(self.pool.is_locked(page) for page in destinations)

    def check_prefill(self, chunks: Sequence[Chunk]) -> None:
        """The padded call keeps to the budget, unless it is one request in the smallest batch."""
        budget, sizes = self.limits.prefill_tokens, self.limits.prefill_batch_sizes
        if len(self.scheduler.running) + len(self.scheduler.waiting) == 1:
            budget = max(budget, self.limits.alone_tokens)
        lengths = [chunk.end - chunk.start for chunk in chunks]
        rows = min(size for size in sizes if size >= len(chunks))
        assert max(lengths, default=0) <= budget
        assert len(chunks) <= 1 or rows * self.num_slots(max(lengths)) <= budget
        assert not any(chunk.request.is_decoding for chunk in chunks)

    def check(self) -> None:
        self.pool.check_integrity()
        self.cache.check_integrity()
        scheduler = self.scheduler
        assert len(scheduler.running) <= self.limits.max_running
        owners = Counter(page for request in scheduler.running for page in request.pages)
        assert {p for p in range(self.pool.num_pages) if self.pool.is_locked(p)} == owners.keys()
        for request in scheduler.running:
            assert request.status is RequestStatus.RUNNING
            assert self.holds(request.tokens(0, request.num_computed), request.pages)
            still_written = request.pages[request.num_computed // self.page_size :]
            assert all(owners[page] == 1 for page in still_written)
        for node in self.cache._walk():
            tokens, pages = path(node)
            assert self.holds(tokens, pages)
        for requests in (scheduler.waiting, scheduler.running):
            assert requests == sorted(requests, key=lambda r: (-r.params.priority, r.sequence))
        for request in scheduler.waiting:
            assert request.status is RequestStatus.WAITING
            assert not request.pages and request.num_computed == request.num_published == 0

    def check_end(self, requests: Sequence[Request]) -> None:
        """Everybody got the right answer once, and nobody owns a page."""
        assert not self.scheduler.waiting and not self.scheduler.running
        assert len(self.finished) == len(requests) and set(self.finished) == set(requests)
        for request in requests:
            assert request.status is RequestStatus.FINISHED and not request.pages
            alone = generate(request)
            if request.finish_reason == "abort":
                assert request.output_ids == alone.output_ids[: len(request.output_ids)]
            else:
                assert request.output_ids == alone.output_ids
                assert request.finish_reason == alone.finish_reason
                assert request.num_cached is not None
                assert 0 <= request.num_cached < len(request.prompt_ids)
        assert self.pool.num_used == 0
        self.cache.evict(self.pool.num_pages)
        self.check()
        assert self.pool.num_free == self.pool.num_pages - 1


def path(node: Node) -> tuple[list[int], list[int]]:
    """All tokens up to the end of a node, and their pages."""
    tokens, pages = path(node.parent) if node.parent else ([], [])
    return [*tokens, *node.tokens], [*pages, node.page] if node.parent else []


class UnluckyRunner(FakeRunner):
    """Some calls fail, and between two calls requests are cancelled and all pages are lost."""

    chance = random.Random(0)
    failing = losing = cancelling = jumping = 0.0

    def num_forced(self) -> int:
        return self.chance.randint(1, 9) if self.happens(self.jumping) else 0

    def call(self, chunks: Sequence[Chunk]) -> None:
        if chunks and self.happens(self.failing):
            self.fail(chunks, is_broken=self.happens(0.5))
        else:
            super().call(chunks)
        if self.happens(self.losing):
            self.fail([], is_broken=True)
        for request in [*self.scheduler.waiting, *self.scheduler.running]:
            if self.happens(self.cancelling):
                self.finish(request, "abort")

    def happens(self, probability: float) -> bool:
        return self.chance.random() < probability


def random_requests(chance: random.Random, count: int) -> list[Request]:
    """Prompts that share beginnings of any length, one often the whole of another."""
    popular = [chance.choices(range(2), k=24) for _ in range(2)]
    longest_beginning, longest_answer = chance.choice([(4, 40), (12, 20), (24, 4)])
    requests = []
    for _ in range(count):
        beginning = chance.choice(popular)[: chance.randint(0, longest_beginning)]
        prompt = beginning + chance.choices(range(2), k=chance.randint(not beginning, 4))
        request = make_request(
            prompt,
            chance.randint(0, longest_answer),
            chance.choice([0, 0, 0, 1, 2]),
            ignore_eos=chance.random() < 0.5,
        )
        if chance.random() < 0.2:
            request.first_logits = chance.randrange(len(prompt))
        requests.append(request)
    return requests


def check_random_schedule(chance: random.Random, num_requests: int, page_size: int) -> None:
    """Requests come at any time, into a pool that holds the longest of them, and little more."""
    requests = random_requests(chance, num_requests)
    needed = max(-(-(len(r.prompt_ids) + r.max_new_tokens) // page_size) for r in requests)
    limits = Limits(
        chance.choice([(1,), (1, 3), (2, 4)]),
        chance.choice([(1,), (1, 2, 4), (3,)]),
        prefill_tokens=chance.choice([1, 4, 8, 16, 64]),
        alone_tokens=chance.choice([0, 4, 16, 64]),
        max_running=chance.randint(1, 8),
        logits_tokens=page_size * chance.choice([1, 2, 100]),
    )
    runner = UnluckyRunner(1 + needed + chance.choice([0, 0, 1, 2, 4, 20]), page_size, limits)
    runner.chance = chance
    runner.failing = chance.choice([0, 0, 0.03])
    runner.losing = chance.choice([0, 0, 0.03])
    runner.cancelling = chance.choice([0, 0, 0.01])
    runner.jumping = chance.choice([0, 0.1, 0.5])
    coming, arriving = list(requests), chance.choice([0.05, 0.3, 0.9])
    num_tokens = sum(len(r.prompt_ids) + r.max_new_tokens for r in requests)
    while coming or runner.scheduler.waiting or runner.scheduler.running:
        while coming and (not runner.scheduler.running or runner.happens(arriving)):
            runner.scheduler.add(coming.pop(0))
        runner.step()
        assert runner.num_steps <= 10 * num_tokens + 10, "a livelock"
    runner.check_end(requests)


@settings(max_examples=200)
@given(st.randoms(use_true_random=True), st.integers(1, 14), st.integers(1, 4))
def test_random_schedules(chance: random.Random, num_requests: int, page_size: int) -> None:
    check_random_schedule(chance, num_requests, page_size)


@pytest.mark.slow
@settings(max_examples=1000)
@given(st.randoms(use_true_random=True), st.integers(1, 14), st.integers(1, 4))
def test_many_random_schedules(chance: random.Random, num_requests: int, page_size: int) -> None:
    check_random_schedule(chance, num_requests, page_size)


def test_without_requests_there_is_nothing_to_do() -> None:
    step = FakeRunner(2, 4).step()
    assert step == Step() and not step


# Sharing


@pytest.mark.parametrize("shared", [40, 42])
def test_twins_compute_their_prefix_once(shared: int) -> None:
    runner = FakeRunner(200, 4)
    prefix = [i % 7 for i in range(shared)]
    twins = [make_request([*prefix, 10 + i, 20, 21], 5) for i in range(8)]
    runner.serve(*twins)
    assert runner.num_computed.total() == sum(r.num_tokens - 1 for r in twins) - 7 * shared
    assert [r.num_cached for r in twins] == [0] + 7 * [shared]
    runner.check_end(twins)


def test_equal_prompts_compute_their_last_token_only() -> None:
    runner = FakeRunner(200, 4)
    twins = [make_request([i % 7 for i in range(41)], 5) for _ in range(8)]
    runner.serve(*twins)
    assert [r.num_cached for r in twins] == [0] + 7 * [40]
    assert [runner.num_computed[r] for r in twins] == [twins[0].num_tokens - 1] + 7 * [
        len(twins[0].output_ids)
    ]
    runner.check_end(twins)


def test_twins_that_were_made_later_but_came_first() -> None:
    """As where a grammar is compiled before the request is submitted."""
    runner = FakeRunner(80, 4)
    second, first = twins = [make_request([i % 7 for i in range(40)], 5) for _ in range(2)]
    runner.scheduler.add(first)
    runner.step()
    runner.serve(second)
    assert [r.num_cached for r in twins] == [39, 0]
    runner.check_end(twins)


def test_a_twin_cancelled_midway_leaves_what_it_computed() -> None:
    runner = FakeRunner(200, 4)
    twins = [make_request([i % 7 for i in range(40)], 5) for _ in range(4)]
    for request in twins:
        runner.scheduler.add(request)
    runner.step()
    assert runner.scheduler.running == twins[:1]
    runner.finish(twins[0], "abort")
    runner.serve()
    assert [r.num_cached for r in twins] == [0, 16, 39, 39]
    runner.check_end(twins)


def test_no_request_waits_for_a_twin_that_decodes() -> None:
    """Here the last token of the first prompt is left to a decode call."""
    runner = FakeRunner(200, 4)
    first = make_request([i % 7 for i in range(LIMITS.prefill_tokens + 1)], 100)
    second = make_request([*first.prompt_ids, 9], 1)
    runner.scheduler.add(first)
    runner.scheduler.add(second)
    for _ in range(3):
        runner.step()
    assert runner.finished == [second] and second.num_cached == LIMITS.prefill_tokens
    runner.serve()
    runner.check_end([first, second])


def test_no_request_waits_for_what_another_may_generate() -> None:
    runner = FakeRunner(200, 4)
    parent = make_request([1, 2, 3], 40)
    runner.scheduler.add(parent)
    for _ in range(20):
        runner.step()
    child = make_request([1, 2, 3, *parent.output_ids], 1)
    runner.scheduler.add(child)
    for _ in range(2):
        runner.step()
    assert runner.finished == [child]


def test_a_page_that_was_copied_may_be_the_next_to_copy_into() -> None:
    runner = FakeRunner(4, 4)
    warming = [make_request([1, 2, 3], 0), make_request([5, 6, 7], 0)]
    runner.serve(*warming)
    requests = [make_request([1, 2, 9], 1), make_request([5, 6, 9], 1)]
    for request in requests:
        runner.scheduler.add(request)
    first, second = runner.step().copies
    assert second[1] == first[0]
    assert [request.num_cached for request in requests] == [2, 2]
    runner.check_end([*warming, *requests])


def test_a_second_turn_computes_only_what_is_new() -> None:
    runner = FakeRunner(200, 4)
    first = make_request([i % 7 for i in range(21)], 10)
    runner.serve(first)
    second = make_request([*first.prompt_ids, *first.output_ids, 8, 9], 3)
    runner.serve(second)
    assert second.num_cached == first.num_tokens - 1
    runner.check_end([first, second])


def test_no_new_tokens_only_warm_the_cache() -> None:
    runner = FakeRunner(200, 4)
    warming = make_request(range(21), 0)
    runner.serve(warming)
    assert (warming.finish_reason, warming.output_ids) == ("length", [])
    request = make_request(range(21), 1)
    runner.serve(request)
    assert request.num_cached == 20
    runner.check_end([warming, request])


# Order


def test_first_come_first_served_within_a_priority() -> None:
    limits = Limits((1,), (1,), prefill_tokens=16, max_running=1)
    runner = FakeRunner(200, 4, limits)
    requests = [make_request([i, i], 3, priority) for i, priority in enumerate([0, 1, 0, 2, 1])]
    runner.serve(*requests)
    assert runner.finished == [requests[i] for i in (3, 1, 4, 0, 2)]


def test_a_long_prompt_does_not_stop_who_decodes() -> None:
    runner = FakeRunner(400, 4)
    decoding = make_request([3], 60)
    runner.scheduler.add(decoding)
    runner.step()
    long = make_request([i % 7 for i in range(500)], 1, priority=1)
    runner.scheduler.add(long)
    for num_output in range(2, 32):
        step = runner.step()
        assert [chunk.request for chunk in step.prefills[0]] == [long]
        assert len(decoding.output_ids) == num_output
    assert long.num_computed == 30 * LIMITS.prefill_tokens


def test_a_prompt_that_is_alone_has_longer_chunks() -> None:
    runner = FakeRunner(400, 4, Limits((1,), (1,), prefill_tokens=16, alone_tokens=32))
    long, other = make_request([1] * 400, 2), make_request([2] * 8, 2)

    def lengths() -> list[int]:
        return [c.end - c.start for call in runner.step().prefills for c in call]

    runner.scheduler.add(long)
    assert (lengths(), lengths()) == ([32], [32])
    runner.scheduler.add(other)
    while other.status is not RequestStatus.FINISHED:
        assert lengths()[0] == 16
    assert lengths() == [32]
    runner.serve()
    runner.check_end([long, other])


def test_prompts_share_a_call_within_the_budget() -> None:
    runner = FakeRunner(200, 4, Limits((1, 2, 4), (1,), prefill_tokens=16))
    requests = [make_request([i] * length, 2) for i, length in enumerate([6, 7, 3, 3, 4, 2])]
    for request in requests:
        runner.scheduler.add(request)
    assert [c.request for c in runner.step().prefills[0]] == requests[:2]  # 2 rows of 8 slots
    assert [c.request for c in runner.step().prefills[0]] == requests[2:]  # 4 rows of 4


def test_more_than_the_largest_batch_are_all_served_in_each_step() -> None:
    runner = FakeRunner(200, 4)
    requests = [make_request([i], 30) for i in range(10)]
    for request in requests:
        runner.scheduler.add(request)
    for num_output in range(1, 30):
        assert [len(group) for group in runner.step().decodes] == [4, 4, 2]
        assert all(len(request.output_ids) == num_output for request in requests)


def test_the_last_in_rank_makes_room_and_loses_nothing() -> None:
    runner = FakeRunner(9, 4)
    requests = [make_request([i] * 4, 28, priority) for i, priority in enumerate([0, 0, 1])]
    runner.serve(*requests)
    assert runner.scheduler.num_preemptions > 0
    assert runner.finished == [requests[2], requests[0], requests[1]]
    assert runner.num_computed[requests[2]] == 31  # never preempted
    runner.check_end(requests)


def test_nobody_starts_who_would_be_preempted_at_once() -> None:
    runner = FakeRunner(4, 4)
    requests = [make_request([1] * 7, 5), make_request([2], 2)]  # the first needs all 3 pages
    runner.serve(*requests)
    assert runner.finished == requests and runner.scheduler.num_preemptions == 0


# Ends and losses


def test_a_chunk_computed_after_the_end_changes_nothing() -> None:
    runner = FakeRunner(20, 4)
    request = make_request(range(9), 5)
    runner.scheduler.add(request)
    [[chunk]] = runner.scheduler.next_step().prefills
    runner.finish(request, "abort")
    runner.scheduler.commit([chunk])
    assert (request.num_computed, request.pages, len(runner.cache)) == (0, [], 0)


def test_a_second_finish_changes_nothing() -> None:
    runner = FakeRunner(20, 4)
    request = make_request(range(9), 5)
    runner.scheduler.add(request)
    runner.step()
    runner.scheduler.finish(request, "stop")
    runner.scheduler.finish(request, "abort")
    assert (request.finish_reason, runner.pool.num_used) == ("stop", 0)
    assert not runner.step()


def test_finish_frees_running_requests_and_drops_waiting_ones() -> None:
    runner = FakeRunner(20, 4, Limits((1,), (1,), prefill_tokens=4, max_running=1))
    requests = [make_request(range(9), 5) for _ in range(3)]
    for request in requests:
        runner.scheduler.add(request)
    runner.step()
    runner.finish(requests[1], "abort")
    assert runner.scheduler.running == [requests[0]]
    assert runner.scheduler.waiting == [requests[2]]
    runner.finish(requests[0], "abort")
    assert (runner.pool.num_used, runner.pool.num_cached) == (0, 1)
    assert [chunk.request for chunk in runner.step().prefills[0]] == [requests[2]]


def test_after_a_reset_everything_is_computed_again() -> None:
    runner = FakeRunner(40, 4)
    requests = [make_request([i] * 9, 10) for i in range(3)]
    for request in requests:
        runner.scheduler.add(request)
    for _ in range(4):
        runner.step()
    outputs = [list(request.output_ids) for request in requests]
    runner.fail([], is_broken=True)
    assert runner.pool.num_free == 39 and runner.scheduler.waiting == requests
    assert [request.output_ids for request in requests] == outputs and all(outputs)
    runner.serve()
    runner.check_end(requests)


# Many


class BlindRunner(FakeRunner):
    """Checks nothing but answers, for tests that are too large for it."""

    def check(self) -> None:
        pass


def test_many_waiting_twins_do_not_keep_others_out_for_ever() -> None:
    runner = BlindRunner(2000, 4)
    twins = [make_request([i % 7 for i in range(40)], 2) for _ in range(2 * MAX_EXAMINED)]
    other = make_request([5], 2)
    runner.serve(*twins, other)
    runner.check_end([*twins, other])


def test_a_thousand_wait_beside_ten_thousand_cached_pages() -> None:
    runner = BlindRunner(10_500, 1)
    chance = random.Random(0)
    warming = [make_request(chance.choices(range(100), k=102), 0) for _ in range(100)]
    runner.serve(*warming)
    assert len(runner.cache) > 10_000
    requests = [make_request(chance.choices(range(100), k=10), 3) for _ in range(1000)]
    runner.serve(*requests)
    runner.check_end([*warming, *requests])


@pytest.mark.parametrize(
    ("reuse", "prefill_tokens", "starts"),
    [("tokens", 16, [0, 5, 21, 37]), ("pages", 16, [0, 16, 32]), ("nothing", 64, [0])],
)
def test_prefills_start_where_the_model_can(
    reuse: Literal["tokens", "pages", "nothing"], prefill_tokens: int, starts: list[int]
) -> None:
    """Also where the logits of a prompt are wanted from the middle of a page on."""
    limits = Limits((1,), (1,), prefill_tokens, reuse=reuse)
    runner = FakeRunner(20, 4, limits)
    request = make_request(range(40), 1)
    request.first_logits = 5
    runner.scheduler.add(request)
    found = []
    while not found or found[-1].end < 40:
        [[chunk]] = runner.scheduler.next_step().prefills
        runner.scheduler.commit([chunk])
        found.append(chunk)
    assert [chunk.start for chunk in found] == starts


BEHIND = Limits((1, 3), (1, 4), prefill_tokens=256)


def test_a_short_prompt_starts_soon_behind_long_ones() -> None:
    runner = FakeRunner(300, 16, BEHIND)
    longs = [make_request([i] * 2000, 1) for i in range(2)]
    for request in longs:
        runner.scheduler.add(request)
    runner.step()
    short = make_request([9] * 10, 1)
    runner.scheduler.add(short)
    for _ in range(3):
        runner.step()
    assert short.status is RequestStatus.FINISHED
    assert not any(request.output_ids for request in longs)


@pytest.mark.parametrize("length", [10, 200])
def test_a_long_prompt_loses_little_to_those_behind_it(length: int) -> None:
    """However many there are: they get less than a tenth of what it computes."""
    runner = FakeRunner(300, 16, BEHIND)
    long, beside, number = make_request([1] * 2000, 1), 0, 0
    runner.scheduler.add(long)
    while not long.output_ids:
        if len(runner.scheduler.running) < 4:
            number += 1
            runner.scheduler.add(make_request([100 + number] * length, 1))
        step = runner.step()
        [first, *others] = step.prefills
        assert first[0].request is long
        beside += sum(runner.num_slots(c.end - c.start) * 3 for c in first[1:])
        beside += sum(runner.num_slots(c.end - c.start) for call in others for c in call)
    assert runner.num_steps == -(-2000 // 256)
    assert 0 < beside <= 200


def test_more_urgent_prompts_leave_nothing_to_others() -> None:
    runner = FakeRunner(300, 16, BEHIND)
    urgent, short = make_request([1] * 2000, 1, priority=1), make_request([2] * 10, 1)
    runner.scheduler.add(urgent)
    runner.step()
    runner.scheduler.add(short)
    while not urgent.output_ids:
        assert not short.num_computed
        runner.step()


def test_newcomers_with_a_common_prefix_are_not_compared_in_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """64 that share 2,000 cached tokens: what is walked of them grows with their number only."""
    runner = FakeRunner(2200, 16, Limits((1, 3), (1, 4), prefill_tokens=256))
    runner.serve(make_request([1] * 2000, 1))
    for i in range(64):
        runner.scheduler.add(make_request([*[1] * 2000, *[100 + i] * 40], 1))
    walked, keys = [0], Request.keys

    def counting(request: Request, end: int, start: int = 0) -> list[int]:
        found = keys(request, end, start)
        walked[0] += len(found)
        return found

    monkeypatch.setattr(Request, "keys", counting)
    step = runner.scheduler.next_step()
    assert step.prefills and len(runner.scheduler.running) == 64
    assert walked[0] < 5 * 64 * 2040


def test_requests_leave_the_queue_without_a_search() -> None:
    class Queue(list[Request]):
        def remove(self, value: Request) -> None:
            raise AssertionError("looks at all of them")

        index = remove  # type: ignore[assignment]

    runner = FakeRunner(40, 16, BEHIND)
    runner.scheduler.waiting, runner.scheduler.running = Queue(), Queue()
    requests = [make_request([i] * 20, 3, priority=i % 3) for i in range(50)]
    for request in requests:
        runner.scheduler.add(request)
    for request in requests[::2]:
        runner.scheduler.finish(request, "abort")
    while runner.step():
        pass
    assert {r.finish_reason for r in requests[1::2]} == {"length"}
