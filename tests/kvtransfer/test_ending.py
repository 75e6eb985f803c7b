"""A worker ends when it is told to, whatever a transport's library waits for."""

import logging
import threading

import pytest

from kvtransfer import transfer_thread
from kvtransfer.transport import TransportEvent
from tests.kvtransfer.pair import Pair

LIMIT_S = 0.2


def test_a_transport_that_never_returns_does_not_keep_its_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pair = Pair()
    (transport,) = pair.prefill.thread._transports.values()
    inside, let_go, closed = threading.Event(), threading.Event(), threading.Event()

    def held_up() -> list[TransportEvent]:
        inside.set()
        let_go.wait()
        return []

    monkeypatch.setattr(transfer_thread, "STOP_LIMIT_S", LIMIT_S)
    monkeypatch.setattr(transport, "poll", held_up)
    monkeypatch.setattr(transport, "close", closed.set)
    pair.prefill.start()
    assert inside.wait(10)
    ending = threading.Thread(target=pair.prefill.close, daemon=True)
    try:
        with caplog.at_level(logging.WARNING):
            ending.start()
            ending.join(10)
        assert not ending.is_alive()
        assert not closed.is_set(), "another thread is inside of it"
        assert "held up" in caplog.text
    finally:
        let_go.set()


def test_a_transport_that_returns_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    (transport,) = pair.prefill.thread._transports.values()
    closed = threading.Event()
    monkeypatch.setattr(transport, "close", closed.set)
    pair.prefill.start()
    pair.prefill.close()
    assert closed.is_set()
