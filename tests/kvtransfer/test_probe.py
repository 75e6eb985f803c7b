"""Probes beside requests: what is measured, what is refused, and that all slots come back."""

from kvtransfer.events import PeerAttached, is_probe
from kvtransfer.probe import LIMIT_S, ProbeResult
from tests.kvtransfer.pair import DECODE, LAYOUT, Pair


def connected(**options: int) -> Pair:
    pair = Pair(**options)  # type: ignore[arg-type]
    pair.run(2)
    return pair


def probe(pair: Pair, num_bytes: int = 1 << 20, rounds: int = 2) -> list[ProbeResult]:
    seen: list[ProbeResult] = []
    pair.prefill.probe(DECODE, num_bytes, rounds, seen.append)
    pair.run()
    return seen


def test_a_probe_takes_some_of_the_free_slots_and_gives_them_back() -> None:
    pair = connected(slots=16)
    (result,) = probe(pair)
    assert result.error == ""
    assert (result.transport, result.peer, result.peer_device) == ("fake", DECODE, "cpu")
    assert 0 < result.num_bytes <= 8 * LAYOUT.page_bytes
    assert result.num_bytes % LAYOUT.page_bytes == 0
    assert pair.window.counts().free == 16
    # The roles hear nothing of it.
    for events in (pair.prefill_events, pair.decode_events):
        assert all(isinstance(event, PeerAttached) for event in events)


def test_a_busy_window_refuses_a_probe_and_serves_its_request() -> None:
    pair = connected(slots=4)
    pair.grant("a", 4 * LAYOUT.page_size)
    pair.grant("b", 4 * LAYOUT.page_size)
    pair.grant("c", 4 * LAYOUT.page_size)
    (result,) = probe(pair)
    assert "busy" in result.error
    assert pair.window.counts().granted == 3


def test_requests_and_probes_run_beside_one_another() -> None:
    pair = connected(slots=8)
    seen: list[ProbeResult] = []
    pair.prefill.probe(DECODE, 1 << 20, 3, seen.append)
    pair.hand_over("r", 6 * LAYOUT.page_size, [3, 5, 6, 9, 1, 2])
    pair.run(80)
    assert seen[0].error == ""
    assert len(pair.positions["r"]) == 6
    assert pair.window.counts().free == 8


def test_a_peer_that_is_not_there_is_an_answer() -> None:
    pair = connected()
    seen: list[ProbeResult] = []
    pair.prefill.probe("decode-9", 1 << 20, 1, seen.append)
    pair.run(3)
    assert "not connected" in seen[0].error


def test_a_peer_that_goes_silent_ends_the_probe() -> None:
    pair = connected()
    seen: list[ProbeResult] = []
    pair.prefill.probe(DECODE, 1 << 20, 1, seen.append)
    for _ in range(8):
        pair.clock.now += LIMIT_S / 4
        pair.prefill.thread.step()
    assert "no end within" in seen[0].error


def test_no_clients_request_can_pass_for_a_probe() -> None:
    assert is_probe("#probe-1")
    for request_id in ("", "#probe-1", "probe", "#probe-"):
        for attempt in (0, 7):
            assert not is_probe(f"{request_id}#{attempt}")
