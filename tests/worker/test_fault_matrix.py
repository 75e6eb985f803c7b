"""Every fault of the fake transport, at every message of either side, in several courses of a
handover: the tokens are exact or the error has a type, in time, and nothing stays owned.

The faults are laid over every message that an undisturbed run sends, one at a time, until one finds
none left. So each kind meets each state that a side sends in; the test asserts that it did.
"""

import itertools
from dataclasses import dataclass

import pytest

from kvtransfer.fake_transport import Fault, FaultKind
from kvtransfer.states import TransferFailure, TransferState
from protos.baton.v1 import kv_pb2, worker_pb2
from tests.engine.scheduler.stub import make_req, undisturbed
from tests.worker.handover import DECODE, PREFILL, Handover

ANSWER_S = 5.0
LEASE_S = 2.0
SETTLE_S = LEASE_S + 1.0
PROMPTS = {"r": list(range(1, 19)), "s": [9] * 11}
MAX_TOKENS = 6
EXACT = {
    name: undisturbed(make_req(name, prompt, max_new_tokens=MAX_TOKENS))
    for name, prompt in PROMPTS.items()
}
DELAY_POLLS = 100
"""Past the lease, in rounds."""
REASONS = [failure.name.lower().replace("_", " ") for failure in TransferFailure]
CODES = {
    worker_pb2.ERROR_CODE_UNAVAILABLE,
    worker_pb2.ERROR_CODE_DATA_LOSS,
    worker_pb2.ERROR_CODE_ABORTED,
    worker_pb2.ERROR_CODE_RESOURCE_EXHAUSTED,
}


@dataclass(frozen=True)
class Course:
    """What else happens during the handover."""

    name: str
    split: int = 0
    """Layers that prefill computes at a time: the first leave before the others."""
    behind: bool = False
    """Pages leave behind the layers that compute them, before they are announced."""
    by_host: bool = False
    """... started by the host."""
    overlap: bool = False
    """The next step is launched before a step's results are handled."""
    busy: str = ""
    """An instance whose scheduler takes a long step while its peer waits for it..."""
    busy_from: int = 0
    """... from this round on."""
    leaves: bool = False
    """The client of the first request leaves in the middle."""

    def __str__(self) -> str:
        return self.name


COURSES = [
    Course("plain"),
    Course("early layers", split=2),
    Course("behind the step", behind=True, overlap=True),
    Course("behind the step by the host", behind=True, by_host=True, overlap=True),
    Course("busy prefill", busy=PREFILL, busy_from=1),
    Course("busy decode", busy=DECODE, busy_from=3),
    Course("client leaves", leaves=True),
]
BUSY_UNTIL = 40
LEAVES_AT = 4


def meets(course: Course, side: str) -> set[TransferState]:
    """States in which that side sends something: prefill's last word comes before it is complete,
    and decode speaks of a ticket that waits, or has failed, only where the course lets it."""
    if side == PREFILL:
        states = {TransferState.RESERVED, TransferState.RECEIVING}
        return states | {TransferState.FAILED} if course.leaves else states
    states = {TransferState.COMPLETE}
    if course.busy:
        states |= {TransferState.RESERVED, TransferState.RECEIVING} & {
            TransferState.RESERVED if course.busy == PREFILL else TransferState.RECEIVING
        }
    return states | {TransferState.FAILED} if course.leaves else states


