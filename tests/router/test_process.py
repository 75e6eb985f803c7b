"""The router as a process, and as the official OpenAI client meets it."""

import asyncio
import os
import signal
from dataclasses import replace

import openai
import pytest

from router.main import Ports, serve
from tests.router.conftest import FAST, Cluster
from tests.router.fakes import Script


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_the_router(number: signal.Signals) -> None:
    opened: asyncio.Future[Ports] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(FAST, ready=opened.set_result))
    ports = await opened
    assert ports.http
    assert ports.grpc
    os.kill(os.getpid(), number)
    await asyncio.wait_for(serving, 5)


async def test_a_taken_port_is_named(cluster: Cluster) -> None:
    for taken in (
        replace(FAST, http_port=cluster.ports.http),
        replace(FAST, grpc_port=cluster.ports.grpc),
    ):
        port = taken.http_port or taken.grpc_port
        with pytest.raises(OSError, match=str(port)):
            await serve(taken)


async def test_the_openai_client_reads_answers_streams_and_errors(cluster: Cluster) -> None:
    await cluster.pair(decode=Script())
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{cluster.ports.http}/v1", api_key="none", max_retries=0
    ) as client:
        models = await client.models.list()
        assert [model.id for model in models.data] == ["tiny"]
        whole = await client.completions.create(
            model="tiny", prompt="hello", max_tokens=5, seed=1, logprobs=0
        )
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 5
        stream = await client.completions.create(
            model="tiny", prompt="hello", max_tokens=5, seed=1, stream=True
        )
        text = "".join([c.choices[0].text async for c in stream])
        assert text == whole.choices[0].text
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="other", prompt="hello")
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model="tiny", prompt="hello", suffix="x")
        assert caught.value.param == "suffix"
