"""Prefill-only and decode workers: what the scheduler does for each, and both together."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import DuplicateRequestError, EngineError, InvalidRequestError
from engine.execution.forward_batch import ForwardMode
from engine.scheduler.req import FinishReason, Req
from engine.scheduler.role import SchedulerRole
from engine.types import RequestId
from tests.engine.scheduler.handover import FakeDecodeRole, FakePrefillRole, Pair
from tests.engine.scheduler.stub import VOCAB, Engine, make_req, undisturbed

A = RequestId("a")


def prefill_engine(**settings_: int) -> tuple[Engine, FakePrefillRole]:
    role = FakePrefillRole()
    return Engine(role=role, **settings_), role  # type: ignore[arg-type]


def test_a_prefill_worker_draws_the_first_token_and_hands_over() -> None:
    engine, role = prefill_engine()
    req = make_req("a", [1] * 40, max_new_tokens=9)
    engine.add(req)
    for _ in range(5):
        engine.step()
    assert engine.tokens("a") == undisturbed(req)[:1]
    assert engine.modes == [ForwardMode.EXTEND] * 3
    assert role.extends == [("a", 16, False), ("a", 32, False), ("a", 40, True)]
    assert engine.scheduler.transferring == {"a": req}
    assert engine.scheduler.page_counts().in_use == 10
    assert engine.scheduler.request_pages(req) == req.pages
    assert not engine.released

    role.sending.clear()
    engine.scheduler.release_request(req)
    engine.drain()
    assert engine.released == ["a"]
    counts = engine.scheduler.page_counts()
    assert (counts.cached, counts.in_use) == (10, 0)
    engine.scheduler.release_request(req)  # once more is nothing


def test_a_first_token_that_ends_the_request_keeps_the_pages_while_they_are_read() -> None:
    engine, role = prefill_engine()
    req = make_req("a", [1] * 8, max_new_tokens=1)
    engine.add(req)
    engine.step()
    assert engine.outputs["a"][0].finish_reason is FinishReason.LENGTH
    assert not engine.scheduler.transferring
    counts = engine.scheduler.page_counts()
    assert (counts.held, counts.in_use) == (2, 0)
    assert engine.scheduler.row_counts().in_use == 0
    role.sending.clear()
    engine.scheduler.release_request(req)
    assert engine.scheduler.page_counts().held == 0


def test_an_aborted_transfer_holds_its_pages_until_nobody_reads_them() -> None:
    engine, role = prefill_engine(pages=10, page_size=4)
    req = make_req("a", [1] * 20, max_new_tokens=9)
    engine.add(req)
    for _ in range(3):
        engine.step()
    assert engine.scheduler.abort_request(A)
    engine.step()
    assert engine.scheduler.page_counts().held == 5
    assert engine.memory.available_tokens() == 20
    # Another one may come, and what is held is not for it to take.
    engine.add(make_req("b", [2] * 16, max_new_tokens=9))
    engine.step()
    assert engine.scheduler.page_counts().held == 5
    del role.sending[A]
    engine.scheduler.release_request(req)
    engine.step()
    assert engine.scheduler.page_counts().held == 0


def test_a_transfer_that_is_over_before_its_abort_is_settled_leaves_nothing() -> None:
    engine, role = prefill_engine()
    req = make_req("a", [1] * 40)
    engine.add(req)
    engine.step()
    engine.scheduler.abort_request(A)
    role.sending.clear()
    engine.scheduler.release_request(req)
    engine.drain()
    assert engine.released == ["a"]


@pytest.mark.parametrize("length", [8, 40])
def test_a_role_may_abort_from_within_its_hook(length: int) -> None:
    class Fussy(FakePrefillRole):
        def on_extend_result(
            self, req: Req, *, prompt_done: bool, token: int | None, logprob: float | None
        ) -> None:
            self.scheduler.abort_request(req.rid)

    engine = Engine(role=Fussy())
    engine.add(make_req("a", [1] * length))
    engine.drain()
    assert engine.aborted == engine.released == ["a"]
    assert not engine.scheduler.transferring


def test_a_role_may_abort_the_others_of_a_batch_from_within_its_hook() -> None:
    class Jealous(SchedulerRole):
        def on_extend_result(
            self, req: Req, *, prompt_done: bool, token: int | None, logprob: float | None
        ) -> None:
            for other in "abc":
                if other != req.rid:
                    self.scheduler.abort_request(RequestId(other))

    engine = Engine(role=Jealous())
    engine.add(make_req("a", [1] * 4), make_req("b", [2] * 4), make_req("c", [3] * 4))
    engine.drain()
    assert sorted(engine.aborted) == ["b", "c"]
    assert list(engine.outputs) == ["a"]
    assert sorted(engine.released) == ["a", "b", "c"]


def test_a_request_that_runs_cannot_be_released() -> None:
    engine = Engine()
    req = make_req("a", [1] * 8)
    engine.add(req)
    engine.step()
    with pytest.raises(EngineError, match="RUNNING"):
        engine.scheduler.release_request(req)


def test_a_prefill_worker_takes_prompts_up_to_its_memory_whatever_max_tokens_is() -> None:
    engine, _ = prefill_engine(pages=8, page_size=4)
    engine.add(make_req("a", [1] * 28, max_new_tokens=60))
    with pytest.raises(InvalidRequestError):
        engine.add(make_req("b", [1] * 32, max_new_tokens=60))


def test_prompts_that_wait_for_memory_in_transfer_go_on_when_it_is_released() -> None:
    engine, role = prefill_engine(pages=10, page_size=4)
    first, second = make_req("a", [1] * 30), make_req("b", [2] * 30)
    engine.add(first, second)
    for _ in range(6):
        engine.step()
    assert list(engine.scheduler.transferring) == ["a"]
    assert engine.scheduler.has_work()
    role.sending.pop(A)
    engine.scheduler.release_request(first)
    for _ in range(3):
        engine.step()
    assert list(engine.scheduler.transferring) == ["b"]


def test_a_prebuilt_request_joins_without_a_forward_and_continues_from_the_second_token() -> None:
    engine = Engine()
    req = make_req("a", [1, 2, 3, 4, 5], max_new_tokens=6)
    expected = undisturbed(req)
    pages = engine.memory.alloc_pages(2)
    slots = [page * 4 + offset for page in pages for offset in range(4)][:5]
    for position, slot in enumerate(slots):
        engine.runner.kv_token[slot] = position + 1
        engine.runner.kv_position[slot] = position
    engine.scheduler.add_prebuilt(req, pages, expected[0])
    with pytest.raises(DuplicateRequestError):
        engine.scheduler.add_prebuilt(make_req("a", [1]), [], 0)
    engine.drain()
    assert engine.tokens("a") == expected[1:]
    assert engine.outputs["a"][0].index == 1
    assert set(engine.modes) == {ForwardMode.DECODE}
    assert engine.memory.tree_cache.match_prefix([1, 2, 3, 4]).pages == pages[:1]


def test_pages_that_do_not_fit_the_prompt_are_refused() -> None:
    engine = Engine()
    pages = engine.memory.alloc_pages(1)
    with pytest.raises(EngineError, match="1 pages came for 5 tokens"):
        engine.scheduler.add_prebuilt(make_req("a", [1] * 5), pages, 3)
    engine.memory.free_pages(pages)
    engine.scheduler.check_invariant()


def test_a_prebuilt_request_can_be_aborted_before_it_joins() -> None:
    engine = Engine()
    engine.scheduler.add_prebuilt(make_req("a", [1] * 5), engine.memory.alloc_pages(2), 3)
    engine.scheduler.abort_request(A)
    engine.step()
    assert engine.released == ["a"]


def test_only_the_suffix_need_arrive_where_the_prefix_is_locked() -> None:
    engine = Engine()
    first = make_req("first", [1] * 9, max_new_tokens=2)
    engine.add(first)
    engine.drain()
    req = make_req("a", [1] * 8 + [2], max_new_tokens=5)
    expected = undisturbed(req)
    prefix = engine.scheduler.lock_prefix(req)
    assert len(prefix) == 2
    (page,) = engine.memory.alloc_pages(1)
    engine.runner.kv_token[page * 4], engine.runner.kv_position[page * 4] = 2, 8
    engine.scheduler.add_prebuilt(req, [*prefix, page], expected[0])
    engine.drain()
    assert engine.tokens("a") == expected[1:]
    other = make_req("b", [1] * 9)
    engine.scheduler.lock_prefix(other)
    engine.scheduler.unlock_prefix(other)
    assert engine.memory.tree_cache.protected_size() == 0


@given(
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 4, 16]),
    radix=st.booleans(),
    abort_share=st.sampled_from([0.0, 0.0, 0.1]),
    overlap=st.booleans(),
)
@settings(max_examples=60)
def test_requests_handed_over_at_random_are_exact_and_balanced(
    seed: int, page_size: int, radix: bool, abort_share: float, overlap: bool
) -> None:
    rng = random.Random(seed)
    shape = {"pages": 112 // page_size, "page_size": page_size, "rows": 4, "radix": radix}
    pair = Pair(
        Engine(role=FakePrefillRole(), overlap=overlap, **shape),
        Engine(
            role=FakeDecodeRole(),
            max_running_requests=4,
            conservativeness=0.02,
            overlap=overlap,
            **shape,
        ),
        rng,
    )
    plan: dict[str, list[int]] = {}
    for i in range(8):
        prompt = [3] * rng.choice([0, 16, 33]) + [
            rng.randrange(2) for _ in range(rng.choice([1, 5, 17]))
        ]
        settings_ = {
            "max_new_tokens": rng.choice([1, 2, 12, 50]),
            "ignore_eos": rng.random() < 0.5,
            "seed": rng.choice([0, 9]),
        }
        expected = undisturbed(make_req("x", prompt, **settings_))
        prior = expected[: rng.choice([0, 0, len(expected) - 1])]
        plan[f"r{i}"] = expected[len(prior) :]
        pair.submit(*(make_req(f"r{i}", prompt, prior=prior, **settings_) for _ in range(2)))
    passes = 0
    while pair.busy():
        passes += 1
        assert passes < 3000
        if rng.random() < abort_share:
            pair.abort(RequestId(rng.choice(sorted(plan))))
        pair.step()
    for rid, expected in plan.items():
        tokens = pair.prefill.tokens(rid) + pair.decode.tokens(rid)
        assert tokens == (expected[: len(tokens)] if rid in pair.aborted else expected)
        assert all(0 <= token < VOCAB for token in tokens)
    for engine in (pair.prefill, pair.decode):
        assert not engine.errors
        engine.scheduler.check_invariant()
        counts = engine.scheduler.page_counts()
        assert (counts.in_use, counts.held) == (0, 0)
        assert engine.memory.tree_cache.protected_size() == 0
