"""A writer that is stopped for longer than its lease, and then goes on: its write lands late.

Real processes over NIXL, stopped by SIGSTOP at the moment before they post their write. The slots
of the ticket it was for must not be another request's by then. With the guard (the quarantine)
taken out, the same course of events spoils that request: so the test can fail.
"""

import os
import signal
from collections.abc import Iterator

import psutil
import pytest

from kvtransfer.nixl_transport import unavailable_reason
from tests.e2e.worker_status import wait_for
from tests.kvtransfer.nixl_peers import (
    LAYOUT,
    LEASE_S,
    SLOTS,
    careless_decode_main,
    decode_main,
    prefill_main,
)
from tests.kvtransfer.nixl_processes import Process, begin, join, slots_of

pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason=unavailable_reason())

TICKET_SLOTS = SLOTS // 4
TOKENS = TICKET_SLOTS * LAYOUT.page_size
"""A request that fills all slots of its ticket."""


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, Process]]:
    started = {
        name: Process(main, name)
        for name, main in (
            ("late", prefill_main),
            ("prompt", prefill_main),
            ("guarded", decode_main),
            ("careless", careless_decode_main),
        )
    }
    yield started
    for process in started.values():
        process.end()


def write_late(processes: dict[str, Process], decode: Process) -> tuple[bool, str]:
    """The slots of a stopped writer's ticket run out of their lease, the next request lands, and
    only then does the writer go on. (Whether the next request's slots are intact, the checksum of
    what it was sent.)"""
    late, prompt = processes["late"], processes["prompt"]
    join(late, decode)
    join(prompt, decode)
    decode.tell("put_off_copies")
    late.tell("stop_before_next_write")
    begin(late, decode, f"late to {decode.instance}", TOKENS)
    stopped = psutil.Process(late.process.pid)
    wait_for(lambda: stopped.status() == psutil.STATUS_STOPPED, "the writer's stop")
    try:
        assert decode.expect("failed", LEASE_S + 5) == ("EXPIRED", True)
        sent = begin(prompt, decode, f"next at {decode.instance}", TOKENS)
        assert decode.expect("landed") == TICKET_SLOTS
        decode.tell("are_slots_intact")
        assert decode.expect("intact")
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    # its end comes after all of its bytes are in place
    while late.expect("failed", 20) != ("EXPIRED", True):
        pass
    decode.tell("are_slots_intact")
    return bool(decode.expect("intact")), sent


def test_a_late_write_reaches_no_slot_of_another_request(processes: dict[str, Process]) -> None:
    decode = processes["guarded"]
    intact, sent = write_late(processes, decode)
    assert intact
    decode.tell("copy")
    assert decode.expect("completed")[2] == sent
    assert processes["prompt"].expect("released")
    wait_for(lambda: slots_of(decode) == (SLOTS, 0, 0), "the end of the quarantine")


def test_without_the_quarantine_it_does_and_the_seal_refuses_what_it_spoilt(
    processes: dict[str, Process],
) -> None:
    decode = processes["careless"]
    intact, _ = write_late(processes, decode)
    assert not intact
    decode.tell("copy")
    assert decode.expect("rejected") == f"next at {decode.instance}"
