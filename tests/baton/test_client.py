"""The client library against a scripted router."""

import gc
import time
from collections.abc import Iterator

import pytest

import baton
from protos.errors import BatonError, ErrorCode
from tests.baton.scripted import ScriptedInference


@pytest.fixture
def client(address: str) -> Iterator[baton.Client]:
    with baton.Client(address) as connected:
        yield connected


def test_a_stream_yields_text_tokens_and_a_last_report(client: baton.Client) -> None:
    with client.generate("Hi") as stream:
        chunks = list(stream)
    assert [chunk.text for chunk in chunks] == ["H", "i", ""]
    assert [token.index for chunk in chunks for token in chunk.tokens] == [0, 1]
    assert chunks[-1].finish_reason == "length"
    assert chunks[-1].report is not None
    assert chunks[-1].report.phases_ms["ttft"] == 3.0
    assert stream.request_id == "drawn-by-router"


def test_a_completion_joins_its_stream(client: baton.Client) -> None:
    completion = client.complete([72, 105], logprobs=True)
    assert completion.text == "Hi"
    assert completion.token_ids == [72, 105]
    assert completion.logprobs == [-0.5, -0.5]
    assert completion.usage.prompt_tokens == 2
    assert completion.report.transport == "grpc"
    assert completion.report.kv_bytes == 4096
    assert (completion.report.prefill_worker, completion.report.decode_worker) == (
        "prefill-a",
        "decode-b",
    )


def test_only_a_completion_is_asked_for_whole(
    client: baton.Client, inference: ScriptedInference
) -> None:
    client.complete("a")
    list(client.generate("a"))
    assert [request.whole for request in inference.requests] == [True, False]


def test_what_the_caller_leaves_out_stays_absent(
    client: baton.Client, inference: ScriptedInference
) -> None:
    client.complete("a", temperature=0.0, seed=2**64 - 1)
    sampling = inference.requests[0].sampling
    assert sampling.HasField("temperature")
    assert sampling.seed == 2**64 - 1
    assert not any(
        sampling.HasField(name) for name in ("top_p", "top_k", "max_tokens", "ignore_eos")
    )


def test_an_empty_list_of_ids_is_sent_as_such(
    client: baton.Client, inference: ScriptedInference
) -> None:
    client.complete([])
    assert inference.requests[0].WhichOneof("prompt") == "token_ids"


@pytest.mark.parametrize("prompt", [[-1], [2**64], [1.5], ["a"]])
def test_ids_that_the_wire_cannot_carry_are_refused_here(
    client: baton.Client, prompt: list[int], inference: ScriptedInference
) -> None:
    with pytest.raises(baton.InvalidRequest) as error:
        client.generate(prompt, request_id="r")
    assert error.value.request_id == "r"
    assert not inference.requests


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("INVALID_ARGUMENT", baton.InvalidRequest),
        ("NOT_FOUND", baton.NotFound),
        ("ALREADY_EXISTS", baton.AlreadyExists),
        ("RESOURCE_EXHAUSTED", baton.ResourceExhausted),
        ("FAILED_PRECONDITION", baton.FailedPrecondition),
        ("ABORTED", baton.Aborted),
        ("UNAVAILABLE", baton.Unavailable),
        ("DEADLINE_EXCEEDED", baton.DeadlineExceeded),
        ("DATA_LOSS", baton.DataLoss),
        ("INTERNAL", baton.InternalError),
        ("UNKNOWN", baton.InternalError),
    ],
)
def test_a_status_becomes_its_own_error(
    client: baton.Client, status: str, expected: type[baton.RequestError]
) -> None:
    with pytest.raises(expected, match="as the script says") as error:
        client.complete(f"fail:{status}", request_id="r1")
    assert type(error.value) is expected
    assert error.value.retry_after_s == 1.5
    assert error.value.request_id == "r1"


def test_every_code_of_the_contract_has_an_error() -> None:
    codes = {cls.status for cls in baton.RequestError.__subclasses__()}
    assert codes == set(ErrorCode)
    assert issubclass(baton.RequestError, BatonError)


def test_a_break_cancels_the_request(client: baton.Client, inference: ScriptedInference) -> None:
    for _ in client.generate("endless"):
        break
    gc.collect()
    assert inference.ended.wait(5.0)


def test_leaving_the_context_cancels_the_request(
    client: baton.Client, inference: ScriptedInference
) -> None:
    with client.generate("endless") as stream:
        next(stream)
        assert not inference.ended.is_set()
    assert inference.ended.wait(5.0)


def test_a_closed_stream_ends_with_cancelled(client: baton.Client) -> None:
    stream = client.generate("endless")
    next(stream)
    stream.close()
    with pytest.raises(baton.Cancelled):
        for _ in stream:
            pass


def test_a_silent_server_runs_into_the_deadline(client: baton.Client) -> None:
    started = time.monotonic()
    with pytest.raises(baton.DeadlineExceeded):
        client.complete("hang", timeout=0.3)
    assert time.monotonic() - started < 5.0


def test_an_absent_router_is_unavailable() -> None:
    with baton.Client("127.0.0.1:1") as client, pytest.raises(baton.Unavailable):
        client.server_info(timeout=5.0)


def test_abort_says_whether_the_request_was_live(client: baton.Client) -> None:
    assert client.abort("live") is True
    assert client.abort("gone") is False


def test_models_and_workers_are_listed(client: baton.Client) -> None:
    assert [model.id for model in client.models()] == ["echo"]
    prefill, decode = client.server_info().workers
    assert (prefill.role, prefill.state) == ("prefill", "ready")
    assert decode.pages == {"free": 5, "cached": 3, "held": 0, "in_use": 0, "total": 8}


async def test_the_asyncio_client_streams(address: str) -> None:
    async with (
        baton.AsyncClient(f"grpc://{address}") as client,
        client.generate("Hi") as stream,
    ):
        assert "".join([chunk.text async for chunk in stream]) == "Hi"


async def test_the_asyncio_client_completes_and_lists(
    address: str, inference: ScriptedInference
) -> None:
    async with baton.AsyncClient(address) as client:
        assert (await client.complete([72, 105])).text == "Hi"
        assert inference.requests[-1].whole
        assert [model.id for model in await client.models()] == ["echo"]
        assert len((await client.server_info()).workers) == 2
        assert await client.abort("live") is True


async def test_the_asyncio_client_raises_typed_errors(address: str) -> None:
    async with baton.AsyncClient(address) as client:
        with pytest.raises(baton.ResourceExhausted) as error:
            await client.complete("fail:RESOURCE_EXHAUSTED")
        assert error.value.retry_after_s == 1.5
        with pytest.raises(baton.DeadlineExceeded):
            await client.complete("hang", timeout=0.3)


async def test_leaving_an_asyncio_stream_cancels_the_request(
    address: str, inference: ScriptedInference
) -> None:
    async with baton.AsyncClient(address) as client:
        async with client.generate("endless") as stream:
            await anext(aiter(stream))
        assert inference.ended.wait(5.0)
