"""What a client may cost the doors: each bound is reached here, while another client is served."""

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from router.config import RouterConfig
from router.limits import allow_files
from tests.grpc_by_hand import grpc_call
from tests.router.conftest import Cluster, MakeCluster, request
from tests.router.fakes import DECODE, PREFILL, Script, expected, until

SHORT_S = 0.3
"""The bounds of time under test."""

LIMIT_S = 3.0
"""How long a bound may take to act here: many times itself, for busy machines."""

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


@contextlib.asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def closed(reader: asyncio.StreamReader) -> bytes:
    """What the router still says before it closes the connection."""
    said = b""
    async with asyncio.timeout(LIMIT_S):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                said += data
    return said


async def dribble(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Sends a byte every 30 ms until the router has had enough."""
    with contextlib.suppress(ConnectionError):
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.03)


async def served(cluster: Cluster) -> None:
    assert (await cluster.complete(max_tokens=3)).status_code == 200
    assert (await cluster.generate(max_tokens=3)).ids == expected([1, 2, 3], 3)


# ---- time ---------------------------------------------------------------------------------------


async def test_an_http_connection_that_says_nothing_is_closed(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(head_timeout_s=SHORT_S)
    await cluster.pair()
    async with connection(cluster.ports.http) as (reader, _):
        await served(cluster)
        assert await closed(reader) == b""


async def test_a_head_that_comes_a_byte_at_a_time_is_cut_off(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(head_timeout_s=SHORT_S)
    await cluster.pair()
    async with connection(cluster.ports.http) as (reader, writer):
        slow = asyncio.create_task(dribble(writer, HEAD * 100))
        await served(cluster)
        assert await closed(reader) == b""
        await slow


async def test_a_second_request_that_trickles_in_is_cut_off_too(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(head_timeout_s=SHORT_S)
    async with connection(cluster.ports.http) as (reader, writer):
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200" in await reader.readline()
        slow = asyncio.create_task(dribble(writer, HEAD * 100))
        await closed(reader)
        await slow


async def test_a_body_that_comes_a_byte_at_a_time_is_408_and_the_end(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster(body_timeout_s=SHORT_S, head_timeout_s=SHORT_S)
    await cluster.pair()
    async with connection(cluster.ports.http) as (reader, writer):
        writer.write(HEAD + b"content-length: 1000\r\n\r\n")
        slow = asyncio.create_task(dribble(writer, b" " * 1000))
        await served(cluster)
        assert b" 408 " in await closed(reader)
        await slow
    assert cluster.router.live == 0


async def test_an_unread_body_does_not_keep_an_answered_connection(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster(head_timeout_s=SHORT_S)
    async with connection(cluster.ports.http) as (reader, writer):
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
        slow = asyncio.create_task(dribble(writer, b" " * 1000))
        assert b" 200 " in await closed(reader)
        await slow


async def test_a_connection_that_never_reads_its_answer_is_cut_off(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster(write_timeout_s=SHORT_S, send_buffer_bytes=4096)
    await many_tokens(cluster, delay_s=0.0)
    with stuck_reader(cluster, max_tokens=4000) as (stuck, _):
        await until(lambda: cluster.router.live == 1)
        await until(lambda: cluster.router.live == 0, timeout_s=10)
        server = cluster.server._http
        assert server is not None
        await until(lambda: len(server.server_state.connections) <= 1, timeout_s=LIMIT_S)
        assert stuck.fileno() >= 0


async def test_a_grpc_message_that_comes_a_byte_at_a_time_is_cut_off(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster(body_timeout_s=SHORT_S)
    await cluster.pair()
    for path in (b"/baton.v1.Inference/Generate", b"/baton.v1.Inference/ListModels"):
        async with connection(cluster.ports.grpc) as (reader, writer):
            writer.write(grpc_call(path, message_bytes=1000))
            slow = asyncio.create_task(dribble(writer, b"\x00" * 1000))
            await served(cluster)
            async with asyncio.timeout(LIMIT_S):
                said = await reader.readuntil(b"of the call's beginning")
            assert b"did not arrive within 0.3 s" in said
            slow.cancel()
    await until(lambda: cluster.router.live == 0)


# ---- a reader that stops ------------------------------------------------------------------------


async def many_tokens(cluster: Cluster, *, delay_s: float) -> None:
    sizes = {"context_length": 20_000, "max_total_tokens": 20_000}
    prefill = await cluster.worker(PREFILL, **sizes)
    decode = await cluster.worker(DECODE, Script(token_delay_s=delay_s), **sizes)
    await cluster.usable(prefill, decode)


@contextlib.contextmanager
def stuck_reader(  # type: ignore[no-untyped-def]
    cluster: Cluster, *, max_tokens: int
):
    body = json.dumps(
        {"prompt": [1], "max_tokens": max_tokens, "stream": True, "logprobs": 0}
    ).encode()
    with socket.socket() as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(("127.0.0.1", cluster.ports.http))
        stuck.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        yield stuck, body


async def read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]
        pass


async def test_a_grpc_reader_that_stops_is_ended_and_others_go_on(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster(write_timeout_s=SHORT_S)
    await many_tokens(cluster, delay_s=0.0)
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(cluster.address, options=options) as channel:
        stub = type(cluster.stub)(channel)
        call = stub.Generate(request(max_tokens=9000, request_id="stuck"))
        await call.read()
        await served(cluster)
        await until(lambda: cluster.router.live == 0, timeout_s=15)
        decode = cluster.workers[1]
        await until(lambda: decode.kinds("abort"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(call)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


# ---- size ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_body_over_its_bound_is_413(make_cluster: MakeCluster, chunked: bool) -> None:
    cluster = await make_cluster(max_body_bytes=1000)
    await cluster.pair()

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    content = parts() if chunked else b" " * 2000
    answer = await cluster.http.post("/v1/completions", content=content)
    assert answer.status_code == 413
    assert answer.json()["error"]["message"]
    await served(cluster)


@pytest.mark.parametrize("where", ["one header", "many headers", "target"])
async def test_a_head_over_its_bound_is_431(make_cluster: MakeCluster, where: str) -> None:
    cluster = await make_cluster(max_header_bytes=4096)
    await cluster.pair()
    head = {
        "one header": b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * 8000,
        "many headers": b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"x-more: a\r\n" * 800,
        "target": b"GET /" + b"a" * 8000,
    }[where]
    async with connection(cluster.ports.http) as (reader, writer):
        writer.write(head)
        said = await closed(reader)
    assert said.startswith(b"HTTP/1.1 431 ")
    assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    await served(cluster)


async def test_grpc_metadata_and_messages_over_their_bounds_are_refused(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster(max_header_bytes=4096, max_message_bytes=4096)
    await cluster.pair()
    for metadata, prompt in (((("x-long", "a" * 8000),), [1]), ((), [1] * 8000)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in cluster.stub.Generate(request(prompt), metadata=metadata):
                pass
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    await served(cluster)


# ---- number -------------------------------------------------------------------------------------


async def test_one_http_connection_more_takes_the_place_of_the_longest_idle(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster(max_connections=4)
    await cluster.pair(decode=Script(token_delay_s=0.2))
    body = json.dumps({"prompt": [1], "max_tokens": 9, "stream": True}).encode()
    async with contextlib.AsyncExitStack() as stack:
        busy, writer = await stack.enter_async_context(connection(cluster.ports.http))
        writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: cluster.router.live == 1)
        idle = [await stack.enter_async_context(connection(cluster.ports.http)) for _ in range(3)]
        newest, writer = await stack.enter_async_context(connection(cluster.ports.http))
        assert await closed(idle[0][0]) == b""
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b" 200 " in await newest.readline()
        async with asyncio.timeout(LIMIT_S):
            assert b"[DONE]" in await busy.readuntil(b"[DONE]")


async def test_where_all_connections_are_busy_one_more_is_told_to_come_again(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster(max_connections=2)
    await cluster.pair(decode=Script(token_delay_s=10))
    body = json.dumps({"prompt": [1], "max_tokens": 9}).encode()
    async with contextlib.AsyncExitStack() as stack:
        for count in (1, 2):
            _, writer = await stack.enter_async_context(connection(cluster.ports.http))
            writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
            await until(lambda count=count: cluster.router.live == count)  # type: ignore[misc]
        reader, _ = await stack.enter_async_context(connection(cluster.ports.http))
        said = await closed(reader)
    assert said.startswith(b"HTTP/1.1 503 ")
    assert b"Retry-After: 1" in said
    await until(lambda: cluster.router.live == 0)


async def test_one_grpc_connection_more_is_closed_and_the_others_are_served(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster(max_grpc_connections=3)
    await cluster.pair()
    async with contextlib.AsyncExitStack() as stack:
        await served(cluster)  # client and workers are one process, whose channels share one
        for _ in range(2):
            await stack.enter_async_context(connection(cluster.ports.grpc))
        more, _ = await stack.enter_async_context(connection(cluster.ports.grpc))
        assert await closed(more) == b""
        await served(cluster)


async def test_many_idle_connections_disturb_nobody(cluster: Cluster) -> None:
    await cluster.pair()
    async with contextlib.AsyncExitStack() as stack:
        for port in (cluster.ports.http, cluster.ports.grpc):
            for _ in range(150):
                await stack.enter_async_context(connection(port))
        await served(cluster)


async def test_a_burst_beyond_the_bound_is_refused_with_a_hint_on_both_doors(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster(max_queued_requests=5)
    await cluster.pair(decode=Script(token_delay_s=0.05))
    errors: list[grpc.aio.AioRpcError] = []

    async def over_grpc() -> None:
        try:
            await cluster.generate(max_tokens=4)
        except grpc.aio.AioRpcError as error:
            errors.append(error)

    _, *answers = await asyncio.gather(
        asyncio.gather(*(over_grpc() for _ in range(40))),
        *(cluster.complete(max_tokens=4) for _ in range(40)),
    )
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) + len(errors) < 80
    assert errors
    assert refused
    assert all(answer.status_code == 429 for answer in refused)
    assert all(answer.headers["retry-after"] == "1" for answer in refused)
    assert all(error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED for error in errors)
    assert all(dict(error.trailing_metadata())["retry-after"] == "1" for error in errors)
    await served(cluster)


def test_open_files_bound_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limits = [1024, 2048]

    def change(_: int, new: tuple[int, int]) -> None:
        limits[:] = new

    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", change)
    assert allow_files(600, 400) == [600, 400]
    assert limits == [1512, 2048]
    assert allow_files(4096, 2048) == [1024, 512], "shares of 2048 - 512"
    assert limits == [2048, 2048]


# ---- what is no HTTP ----------------------------------------------------------------------------

GARBAGE = {
    "zeros": b"\x00" * 5000,
    "text": b"hello?\r\n\r\n",
    "tls": ssl.OP_ALL.to_bytes(4, "big") + b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 50,
    "the wrong door": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 500,
    "two lengths": HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
    "a broken chunk": HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
}


@pytest.mark.parametrize("case", GARBAGE)
async def test_garbage_is_answered_by_the_end_of_the_connection(
    make_cluster: MakeCluster, case: str
) -> None:
    cluster = await make_cluster(head_timeout_s=SHORT_S)
    await cluster.pair()
    async with connection(cluster.ports.http) as (reader, writer):
        writer.write(GARBAGE[case])
        said = await closed(reader)
        assert b" 400 " in said or not said
    async with connection(cluster.ports.grpc) as (reader, writer):
        writer.write(GARBAGE[case])
        if case != "the wrong door":
            await closed(reader)
    await served(cluster)
    assert cluster.router.live == 0


def test_every_bound_is_a_setting_above_zero() -> None:
    for name in (
        "head_timeout_s",
        "max_connections",
        "max_grpc_connections",
        "send_buffer_bytes",
        "max_header_bytes",
    ):
        with pytest.raises(ValueError, match=name):
            RouterConfig(**{name: 0})  # type: ignore[arg-type]
