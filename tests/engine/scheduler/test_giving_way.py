"""Who gives way to a more important one besides those that run: a prompt in chunks; and for whom
besides those of the queue: a request that waits for its ticket."""

from dataclasses import dataclass, field

import pytest

from engine.execution.forward_batch import ForwardMode
from engine.scheduler.req import Req
from tests.engine.scheduler.handover import FakePrefillRole
from tests.engine.scheduler.machine.cases import RequestScript, Squeeze
from tests.engine.scheduler.machine.roles import ScriptedDecode, ScriptedUnified
from tests.engine.scheduler.stub import Engine, make_req, undisturbed


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("radix", [False, True])
def test_a_prompt_in_chunks_gives_way_to_a_much_more_important_one(
    overlap: bool, radix: bool
) -> None:
    engine = Engine(priorities=True, overlap=overlap, radix=radix)
    long = make_req("long", [1] * 60, max_new_tokens=4, priority=20)
    engine.add(long)
    engine.step()
    engine.step()
    assert engine.scheduler.chunked_req is long
    urgent = make_req("urgent", [2] * 40, max_new_tokens=4, priority=0)
    engine.add(urgent)
    engine.step()
    assert engine.scheduler.chunked_req is urgent
    assert long.pages == []
    engine.drain()
    assert engine.released == ["urgent", "long"]
    for req in (long, urgent):
        assert engine.tokens(req.rid) == undisturbed(req)
    # What it had computed is in the tree, where there is one.
    extends = [sum(lens) for mode, lens in engine.runner.forwards if mode is ForwardMode.EXTEND]
    assert sum(extends) == 60 + 40 + (0 if radix else 32)


@pytest.mark.parametrize(("priority", "gives_way"), [(10, False), (11, True)])
def test_only_beyond_the_threshold(priority: int, gives_way: bool) -> None:
    engine = Engine(priorities=True, priority_preemption_threshold=10)
    long = make_req("long", [1] * 60, priority=priority)
    engine.add(long)
    engine.step()
    engine.add(make_req("urgent", [2] * 40, priority=0))
    engine.step()
    assert (engine.scheduler.chunked_req is not long) is gives_way
    engine.drain()


def test_a_parked_prompt_frees_its_memory_for_a_more_important_one() -> None:
    somebody_else = ScriptedUnified([Squeeze(start=3, sixteenths=16, passes=12)])
    engine = Engine(priorities=True, role=somebody_else, pages=16, chunked_prefill_size=8)
    parked = make_req("parked", [1] * 50, max_new_tokens=4, priority=50)
    engine.add(parked)
    for _ in range(6):
        engine.step()
    assert engine.scheduler.chunked_req is parked
    assert (parked.kv_committed_len, engine.memory.available_tokens()) == (24, 0)
    engine.add(make_req("urgent", [2] * 8, max_new_tokens=2, priority=0))
    for _ in range(5):
        engine.step()
    assert len(engine.tokens("urgent")) == 2
    assert engine.tokens("parked") == []
    engine.drain()
    assert engine.tokens("parked") == undisturbed(parked)


def test_on_a_prefill_worker_it_goes_on_since_its_pages_are_being_read() -> None:
    engine = Engine(priorities=True, role=FakePrefillRole())
    long = make_req("long", [1] * 60, priority=50)
    engine.add(long)
    engine.step()
    engine.add(make_req("urgent", [2] * 40, priority=0))
    engine.step()
    assert engine.scheduler.chunked_req is long


# ---- tickets


@dataclass
class Decode:
    """A decode worker of 24 pages, on which two unimportant requests run."""

    overlap: bool
    max_running: int = 8
    new_tokens: int = 20
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        role = ScriptedDecode({})
        self.engine = Engine(
            role=role,
            priorities=True,
            pages=24,
            overlap=self.overlap,
            max_running_requests=self.max_running,
        )
        role.kv = self
        self.role = role
        self.low = [self.arrive(f"low{n}", [n + 1] * 8, priority=20) for n in range(2)]
        for _ in range(3 + self.overlap):
            self.engine.step()
        assert len(self.engine.outputs) == 2

    def write_prompt(
        self, pages: list[int], tokens: list[int], extra_key: str, *, start: int
    ) -> None:
        """Takes the place of the machine's KV: what the transfer brings to the stub's."""
        size = self.engine.scheduler.page_size
        for position, token in list(enumerate(tokens))[start:]:
            slot = pages[position // size] * size + position % size
            self.engine.runner.kv_token[slot] = token
            self.engine.runner.kv_position[slot] = position

    def arrive(self, rid: str, prompt: list[int], *, priority: int, new_tokens: int = 0) -> Req:
        req = make_req(rid, prompt, max_new_tokens=new_tokens or self.new_tokens, priority=priority)
        self.role.scripts[rid] = RequestScript(
            gap=0, stem=0, own_len=1, own=0, max_new_tokens=1, ignore_eos=True, seed=0, transfer=2
        )
        self.engine.scheduler.check_request(req)
        self.role.reservations.append((req, undisturbed(req)[0]))
        return req


@pytest.mark.parametrize("overlap", [False, True])
def test_a_ticket_takes_the_memory_of_as_few_as_it_needs(overlap: bool) -> None:
    decode = Decode(overlap)
    engine = decode.engine
    urgent = decode.arrive("urgent", [9] * 50, priority=0, new_tokens=20)
    engine.step()
    assert urgent.rid in decode.role.landings, "granted in the pass that made the room"
    assert engine.scheduler.num_preemptions == 1
    assert [req.rid for req in engine.scheduler.waiting_queue] == ["low1"]
    engine.drain()
    for req in [*decode.low, urgent]:
        # The first token came from the prefill worker.
        assert engine.tokens(req.rid) == undisturbed(req)[1:]
    assert not engine.errors


def test_a_ticket_takes_a_place_where_places_are_short() -> None:
    decode = Decode(overlap=False, max_running=2, new_tokens=20)
    decode.arrive("urgent", [9] * 4, priority=0, new_tokens=4)
    decode.engine.step()
    assert "urgent" in decode.role.landings
    assert decode.engine.scheduler.num_preemptions == 1
    decode.engine.drain()
    assert not decode.engine.errors


@pytest.mark.parametrize(("priority", "length"), [(10, 50), (0, 75)])
def test_nobody_gives_way_to_one_that_is_no_more_important_or_would_not_fit_all_the_same(
    priority: int, length: int
) -> None:
    decode = Decode(overlap=False)
    blocker = decode.arrive("blocker", [7] * 8, priority=0, new_tokens=60)
    for _ in range(4):
        decode.engine.step()
    before = decode.engine.scheduler.num_preemptions
    decode.arrive("late", [9] * length, priority=priority, new_tokens=20)
    decode.engine.step()
    assert decode.engine.scheduler.num_preemptions == before
    assert "late" not in decode.role.landings
    decode.engine.drain()
    assert decode.engine.tokens("blocker") == undisturbed(blocker)[1:]
