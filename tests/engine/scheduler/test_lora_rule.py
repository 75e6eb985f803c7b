"""The rule of adapters, over a stub that has them: who may run together, and who shares KV."""

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UnknownAdapterError
from engine.execution.forward_batch import ForwardBatch, ForwardResult
from engine.memory.audit import MemoryInvariantError
from engine.memory.chain_hash import namespace_hash, namespace_key
from engine.memory.pools import MemoryPools
from engine.scheduler.admission import Promise
from engine.scheduler.lora_slots import LoraSlotError, LoraSlots
from engine.scheduler.req import Req
from engine.scheduler.role import SchedulerRole
from tests.engine.scheduler.handover import FakeDecodeRole, FakePrefillRole
from tests.engine.scheduler.stub import Engine, StubRunner, make_req, next_token, undisturbed

ADAPTERS = ("red", "green", "blue", "grey")


class AdapterRunner(StubRunner):
    """Has adapters: what it draws depends on them, and KV of one is nothing for another."""

    def __init__(self, memory: MemoryPools) -> None:
        super().__init__(memory)
        self.kv_adapter: list[str] = [""] * memory.allocator.total_tokens
        self.weights: dict[int, str] = {}
        """Adapter in each slot; loading one over another is what a slot's change means."""
        self.most_at_once = 0
        self.owners: dict[int, Req] = {}

    def forward(self, batch: ForwardBatch) -> ForwardResult:
        reqs = [self.owners[row] for row in batch.req_pool_indices.tolist()]
        in_use = {req.lora_id: req.lora_slot for req in reqs if req.lora_id}
        self.most_at_once = max(self.most_at_once, len(in_use))
        assert len(set(in_use.values())) == len(in_use)
        for lora_id, slot in in_use.items():
            assert slot is not None
            self.weights[slot] = lora_id
        written = iter(batch.out_cache_loc.tolist())
        for req, extend in zip(reqs, batch.extend_lens, strict=True):
            for _ in range(extend):
                self.kv_adapter[next(written)] = req.lora_id
        for req, row, length in zip(
            reqs, batch.req_pool_indices.tolist(), batch.seq_lens_cpu, strict=True
        ):
            for slot in batch.req_to_token[row, :length].tolist():
                assert self.kv_adapter[slot] == req.lora_id, f"{req} reads another adapter's KV"
        return super().forward(batch)

    def draw(self, batch: ForwardBatch, histories: list[list[int]]) -> ForwardResult:
        reqs = [self.owners[row] for row in batch.req_pool_indices.tolist()]
        drawn = [
            next_token(tokens, seed_of(req)) for tokens, req in zip(histories, reqs, strict=True)
        ]
        return ForwardResult(torch.tensor(drawn, dtype=torch.int64), None)


class Rows(dict[int, Req]):
    """Who owns a row, asked of the scheduler."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def __missing__(self, row: int) -> Req:
        live = self.engine.scheduler._lifecycle.live.values()
        (owner,) = [req for req in live if req.req_pool_idx == row]
        return owner


def engine_with(max_loras: int, **settings: object) -> tuple[Engine, AdapterRunner]:
    engine = Engine(
        runner=AdapterRunner,
        lora_ids=ADAPTERS,
        max_loras_per_batch=max_loras,
        **settings,  # type: ignore[arg-type]
    )
    runner = engine.runner
    assert isinstance(runner, AdapterRunner)
    runner.owners = Rows(engine)
    return engine, runner


def seed_of(req: Req) -> int:
    adapter = ADAPTERS.index(req.lora_id) + 1 if req.lora_id else 0
    return req.sampling_params.seed + 50 * adapter


def expected(req: Req) -> list[int]:
    """Outputs of the request's adapter."""
    return undisturbed(
        make_req(
            "x",
            req.origin_input_ids,
            seed=seed_of(req),
            max_new_tokens=req.sampling_params.max_new_tokens,
            ignore_eos=req.sampling_params.ignore_eos,
        )
    )


def of_adapters(names: Sequence[str], new: int = 6) -> list[Req]:
    return [
        make_req(f"{number}{name}", [number + 1] * 5, max_new_tokens=new, lora_id=name)
        for number, name in enumerate(names)
    ]


