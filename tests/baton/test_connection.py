"""Losing a router and finding it again; leaving a stream in every way there is."""

import asyncio
import contextlib
import gc
import time
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest

import baton
from baton.connection import ConnectionConfig
from protos.baton.v1 import inference_pb2_grpc
from tests.baton.scripted import ScriptedInference


@contextlib.contextmanager
def router_on(port: int, inference: ScriptedInference) -> Iterator[int]:
    """A scripted router on a port that a later one can take again; it ends without a word."""
    options = [("grpc.so_reuseport", 0)]
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4), options=options)
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield bound
    finally:
        server.stop(grace=None).wait()


def test_after_a_restart_the_next_call_works(inference: ScriptedInference) -> None:
    with router_on(0, inference) as port:
        client = baton.Client(f"127.0.0.1:{port}")
        stream = client.generate("endless")
        next(stream)
    with client:
        with pytest.raises((baton.Unavailable, baton.Cancelled)):
            for _ in stream:
                pass
        with pytest.raises(baton.Unavailable):
            client.complete("Hi", timeout=20.0)
        with router_on(port, inference):
            # Within gRPC's pause between two attempts, where calls fail at once by default.
            assert client.complete("Hi", timeout=20.0).text == "Hi"


async def test_after_a_restart_the_next_asyncio_call_works(inference: ScriptedInference) -> None:
    with router_on(0, inference) as port:
        client = baton.AsyncClient(f"127.0.0.1:{port}")
        stream = client.generate("endless")
        await anext(stream)
    async with client:
        with pytest.raises((baton.Unavailable, baton.Cancelled)):
            async for _ in stream:
                pass
        with pytest.raises(baton.RequestError):
            await client.complete("Hi", timeout=0.5)
        with router_on(port, inference):
            assert (await client.complete("Hi", timeout=20.0)).text == "Hi"
            assert [model.id for model in await client.models(timeout=20.0)] == ["echo"]


async def test_a_router_that_stays_away_is_given_up_after_the_stated_wait() -> None:
    config = ConnectionConfig(reconnect_wait_s=0.5)
    async with baton.AsyncClient("127.0.0.1:1", config=config) as client:
        for call in (client.complete, client.complete):
            began = time.monotonic()
            with pytest.raises(baton.Unavailable):
                await call("Hi")
            assert time.monotonic() - began < 3.0


def test_without_waiting_a_lost_router_is_an_error_at_once() -> None:
    with baton.Client("127.0.0.1:1", config=ConnectionConfig(reconnect_wait_s=0.0)) as client:
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(baton.Unavailable):
                client.models(timeout=10.0)
            assert time.monotonic() - began < 1.0


def test_the_wait_for_a_lost_router_counts_towards_the_deadline() -> None:
    with baton.Client("127.0.0.1:1") as client:
        with pytest.raises(baton.Unavailable):
            client.models(timeout=5.0)
        began = time.monotonic()
        with pytest.raises((baton.DeadlineExceeded, baton.Unavailable)):
            client.models(timeout=0.3)
        assert time.monotonic() - began < 2.0


def test_an_abandoned_generator_over_a_stream_cancels_the_request(
    address: str, inference: ScriptedInference
) -> None:
    with baton.Client(address) as client:

        def texts() -> Iterator[str]:
            for chunk in client.generate("endless"):
                yield chunk.text

        generator = texts()
        next(generator)
        del generator
        gc.collect()
        assert inference.ended.wait(5.0)


async def test_an_abandoned_asyncio_stream_cancels_the_request(
    address: str, inference: ScriptedInference
) -> None:
    async with baton.AsyncClient(address) as client:
        stream = client.generate("endless")
        await anext(stream)
        del stream
        gc.collect()
        assert await asyncio.to_thread(inference.ended.wait, 5.0)


async def test_cancelling_the_task_cancels_the_request(
    address: str, inference: ScriptedInference
) -> None:
    async with baton.AsyncClient(address) as client:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in client.generate("hang"):
                started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(inference.ended.wait, 5.0)


async def test_a_closed_asyncio_stream_ends_with_cancelled(address: str) -> None:
    async with baton.AsyncClient(address) as client:
        stream = client.generate("endless")
        await anext(stream)
        await stream.close()
        with pytest.raises(baton.Cancelled):
            async for _ in stream:
                pass


async def test_closing_the_client_ends_its_streams_with_cancelled(address: str) -> None:
    client = baton.AsyncClient(address)
    stream = client.generate("hang")
    await anext(stream)
    reading = asyncio.create_task(stream.__anext__())
    await asyncio.sleep(0.05)
    await client.close()
    with pytest.raises(baton.Cancelled):
        await reading


def test_a_default_deadline_holds_for_calls_that_name_none(address: str) -> None:
    with (
        baton.Client(address, config=ConnectionConfig(default_timeout_s=0.3)) as client,
        pytest.raises(baton.DeadlineExceeded),
    ):
        client.complete("hang")
