"""The unified role over the real scheduler and a stub model: what it tells its front, and when."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvtransfer.window import SlotCounts
from protos.baton.v1 import channel_pb2, worker_pb2
from tests.engine.scheduler.stub import EOS, Engine, make_req, undisturbed
from unified_service.role import UnifiedRole
from worker.config import WorkerConfig
from worker.engine_role import RETRY_AFTER_FULL_S


class Worker:
    """A unified engine without processes: messages in, messages out, one pass at a time."""

    def __init__(self, **settings: Any) -> None:
        self.said: list[channel_pb2.EngineToFront] = []
        agent = SimpleNamespace(
            poll_events=list,
            stats=lambda: SimpleNamespace(
                slots=SlotCounts(0, 0, 0, 0), window_replacements=0, handles=0
            ),
        )
        parts: Any = SimpleNamespace(
            agent=agent,
            channel=SimpleNamespace(send=self.said.append),
            config=WorkerConfig(model="stub"),
            model_config=SimpleNamespace(eos_token_ids=[EOS]),
            memory=SimpleNamespace(allocator=SimpleNamespace(num_pages=32)),
        )
        self.role = UnifiedRole(parts)
        self.engine = Engine(role=self.role, **settings)
        parts.memory = self.engine.memory

    def generate(self, name: str, prompt: list[int], *, so_far: list[int] | None = None) -> None:
        sampling = worker_pb2.ResolvedSampling(max_tokens=6, top_p=1.0, ignore_eos=True)
        request = worker_pb2.GenerateLocally(
            request_id=name, prompt_ids=prompt, output_so_far=so_far or [], sampling=sampling
        )
        self.role.handle(channel_pb2.FrontToEngine(generate=request))

    def abort(self, name: str) -> None:
        self.role.handle(channel_pb2.FrontToEngine(abort=worker_pb2.AbortWork(request_id=name)))

    def step(self) -> None:
        self.role.publish(self.engine.step())

    def drain(self) -> None:
        while self.engine.scheduler.has_work():
            self.step()

    def outputs(self, name: str) -> list[worker_pb2.RequestOutput]:
        steps = [m.step for m in self.said if m.WhichOneof("kind") == "step"]
        return [o for step in steps for o in step.outputs if o.request_id == name]

    def tokens(self, name: str) -> list[int]:
        return [token.id for output in self.outputs(name) for token in output.tokens]

    def failures(self) -> list[worker_pb2.WorkFailed]:
        return [m.work_failed for m in self.said if m.WhichOneof("kind") == "work_failed"]

    def done(self) -> list[str]:
        return [
            m.request_done.request_id for m in self.said if m.WhichOneof("kind") == "request_done"
        ]


@pytest.mark.parametrize("settings", [{}, {"mixed": True}, {"overlap": True}, {"split": 1}])
def test_each_request_gets_its_tokens_and_its_end(settings: dict[str, Any]) -> None:
    worker = Worker(**settings)
    prompts = {"a": [1, 2, 3], "b": [4] * 20, "c": [5, 6]}
    for name, prompt in prompts.items():
        worker.generate(name, prompt)
        worker.step()
    worker.drain()
    for name, prompt in prompts.items():
        assert worker.tokens(name) == undisturbed(make_req(name, prompt, max_new_tokens=6))
    assert sorted(worker.done()) == ["a", "b", "c"]
    assert worker.role.is_idle()


@pytest.mark.parametrize("settings", [{}, {"mixed": True}, {"overlap": True}])
def test_the_first_output_times_the_prompt_and_the_second_the_decode_step(
    settings: dict[str, Any],
) -> None:
    worker = Worker(**settings)
    worker.generate("a", [1] * 40)
    worker.drain()
    first, second, *others = worker.outputs("a")
    assert first.timing.prefill_ms > 0
    assert first.timing.queue_ms >= 0
    assert not first.timing.first_decode_step_ms
    assert second.timing.first_decode_step_ms > 0
    assert second.timing.join_ms >= 0
    assert not second.timing.prefill_ms
    assert (second.timing.kv_bytes, second.timing.transport) == (0, "")
    assert not any(output.HasField("timing") for output in others)


def test_a_replay_goes_on_at_its_index() -> None:
    worker = Worker()
    worker.generate("a", [1, 2, 3])
    worker.drain()
    tokens = worker.tokens("a")
    worker.generate("b", [1, 2, 3], so_far=tokens[:4])
    worker.drain()
    assert worker.tokens("b") == tokens[4:]
    assert [output.tokens[0].index for output in worker.outputs("b")] == [4, 5]
    assert worker.outputs("b")[0].timing.cached_tokens > 0


def test_a_full_queue_is_refused_with_a_hint_and_may_be_tried_elsewhere() -> None:
    worker = Worker(max_queued_requests=1)
    worker.generate("a", [1, 2, 3])
    worker.generate("b", [1, 2, 3])
    (failed,) = worker.failures()
    assert failed.request_id == "b"
    assert failed.error.code == worker_pb2.ERROR_CODE_RESOURCE_EXHAUSTED
    assert failed.retryable
    assert failed.error.retry_after_s == RETRY_AFTER_FULL_S
    assert worker.done() == ["b"]
    worker.drain()
    assert len(worker.tokens("a")) == 6


def test_what_could_never_be_served_is_the_clients_error() -> None:
    worker = Worker()
    worker.generate("a", [10**6])
    (failed,) = worker.failures()
    assert failed.error.code == worker_pb2.ERROR_CODE_INVALID_ARGUMENT
    assert not failed.retryable
    assert worker.role.is_idle()


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_abort_frees_it_in_every_phase(steps: int) -> None:
    """While it waits, between two chunks, and while it decodes."""
    worker = Worker()
    worker.generate("a", [1] * 20)
    for _ in range(steps):
        worker.step()
    worker.abort("a")
    worker.abort("a")
    worker.drain()
    assert worker.done() == ["a"]
    assert worker.role.is_idle()
    counts = worker.engine.scheduler.page_counts()
    assert (counts.in_use, counts.held) == (0, 0)
    assert not worker.failures()


def test_other_roles_messages_change_nothing() -> None:
    worker = Worker()
    worker.role.handle(channel_pb2.FrontToEngine(prefill=worker_pb2.PrefillRequest(request_id="a")))
    worker.abort("unknown")
    assert worker.said == []