def test_only_the_one_without_a_slot_is_passed_over() -> None:
    engine, runner = engine_with(2, chunked_prefill_size=None)
    reqs = of_adapters(["red", "green", "blue", "red", "", "grey", "green"])
    engine.add(*reqs)
    engine.step()
    waiting = [req.rid for req in engine.scheduler.waiting_queue]
    assert waiting == ["2blue", "5grey"]
    assert engine.scheduler.lora_slots.counts().free == 0
    engine.drain()
    assert runner.most_at_once == 2
    for req in reqs:
        assert engine.tokens(req.rid) == expected(req)
    assert engine.scheduler.lora_slots.counts().free == 2


def test_running_requests_count_and_the_base_model_takes_no_slot() -> None:
    engine, _ = engine_with(1)
    engine.add(*of_adapters(["red"], new=8))
    engine.step()
    engine.add(
        *[make_req(f"base{n}", [9, n]) for n in range(3)], make_req("b", [8], lora_id="blue")
    )
    engine.step()
    assert [req.rid for req in engine.scheduler.waiting_queue] == ["b"]
    engine.drain()
    assert engine.released[-1] == "b"


def test_the_chunked_request_keeps_its_slot_between_chunks() -> None:
    engine, _ = engine_with(1, chunked_prefill_size=8)
    engine.add(make_req("long", [3] * 40, lora_id="red"), make_req("other", [4], lora_id="blue"))
    engine.step()
    assert engine.scheduler.chunked_req is not None
    assert engine.scheduler.lora_slots.counts().in_use == 1
    engine.drain()
    assert engine.released == ["long", "other"]


def test_kv_is_shared_within_an_adapter_and_a_salt_only() -> None:
    engine, _ = engine_with(4)
    prompt = [5] * 9
    for rid, lora, salt in (
        ("base", "", ""), ("red", "red", ""), ("red salt", "red", "s"), ("salt", "", "s"),
        ("looks alike", "", "red"),
    ):  # fmt: skip
        first = make_req(rid, prompt, lora_id=lora, cache_salt=salt)
        again = make_req(f"{rid} again", prompt, lora_id=lora, cache_salt=salt)
        for req in (first, again):
            engine.add(req)
            engine.drain()
            assert engine.tokens(req.rid) == expected(req)
        assert (first.cached_tokens, again.cached_tokens) == (0, 8)


names = st.text(max_size=6)


@given(names, names, names, names)
def test_no_two_pairs_of_adapter_and_salt_have_one_name_space(
    lora_a: str, salt_a: str, lora_b: str, salt_b: str
) -> None:
    same = (lora_a, salt_a) == (lora_b, salt_b)
    keys = namespace_key(lora_a, salt_a), namespace_key(lora_b, salt_b)
    assert (keys[0] == keys[1]) == same
    assert (namespace_hash(keys[0]) == namespace_hash(keys[1])) == same
    assert namespace_key("", "") == ""


@pytest.mark.parametrize(
    ("lora", "salt"), [("1", ":a"), ("", "0:"), ("", "1:1"), ("0", ""), ("", "0")]
)
def test_digits_and_colons_do_not_confuse_the_key(lora: str, salt: str) -> None:
    pairs = [("1", ":a"), ("", "0:"), ("", "1:1"), ("0", ""), ("", "0"), ("", ""), ("1:", "a")]
    key = namespace_key(lora, salt)
    assert [pair for pair in pairs if namespace_key(*pair) == key] == [(lora, salt)]


def test_an_adapter_that_is_not_there_is_refused_by_name() -> None:
    engine = Engine()
    with pytest.raises(UnknownAdapterError, match=r"adapter 'red' is not served here.*none"):
        engine.add(make_req("a", [1], lora_id="red"))
    engine, _ = engine_with(1)
    with pytest.raises(UnknownAdapterError, match="red, green"):
        engine.add(make_req("a", [1], lora_id="pink"))
    assert not engine.scheduler.has_work()


def test_a_prefill_workers_slot_is_free_once_the_prompt_is_done() -> None:
    engine, _ = engine_with(1, role=FakePrefillRole())
    reqs = of_adapters(["red", "blue"])
    engine.add(*reqs)
    engine.step()
    assert list(engine.scheduler.transferring) == ["0red"]
    engine.step()
    assert list(engine.scheduler.transferring) == ["0red", "1blue"]
    assert engine.scheduler.lora_slots.counts().in_use == 0
    for req in reqs:
        engine.scheduler.release_request(req)
    engine.step()


