"""What a request that joins the running batch does not wait for."""

from typing import Any

import pytest

from engine.scheduler.req import Req
from engine.scheduler.schedule_batch import ScheduleBatch
from kvtransfer.landing import FoundSeals, Seals
from protos.baton.v1 import worker_pb2
from tests.engine.scheduler.stub import make_req, undisturbed
from tests.worker.handover import DECODE, Handover
from worker.engine_role import make_rid


def test_a_newcomers_token_goes_ahead_of_those_who_had_one_a_step_ago() -> None:
    handover = Handover()
    steps: list[tuple[int, list[str]]] = []
    hear = handover._hear

    def listen(worker: Any, message: Any) -> None:
        if worker.instance == DECODE and message.WhichOneof("kind") == "step":
            names = [output.request_id for output in message.step.outputs]
            steps.append((message.step.step, names))
        hear(worker, message)

    handover._hear = listen  # type: ignore[method-assign]
    handover.generate("early", [1, 2, 3, 4, 5], max_tokens=40)
    while len(handover.output("early")) < 3:
        handover.step()
    handover.generate("late", [6, 7, 8], max_tokens=40)
    while len(handover.output("late")) < 3:
        handover.step()
    first = next(index for index, (_, names) in enumerate(steps) if "late" in names)
    number = steps[first][0]
    assert steps[first : first + 2] == [(number, ["late"]), (number, ["early"])]
    assert steps[first + 2] == (number + 1, ["early", "late"])


def order_of_forwards_and_accepts(prompt: list[int], slots: int) -> list[str]:
    handover = Handover(slots=slots)
    done: list[str] = []
    agent, runner = handover.decode.agent, handover.decode.scheduler.runner
    accept, forward = agent.accept, runner.forward

    def accepted(request_id: str, positions: Any) -> None:
        assert request_id == make_rid("r", 0)
        done.append("accept")
        accept(request_id, positions)

    def computed(batch: Any) -> Any:
        done.append("forward")
        return forward(batch)

    agent.accept = accepted  # type: ignore[method-assign]
    runner.forward = computed  # type: ignore[method-assign]
    handover.generate("r", prompt)
    exact = undisturbed(make_req("r", prompt, max_new_tokens=6))
    while not handover.output("r"):
        handover.step()
    for _ in range(4):  # what prefill still says is heard at once
        handover.step(busy=DECODE)
    while handover.output("r") != exact:
        handover.step()
    handover.step()
    assert not handover.owned()
    return done


def test_the_last_pages_are_acknowledged_behind_the_launch_of_the_first_step() -> None:
    assert order_of_forwards_and_accepts([1, 2, 3], slots=8)[:2] == ["forward", "accept"]


def test_pages_whose_slots_are_waited_for_are_acknowledged_at_once() -> None:
    done = order_of_forwards_and_accepts(list(range(1, 31)), slots=4)
    assert done.index("forward") > 1


def until_described(handover: Handover, name: str, prompt: list[int]) -> Req:
    """Runs until decode has prepared for the request, of which no page has landed."""
    handover.generate(name, prompt)
    scheduler, rid = handover.decode.scheduler, make_rid(name, 0)
    for _ in range(10):
        handover.step()
        landing = handover.decode.role._landings.get(rid)
        if landing is not None and landing.req in scheduler.newcomers:
            assert not landing.accepted
            return landing.req
    raise AssertionError("decode was not told that pages are coming")


def test_a_request_is_described_while_its_last_pages_are_on_their_way() -> None:
    handover = Handover(behind=True, overlap=True)
    req = until_described(handover, "r", [1, 2, 3])
    scheduler, described = handover.decode.scheduler, []
    describe = scheduler.running_batch.__class__.describe_prebuilt
    with pytest.MonkeyPatch.context() as patch:

        def counted(batch: Any, pages: Any) -> Any:
            described.append(batch)
            return describe(batch, pages)

        patch.setattr(scheduler.running_batch.__class__, "describe_prebuilt", counted)
        while not handover.output("r"):
            handover.step()
        handover.step()
        while req in scheduler.newcomers:
            handover.step()
    assert not described, "nothing of it is made again when it joins"
    exact = undisturbed(make_req("r", [1, 2, 3], max_new_tokens=6))
    for _ in range(20):
        handover.step()
    assert handover.output("r") == exact
    assert not handover.owned()


