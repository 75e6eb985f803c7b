"""Whatever happens to a request, its tokens are an undisturbed run's, and memory balances."""

import random
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequestError
from engine.scheduler.admission import Promise
from engine.scheduler.req import FinishReason, Req
from engine.scheduler.role import OwnerKind, SchedulerRole
from tests.engine.scheduler.stub import CONTEXT, VOCAB, Engine, make_req, undisturbed


@dataclass(frozen=True)
class Traffic:
    seed: int
    page_size: int
    memory_tokens: int
    chunk: int | None
    radix: bool
    mixed: bool
    num_requests: int
    rows: int
    abort_share: float
    ignore_eos_share: float
    pressure: bool
    overlap: bool


traffic = st.builds(
    Traffic,
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 4, 16]),
    memory_tokens=st.sampled_from([64, 96, 128, 256]),
    chunk=st.sampled_from([None, 16, 17, 32]),
    radix=st.booleans(),
    mixed=st.booleans(),
    num_requests=st.integers(3, 12),
    rows=st.integers(2, 7),
    abort_share=st.sampled_from([0.0, 0.0, 0.05, 0.3]),
    ignore_eos_share=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
    pressure=st.booleans(),
    overlap=st.booleans(),
)


class PressureRole(SchedulerRole):
    """Takes pages as tickets do, promises others, and gives all back a little later."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.taken: list[list[int]] = []
        self.promised: list[Promise] = []

    def poll(self) -> None:
        memory, room = self.scheduler.memory, self.scheduler.memory.available_tokens()
        if room and self.rng.random() < 0.2:
            pages = self.rng.randint(1, -(-room // self.scheduler.page_size))
            self.taken.append(memory.alloc_pages(min(pages, 4)))
        if self.rng.random() < 0.1:
            self.promised.append(Promise(prompt_len=20, max_new_tokens=5, pages_allocated=False))
        if self.rng.random() < 0.3:
            self.let_go()

    def let_go(self) -> None:
        if self.taken:
            self.scheduler.memory.free_pages(self.taken.pop(0))
        if self.promised:
            self.promised.pop(0)

    def promises(self) -> list[Promise]:
        return self.promised

    def page_owners(self) -> list[tuple[OwnerKind, list[int]]]:
        kinds: list[OwnerKind] = ["in_use", "held"]
        return [(kinds[i % 2], pages) for i, pages in enumerate(self.taken)]


def random_req(rng: random.Random, number: int, ignore_eos_share: float) -> Req:
    # Few distinct beginnings, so that prefixes are shared, whole pages and parts of pages.
    shared = [(number_ * 7) % VOCAB for number_ in range(rng.choice([0, 5, 16, 33, 33]))]
    own = [rng.randrange(2) for _ in range(rng.choice([1, 3, 3, 16, 17, 40]))]
    prompt = (shared + own)[: CONTEXT - 1]
    req = make_req(
        f"r{number}",
        prompt,
        max_new_tokens=rng.choice([1, 2, 9, 30, 30, 200]),
        ignore_eos=rng.random() < ignore_eos_share,
        seed=rng.choice([0, 0, 3, 250]),
        logprobs=rng.random() < 0.2,
    )
    if rng.random() < 0.2:  # a replay: some of its tokens were delivered elsewhere
        outputs = undisturbed(req)
        req = Req(
            req.rid,
            prompt,
            req.sampling_params,
            eos_token_ids=[0],
            prior_output_ids=outputs[: rng.randrange(len(outputs))],
        )
    return req


@given(traffic)
@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
def test_random_traffic_is_exact_and_balanced(case: Traffic) -> None:
    rng = random.Random(case.seed)
    role = PressureRole(rng) if case.pressure else None
    engine = Engine(
        pages=case.memory_tokens // case.page_size,
        page_size=case.page_size,
        rows=case.rows,
        radix=case.radix,
        chunked_prefill_size=case.chunk,
        max_prefill_tokens=48,
        mixed=case.mixed,
        max_running_requests=case.rows,
        # The estimate of growth sinks to almost nothing, so that retractions happen.
        conservativeness=0.02,
        role=role,
        overlap=case.overlap,
    )
    waiting = [random_req(rng, i, case.ignore_eos_share) for i in range(case.num_requests)]
    accepted: dict[str, Req] = {}
    aborted: set[str] = set()
    passes = 0
    while waiting or engine.scheduler.has_work():
        passes += 1
        assert passes < 3000, f"no end: {engine.scheduler.__dict__}"
        while waiting and rng.random() < 0.6:
            req = waiting.pop()
            try:
                engine.add(req)
                accepted[req.rid] = req
            except InvalidRequestError:
                assert req.prompt_len + req.sampling_params.max_new_tokens > case.memory_tokens
        if accepted and rng.random() < case.abort_share:
            rid = rng.choice(sorted(accepted))
            if engine.scheduler.abort_request(accepted[rid].rid):
                aborted.add(rid)
        engine.step()
    while role is not None and (role.taken or role.promised):
        role.let_go()
    assert not engine.errors
    assert sorted(engine.aborted) == sorted(aborted)
    assert sorted(engine.released) == sorted(accepted)
    for rid, req in accepted.items():
        expected = undisturbed(req)[req.prior_output_len :]
        if rid in aborted:
            assert engine.tokens(rid) == expected[: len(engine.tokens(rid))]
            continue
        assert engine.tokens(rid) == expected
        assert engine.outputs[rid][-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        assert engine.outputs[rid][0].index == req.prior_output_len
    counts = engine.scheduler.page_counts()
    assert counts.balanced
    assert counts.in_use == counts.held == 0
    assert engine.scheduler.row_counts().in_use == 0
    tree = engine.memory.tree_cache
    assert tree.protected_size() == 0
    tree.evict(case.memory_tokens)
    assert engine.memory.allocator.available_size() == engine.memory.allocator.total_tokens
