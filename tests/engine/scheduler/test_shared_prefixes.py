"""De-duplication inside a batch: a prefix is computed once, whoever waits for it."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling_params import SamplingParams
from engine.scheduler.config import SchedulePolicyName
from engine.scheduler.req import Req
from engine.scheduler.shared_prefixes import MAX_HELD_BACK, MIN_SHARED_TOKENS
from engine.types import RequestId
from tests.engine.scheduler.handover import FakePrefillRole
from tests.engine.scheduler.stub import EOS, Engine, make_req, undisturbed

SYSTEM = [(n * 7) % 40 for n in range(40)]


def users(count: int, system: list[int] = SYSTEM, **params: object) -> list[Req]:
    return [
        make_req(f"u{n}", [*system, n % 40, 1], max_new_tokens=3, **params) for n in range(count)
    ]  # type: ignore[arg-type]


def computed(engine: Engine) -> int:
    """Prompt tokens that went through the model."""
    return sum(sum(extends) for mode, extends in engine.runner.forwards if mode.is_extend())


@pytest.mark.parametrize("policy", ["lpm", "dfs-weight"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("chunk", [None, 16, 64])
def test_a_common_prefix_is_computed_once(
    policy: SchedulePolicyName, overlap: bool, chunk: int | None
) -> None:
    engine = Engine(
        pages=64, schedule_policy=policy, overlap=overlap, chunked_prefill_size=chunk,
        max_prefill_tokens=400,
    )  # fmt: skip
    reqs = users(6, SYSTEM * 2)
    engine.add(*reqs)
    engine.drain()
    assert computed(engine) == 82 + 5 * 2
    assert [req.cached_tokens for req in reqs] == [0, 80, 80, 80, 80, 80]
    for req in reqs:
        assert engine.tokens(req.rid) == undisturbed(req)


@pytest.mark.parametrize("policy", ["fcfs", "lof", "random"])
def test_other_policies_keep_their_order_and_compute_it_again(policy: SchedulePolicyName) -> None:
    engine = Engine(
        pages=80, schedule_policy=policy, chunked_prefill_size=None, max_prefill_tokens=400
    )
    engine.add(*users(4))
    engine.drain()
    assert computed(engine) == 4 * 42


def test_the_followers_go_in_the_pass_after_their_leaders() -> None:
    engine = Engine(
        pages=64, schedule_policy="lpm", chunked_prefill_size=None, max_prefill_tokens=400
    )
    engine.add(*users(4), make_req("other", [39] * 8, max_new_tokens=3))
    engine.step()
    assert engine.runner.forwards[0][1] == [42, 8]
    engine.step()
    assert engine.runner.forwards[1][1] == [2, 2, 2]


def test_on_a_prefill_worker_the_followers_need_not_wait_for_the_transfer() -> None:
    role = FakePrefillRole()
    engine = Engine(
        pages=64, role=role, schedule_policy="lpm", chunked_prefill_size=None,
        max_prefill_tokens=400,
    )  # fmt: skip
    reqs = users(4)
    engine.add(*reqs)
    for _ in range(6):
        engine.step()
    assert computed(engine) == 42 + 3 * 2
    assert sorted(engine.scheduler.transferring) == ["u0", "u1", "u2", "u3"]
    for req in reqs:
        assert role.sending[req.rid].pages == engine.scheduler.request_pages(req)
        engine.scheduler.release_request(req)
        engine.step()
    assert engine.scheduler.page_counts().in_use == 0


def test_short_common_prefixes_are_not_waited_for() -> None:
    engine = Engine(
        pages=64, schedule_policy="lpm", chunked_prefill_size=None, max_prefill_tokens=400
    )
    short = SYSTEM[: MIN_SHARED_TOKENS - 4]
    engine.add(*users(3, short))
    engine.step()
    assert engine.runner.forwards[0][1] == [len(short) + 2] * 3


def test_what_is_cached_already_does_not_count_as_common() -> None:
    engine = Engine(
        pages=64, schedule_policy="lpm", chunked_prefill_size=None, max_prefill_tokens=400
    )
    engine.add(make_req("warm", SYSTEM, max_new_tokens=1))
    engine.drain()
    engine.add(*users(3))
    engine.step()
    assert engine.runner.forwards[-1][1] == [2, 2, 2]


def test_tenants_and_adapters_wait_for_nobody_elses_prefix() -> None:
    engine = Engine(
        pages=80, schedule_policy="lpm", chunked_prefill_size=None, max_prefill_tokens=400,
        lora_ids=("x",),
    )  # fmt: skip
    engine.add(
        make_req("plain", [*SYSTEM, 1]),
        make_req("salted", [*SYSTEM, 1], cache_salt="s"),
        make_req("adapter", [*SYSTEM, 1], lora_id="x"),
        make_req("follower", [*SYSTEM, 2], cache_salt="s"),
    )
    engine.step()
    assert engine.runner.forwards[0][1] == [41, 41, 41]
    engine.drain()


def test_who_must_judge_the_whole_prompt_gains_nothing_by_waiting() -> None:
    engine = Engine(
        pages=64, schedule_policy="lpm", chunked_prefill_size=None, max_prefill_tokens=400
    )
    judge = Req(
        RequestId("judge"), [*SYSTEM, 3], SamplingParams(max_new_tokens=2, prompt_logprobs=0),
        eos_token_ids=[EOS],
    )  # fmt: skip
    engine.add(judge, *users(2))
    admitted = [req.rid for req in engine.scheduler.get_next_batch_to_run().reqs]  # type: ignore[union-attr]
    assert admitted == ["judge"]  # it may lead, for what it computes is cached as well

    engine = Engine(
        pages=64, schedule_policy="lpm", chunked_prefill_size=None, max_prefill_tokens=400
    )
    earlier = users(2)
    judge.t_arrival = time.monotonic()
    engine.add(*earlier, judge)
    admitted = [req.rid for req in engine.scheduler.get_next_batch_to_run().reqs]  # type: ignore[union-attr]
    assert admitted == ["u0", "judge"]


def test_when_a_leader_is_aborted_half_way_a_follower_leads() -> None:
    engine = Engine(pages=64, schedule_policy="lpm", chunked_prefill_size=16)
    reqs = users(3, SYSTEM * 2)
    engine.add(*reqs)
    engine.step()
    assert engine.scheduler.chunked_req is reqs[0]
    engine.scheduler.abort_request(reqs[0].rid)
    engine.drain()
    # What the leader had computed is reused.
    assert computed(engine) == 16 + (82 - 16) + 2
    for req in reqs[1:]:
        assert engine.tokens(req.rid) == undisturbed(req)


def test_without_a_tree_nobody_waits_for_what_will_not_be_kept() -> None:
    engine = Engine(
        pages=64, radix=False, schedule_policy="lpm", chunked_prefill_size=None,
        max_prefill_tokens=400,
    )  # fmt: skip
    engine.add(*users(3))
    engine.step()
    assert engine.runner.forwards[0][1] == [42, 42, 42]


def test_a_pass_looks_at_a_bounded_number_of_followers() -> None:
    engine = Engine(
        pages=64, schedule_policy="lpm", chunked_prefill_size=None, max_prefill_tokens=400,
        max_queued_requests=1000,
    )  # fmt: skip
    engine.add(*users(3 * MAX_HELD_BACK))
    engine.step()
    shared = engine.scheduler._shared
    assert shared is not None
    assert shared.held_back == MAX_HELD_BACK
    for _ in range(3):
        engine.step()
    assert shared.held_back == 0
    engine.drain(5000)


@given(
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(["lpm", "dfs-weight"]),
    page_size=st.sampled_from([1, 4, 16]),
    chunk=st.sampled_from([None, 16, 32]),
    pages=st.sampled_from([96, 160, 400]),
    overlap=st.booleans(),
)
@settings(max_examples=25)
def test_nobody_starves_behind_a_common_prefix(
    seed: int,
    policy: SchedulePolicyName,
    page_size: int,
    chunk: int | None,
    pages: int,
    overlap: bool,
) -> None:
    rng = random.Random(seed)
    engine = Engine(
        pages=pages // page_size,
        page_size=page_size,
        schedule_policy=policy,
        chunked_prefill_size=chunk,
        overlap=overlap,
        conservativeness=0.05,
    )
    reqs = []
    for number in range(rng.randint(2, 14)):
        stem = SYSTEM if rng.random() < 0.7 else [(n + 1) % 40 for n in SYSTEM]
        reqs.append(
            make_req(
                f"r{number}",
                stem[: rng.choice([36, 39])] + [rng.randrange(3)] * rng.choice([1, 4, 20]),
                max_new_tokens=rng.choice([1, 4, 12]),
            )
        )
    waiting = list(reqs)
    passes = 0
    while waiting or engine.scheduler.has_work():
        passes += 1
        assert passes < 1500
        if waiting and rng.random() < 0.5:
            engine.add(waiting.pop())
        if rng.random() < 0.03:
            engine.scheduler.abort_request(rng.choice(reqs).rid)
        engine.step()
    for req in reqs:
        if req.rid not in engine.aborted:
            assert engine.tokens(req.rid) == undisturbed(req)