def test_a_request_that_is_described_and_does_not_come_gives_its_row_and_pages_back() -> None:
    handover = Handover(behind=True, overlap=True)
    until_described(handover, "r", [1, 2, 3])
    handover.abort("r")
    for _ in range(20):
        handover.step()
    assert not handover.decode.scheduler.newcomers.rows
    assert not handover.owned()


def test_a_bit_that_flips_after_the_request_was_described_is_no_token() -> None:
    handover = Handover(behind=True, overlap=True)
    until_described(handover, "r", [1, 2, 3])
    window = handover.decode.window
    assert window is not None
    window.memory[:, 0] ^= 1
    for _ in range(20):
        handover.step()
        if handover.errors["r"]:
            break
    [(_, who, error), *_] = handover.errors["r"]
    assert (who, error.code) == (DECODE, worker_pb2.ERROR_CODE_DATA_LOSS)
    assert len(handover.output("r")) <= 1, "prefill's token is all that was drawn"
    for _ in range(20):
        handover.step()
    assert not handover.decode.scheduler.newcomers.rows
    assert not handover.owned()


def test_pages_are_checked_while_the_first_step_is_prepared_and_before_it_is_launched() -> None:
    handover = Handover(behind=True, overlap=True)
    done: list[str] = []
    decode = handover.decode
    lander, runner = decode.role.parts.lander, decode.scheduler.runner
    start, forward = lander.start, runner.forward
    prepare = ScheduleBatch.prepare_for_decode

    class Found:
        def __init__(self, found: FoundSeals) -> None:
            self._found = found

        def found(self) -> Seals:
            done.append("checked")
            return self._found.found()

    def started(*arguments: Any, **named: Any) -> Found:
        done.append("copying")
        return Found(start(*arguments, **named))

    def prepared(batch: ScheduleBatch) -> None:
        done.append("prepared")
        prepare(batch)

    def computed(batch: Any) -> Any:
        done.append("launched")
        return forward(batch)

    lander.start = started
    runner.forward = computed  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScheduleBatch, "prepare_for_decode", prepared)
        handover.generate("r", [1, 2, 3])
        for _ in range(20):
            handover.step()
    assert done[:4] == ["copying", "prepared", "checked", "launched"]
    assert handover.output("r") == undisturbed(make_req("r", [1, 2, 3], max_new_tokens=6))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("behind", [False, True])
def test_who_runs_never_notices_a_newcomer_whose_pages_are_spoilt(
    overlap: bool, behind: bool
) -> None:
    handover = Handover(behind=behind, overlap=overlap)
    handover.generate("runs", [1, 2, 3, 4, 5], max_tokens=40)
    while len(handover.output("runs")) < 3:
        handover.step()
    prompt = [6, 7, 8, 9, 10, 11]
    lander = handover.decode.role.parts.lander
    start = lander.start

    def spoil(window: Any, *arguments: Any, **named: Any) -> Any:
        window[:, 3] ^= 4
        return start(window, *arguments, **named)

    lander.start = spoil
    handover.generate("spoilt", prompt)
    while not handover.errors["spoilt"]:
        handover.step()
    lander.start = start
    assert [error.code for _, _, error in handover.errors["spoilt"]] == [
        worker_pb2.ERROR_CODE_DATA_LOSS
    ] * len(handover.errors["spoilt"])
    assert len(handover.output("spoilt")) <= 1, "no token was drawn from spoilt KV"
    handover.generate("again", prompt)
    exact = {
        "runs": undisturbed(make_req("runs", [1, 2, 3, 4, 5], max_new_tokens=40)),
        "again": undisturbed(make_req("again", prompt, max_new_tokens=6)),
    }
    for _ in range(60):
        handover.step()
    assert {name: handover.output(name) for name in exact} == exact
    assert not handover.owned()


@pytest.mark.parametrize("overlap", [False, True])
def test_prompts_that_leave_behind_their_step_end_exactly_whatever_they_ask_for(
    overlap: bool,
) -> None:
    handover = Handover(behind=True, overlap=overlap)
    prompts = {"one": ([1, 2, 3], 1), "two": ([4] * 6, 2), "chunks": (list(range(1, 24)), 5)}
    exact = {}
    for name, (prompt, max_tokens) in prompts.items():
        handover.generate(name, prompt, max_tokens=max_tokens)
        exact[name] = undisturbed(make_req(name, prompt, max_new_tokens=max_tokens))
    for _ in range(60):
        handover.step()
    assert {name: handover.output(name) for name in prompts} == exact
    assert not any(handover.errors.values())
    assert not handover.owned()