class Case(Handover):
    """One course under one fault."""

    def __init__(self, course: Course, fault: Fault | None) -> None:
        faults = () if fault is None else (fault,)
        super().__init__(
            faults=faults,
            lease_s=LEASE_S,
            split=course.split,
            behind=course.behind,
            by_host=course.by_host,
            overlap=course.overlap,
        )
        self.struck_in: TransferState | None = None
        self.course = course
        self.began = self.clock.now
        self.rounds = 0
        for name, prompt in PROMPTS.items():
            self.generate(name, prompt, max_tokens=MAX_TOKENS)

    def round(self) -> None:
        course, at = self.course, self.rounds
        self.rounds += 1
        if course.leaves and at == LEAVES_AT:
            self.abort("r")
        struck = len(self.network.struck)
        # fine steps while there is something to meet, longer ones while leases run out
        fine = at < BUSY_UNTIL
        busy = fine and at >= course.busy_from
        self.step(0.02 if fine else 0.2, busy=course.busy if busy else "")
        if len(self.network.struck) > struck:
            self.struck_in = self._state(*self.network.struck[-1])

    def _state(self, fault: Fault, data: bytes) -> TransferState:
        """Of the transfer that the message is about, as far as the message tells."""
        message = kv_pb2.KvMessage.FromString(data)
        kind = message.WhichOneof("kind")
        if kind == "failed":
            return TransferState.FAILED
        if kind == "ack":
            return TransferState.COMPLETE
        if kind == "complete" or message.credit.slots or message.written.slots:
            return TransferState.RECEIVING
        begun = message.written.pages_written or message.credit.total
        if fault.sender == DECODE and not begun:
            entry = self.decode.agent.thread.receiver._by_ticket.get(message.ticket_id)
            begun = int(entry is not None and entry.state is TransferState.RECEIVING)
        return TransferState.RECEIVING if begun else TransferState.RESERVED

    @property
    def answered(self) -> bool:
        return all(
            self.output(name) == exact or self.errors[name] or (self.course.leaves and name == "r")
            for name, exact in EXACT.items()
        )

    def check_outcome(self) -> None:
        while not self.answered:
            assert self.clock.now - self.began <= ANSWER_S, (self.tokens, self.errors)
            self.round()
        for name, exact in EXACT.items():
            assert self.output(name) == exact[: len(self.output(name))]

    def check_errors(self) -> None:
        for name, errors in self.errors.items():
            for _, who, error in errors:
                assert error.code in CODES, (name, who, error)
                assert any(reason in error.message for reason in REASONS), error.message
            if self.course.leaves and name == "r":
                continue
            assert errors or self.output(name) == EXACT[name]

    def check_balance(self, kind: FaultKind | None) -> None:
        """Everything has come back in time. What a write under way still reads, and what it may
        still fill, is counted until it has ended, or both sides know that it cannot any more."""
        self._run_until_free(SETTLE_S)
        left = self.owned()
        if kind in (FaultKind.STALL, FaultKind.DELAY):
            assert not [what for what in left if "in use" in what or "granted" in what], left
            if kind is FaultKind.STALL:
                self.lose_for_good()
            self._run_until_free(DELAY_POLLS * 0.2)
            left = self.owned()
        assert not left
        slots = self.decode.agent.stats().slots
        assert slots.free == slots.total

    def _run_until_free(self, seconds: float) -> None:
        end = self.clock.now + seconds
        while self.clock.now < end:
            if not self.owned() and not self.decode.agent.stats().slots.quarantined:
                return
            self.round()


@pytest.mark.parametrize("course", COURSES, ids=str)
@pytest.mark.parametrize("side", [PREFILL, DECODE])
@pytest.mark.parametrize("kind", list(FaultKind), ids=lambda kind: kind.name.lower())
def test_any_fault_at_any_message_ends_exactly_or_typed_and_balanced(
    kind: FaultKind, side: str, course: Course
) -> None:
    met: set[TransferState] = set()
    for nth in itertools.count():
        case = Case(course, Fault(kind, side, nth, polls=DELAY_POLLS))
        case.check_outcome()
        if not case.network.struck:
            break
        case.check_balance(kind)
        case.check_errors()
        if case.struck_in is not None:
            met.add(case.struck_in)
    assert met >= meets(course, side)


@pytest.mark.parametrize("course", COURSES, ids=str)
def test_without_a_fault_nobody_gets_an_error(course: Course) -> None:
    case = Case(course, None)
    case.check_outcome()
    case.check_balance(None)
    assert not any(case.errors.values())