def test_a_ticket_promises_a_slot_that_nobody_here_may_take() -> None:
    role = FakeDecodeRole()
    engine, _ = engine_with(2, role=role)
    admission = engine.scheduler.admission
    assert admission.has_lora_slot_for("red")
    role.tickets[make_req("t", [1]).rid] = Promise(prompt_len=8, max_new_tokens=4, lora_id="red")
    engine.add(*of_adapters(["green", "blue"]))
    engine.step()
    assert [req.rid for req in engine.scheduler.waiting_queue] == ["1blue"]
    assert admission.has_lora_slot_for("red")
    assert admission.has_lora_slot_for("green")
    assert admission.has_lora_slot_for("")
    assert not admission.has_lora_slot_for("grey")
    role.tickets.clear()
    engine.drain()


def test_a_request_that_came_by_transfer_joins_when_its_adapter_has_a_slot() -> None:
    engine, runner = engine_with(1, role=SchedulerRole())
    first, second = of_adapters(["red", "blue"])
    for req in (first, second):
        pages = engine.memory.alloc_pages(2)
        token = expected(req)[0]
        for position, value in enumerate(req.origin_input_ids):
            slot = pages[position // 4] * 4 + position % 4
            runner.kv_token[slot], runner.kv_position[slot] = value, position
            runner.kv_adapter[slot] = req.lora_id
        engine.scheduler.add_prebuilt(req, pages, token)
    engine.step()
    assert list(engine.scheduler.prebuilt) == [second]
    engine.drain()
    for req in (first, second):
        assert engine.tokens(req.rid) == expected(req)[1:]


def test_slots_are_recounted_from_their_holders() -> None:
    slots = LoraSlots(2)
    reqs = of_adapters(["red", "red", "blue", "grey"])
    for req in reqs[:3]:
        slots.acquire(req)
        slots.acquire(req)  # once more changes nothing
    slots.check(reqs)
    assert not slots.try_acquire(reqs[3])
    with pytest.raises(LoraSlotError, match="grey"):
        slots.acquire(reqs[3])
    with pytest.raises(MemoryInvariantError):
        slots.check(reqs[1:])
    reqs[2].lora_slot = reqs[0].lora_slot
    with pytest.raises(MemoryInvariantError):
        slots.check(reqs)
    reqs[2].lora_slot = 1 - (reqs[0].lora_slot or 0)
    for req in reqs:
        slots.release(req)
        slots.release(req)
    slots.check(reqs)
    assert slots.counts().free == 2


@given(
    seed=st.integers(0, 2**32),
    max_loras=st.integers(1, 3),
    overlap=st.booleans(),
    priorities=st.booleans(),
    policy=st.sampled_from(["fcfs", "lpm", "random"]),
)
@settings(max_examples=25)
def test_whatever_happens_slots_balance_and_tokens_are_the_adapters(
    seed: int, max_loras: int, overlap: bool, priorities: bool, policy: str
) -> None:
    rng = random.Random(seed)
    engine, runner = engine_with(
        max_loras, pages=32, rows=5, overlap=overlap, priorities=priorities, late=False,
        schedule_policy=policy, conservativeness=0.02, priority_preemption_threshold=2,
    )  # fmt: skip
    reqs = [
        make_req(
            f"r{n}",
            [1] * rng.choice([2, 17, 33]) + [rng.randrange(2)],
            max_new_tokens=rng.choice([1, 6, 30]),
            priority=rng.choice([0, 9]),
            lora_id=rng.choice(["", *ADAPTERS]),
            ignore_eos=rng.random() < 0.5,
        )
        for n in range(rng.randint(2, 10))
    ]
    waiting, passes = list(reqs), 0
    while waiting or engine.scheduler.has_work():
        passes += 1
        assert passes < 2000
        if waiting and rng.random() < 0.5:
            engine.add(waiting.pop())
        if rng.random() < 0.03:
            engine.scheduler.abort_request(rng.choice(reqs).rid)
        engine.step()
    assert runner.most_at_once <= max_loras
    for req in reqs:
        if req.rid not in engine.aborted:
            assert engine.tokens(req.rid) == expected(req)
    assert engine.scheduler.lora_slots.counts().free == max_loras
