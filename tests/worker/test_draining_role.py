"""When a draining decode worker lets go of what it was asked for, with the real roles."""

from protos.baton.v1 import channel_pb2, worker_pb2
from tests.worker.handover import Handover

DRAIN = channel_pb2.FrontToEngine(drain=True)


def test_what_still_waits_for_memory_is_turned_away_and_has_not_failed() -> None:
    handover = Handover(slots=1)
    turned_away: list[str] = []
    hear = handover._hear

    def listen(worker: object, message: channel_pb2.EngineToFront) -> None:
        failed = message.work_failed
        if message.WhichOneof("kind") == "work_failed" and failed.turned_away:
            assert failed.retryable
            assert failed.error.code == worker_pb2.ERROR_CODE_UNAVAILABLE
            turned_away.append(failed.request_id)
        hear(worker, message)  # type: ignore[arg-type]

    handover._hear = listen  # type: ignore[method-assign]
    handover.generate("granted", [1, 2, 3])
    handover.generate("waits", [4, 5, 6])
    handover.decode.role.handle(DRAIN)
    while len(handover.output("granted")) < 6:
        handover.step()
    assert turned_away == ["waits"]
    assert handover.errors["granted"] == []


def test_decode_stays_until_prefill_was_told_that_it_may_free_its_pages() -> None:
    handover = Handover()
    role, agent = handover.decode.role, handover.decode.agent
    accept, accepted = agent.accept, list[tuple[str, list[int]]]()
    # The transfer thread is busy with something else.
    agent.accept = lambda rid, positions: accepted.append((rid, list(positions)))  # type: ignore[method-assign]
    handover.generate("r", [1, 2, 3, 4, 5], max_tokens=2)
    role.handle(DRAIN)
    while role.arrivals:
        handover.step()
    assert not role.is_idle()
    for rid, positions in accepted:
        accept(rid, positions)
    while not role.is_idle():
        handover.step()
    handover.prefill.agent.thread.step()
    assert not handover.prefill.agent.stats().sending
