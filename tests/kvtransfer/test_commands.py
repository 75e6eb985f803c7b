"""Who runs a command of the scheduler: the transfer thread, or the caller while that one sleeps."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvtransfer.events import TransferThreadFailed
from kvtransfer.transfer_thread import TransferThread
from tests.kvtransfer.pair import DECODE, PREFILL, Pair


@pytest.fixture
def thread() -> Iterator[TransferThread]:
    agent = Pair().prefill
    agent.start()
    yield agent.thread
    agent.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def asleep(thread: TransferThread) -> None:
    """Waits until it has nothing to do."""
    done = threading.Event()
    thread.do(done.set)
    assert done.wait(10)
    time.sleep(0.01)  # a round ends microseconds after its last command


def test_the_caller_runs_it_while_the_thread_sleeps(thread: TransferThread) -> None:
    ran_on: list[int] = []

    def tried() -> bool:
        # It also wakes every few milliseconds to look at leases, and may do so just now.
        asleep(thread)
        ran_on.clear()
        thread.do_now(lambda: ran_on.append(threading.get_ident()))
        until(lambda: bool(ran_on))
        return ran_on == [threading.get_ident()]

    until(tried)


def test_the_thread_runs_it_behind_what_it_is_busy_with(thread: TransferThread) -> None:
    order: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def busy() -> None:
        begun.set()
        assert go_on.wait(10)
        order.append("busy")

    thread.do(busy)
    assert begun.wait(10)
    thread.do_now(lambda: order.append(f"now on {threading.get_ident()}"))
    thread.do(lambda: order.append("after"))
    assert order == []
    go_on.set()
    until(lambda: len(order) == 3)
    assert order[0] == "busy"
    assert order[2] == "after"
    assert order[1] != f"now on {threading.get_ident()}"


def test_it_never_overtakes_a_command_that_waits(thread: TransferThread) -> None:
    order: list[int] = []
    for number in range(2000):
        send = thread.do_now if number % 3 else thread.do
        send(lambda number=number: order.append(number))
    until(lambda: len(order) == 2000)
    assert order == list(range(2000))


def test_a_thread_that_has_not_begun_finds_it_later() -> None:
    agent = Pair().prefill
    ran: list[int] = []
    agent.thread.do_now(lambda: ran.append(1))
    assert ran == []
    agent.thread.step()
    assert ran == [1]


def test_what_a_transport_hears_is_taken_up_on_its_own_thread() -> None:
    pair = Pair()
    pair.step()
    thread, network = pair.decode.thread, pair.network.members
    heard_on: list[int] = []
    thread.on_message = lambda peer, data: heard_on.append(threading.get_ident())  # type: ignore[method-assign]
    pair.decode.start()

    def tried() -> bool:
        # The fake one is polled as well, so the transfer thread may come first.
        asleep(thread)
        heard_on.clear()
        network[PREFILL].send(DECODE, b"a word")
        thread._arrived(network[DECODE])
        until(lambda: bool(heard_on))
        return heard_on == [threading.get_ident()]

    until(tried)
    pair.decode.close()


def test_an_error_there_ends_the_worker_as_one_on_the_thread_does() -> None:
    pair = Pair()
    pair.decode.start()
    asleep(pair.decode.thread)
    transport = pair.network.members[DECODE]

    def broken() -> list[object]:
        raise RuntimeError("the device is gone")

    transport.poll = broken  # type: ignore[method-assign, assignment]
    pair.decode.thread._arrived(transport)
    failed: list[TransferThreadFailed] = []

    def told() -> bool:
        events = pair.decode.poll_events()
        failed.extend(event for event in events if isinstance(event, TransferThreadFailed))
        return bool(failed)

    until(told)
    assert "the device is gone" in failed[0].detail
    pair.decode.close()
