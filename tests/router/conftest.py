"""A running router with scripted workers."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from protos.baton.v1 import inference_pb2, inference_pb2_grpc
from router.config import RouterConfig
from router.main import RouterServer
from router.policy import Pair
from tests.router.fakes import DECODE, PREFILL, UNIFIED, Bus, FakeWorker, Script, until

FAST = RouterConfig(
    http_port=0,
    grpc_port=0,
    workers_port=0,
    ping_interval_s=0.1,
    silence_timeout_s=0.5,
    replay_wait_s=0.3,
    heartbeat_timeout_s=0.5,
    forget_lost_s=0.6,
)
"""The same rules on shorter clocks."""

CHAT_TEMPLATE = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' and not m.name %}"
    "{{ raise_exception('a tool has a name') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{{ mood }}{% endif %}"
)


def byte_level_bpe() -> Tokenizer:
    """256 byte tokens; ids 256 and 257 are merges, 258 is special."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"th": 256, "Ġth": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("Ġ", "th")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    byte_level_bpe().save(str(path / "tokenizer.json"))
    config = {"chat_template": CHAT_TEMPLATE, "eos_token": "<eos>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


class Cluster:
    """One router, its workers, and clients of both doors."""

    def __init__(self, server: RouterServer, model_dir: Path) -> None:
        self.server, self.router = server, server.router
        self.bus = Bus()
        self.workers: list[FakeWorker] = []
        self._model_dir = model_dir

    async def open(self) -> None:
        self.ports = await self.server.start()
        self.address = f"127.0.0.1:{self.ports.grpc}"
        self.channel = grpc.aio.insecure_channel(self.address)
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)
        self.http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self.ports.http}", timeout=10, trust_env=False
        )

    async def close(self) -> None:
        await self.http.aclose()
        await self.channel.close()
        for worker in self.workers:
            if worker.dead:
                await worker._grave
            await worker.stop()
        await self.server.stop(drain_timeout_s=0.0)
        assert self.router.live == 0

    async def worker(self, role: Any, script: Script | None = None, **kwargs: Any) -> FakeWorker:
        worker = FakeWorker(
            role,
            bus=self.bus,
            router=f"127.0.0.1:{self.ports.workers}",
            script=script,
            **{"path": str(self._model_dir), **kwargs},
        )
        self.workers.append(worker)
        await worker.start()
        return worker

    async def pair(
        self, prefill: Script | None = None, decode: Script | None = None
    ) -> tuple[FakeWorker, FakeWorker]:
        workers = await self.worker(PREFILL, prefill), await self.worker(DECODE, decode)
        await self.usable(*workers)
        return workers

    async def unified(self, script: Script | None = None) -> FakeWorker:
        worker = await self.worker(UNIFIED, script)
        await until(lambda: any(p.prefill.id == worker.id for p in self.pairs()))
        return worker

    def pairs(self) -> list[Pair]:
        """Who can take a small request."""
        return self.router.fleet.pairs(total_tokens=1, prompt_tokens=1)

    async def usable(self, prefill: FakeWorker, decode: FakeWorker) -> None:
        await until(
            lambda: any(
                p.prefill.id == prefill.id and p.decode is not None and p.decode.id == decode.id
                for p in self.router.fleet.pairs(total_tokens=1, prompt_tokens=1)
            ),
            timeout_s=30.0,  # no promise of the router: a loaded machine may take its time
        )

    async def generate(self, **kwargs: Any) -> "Result":
        result = Result()
        async for response in self.stub.Generate(request(**kwargs)):
            result.add(response)
        return result

    async def complete(self, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"prompt": [1, 2, 3], **body})

    async def chat(self, **body: Any) -> httpx.Response:
        said = {"messages": [{"role": "user", "content": "hi"}], "seed": 0}
        return await self.http.post("/v1/chat/completions", json={**said, **body})

    async def events(self, path: str = "/v1/completions", **body: Any) -> list[Any]:
        """The events of a stream, parsed; the last one is "[DONE]"."""
        events: list[Any] = []
        async with self.http.stream("POST", path, json={"stream": True, **body}) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if line:
                    data = line.removeprefix("data: ")
                    events.append(data if data == "[DONE]" else json.loads(data))
        return events


class Result:
    """Everything that one stream said."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.indices: list[int] = []
        self.text = ""
        self.responses: list[inference_pb2.GenerateResponse] = []

    def add(self, response: inference_pb2.GenerateResponse) -> None:
        self.responses.append(response)
        self.ids += [token.id for token in response.tokens]
        self.indices += [token.index for token in response.tokens]
        self.text += response.text

    @property
    def last(self) -> inference_pb2.GenerateResponse:
        return self.responses[-1]


def request(
    prompt: list[int] | str | None = None,
    *,
    request_id: str = "",
    model: str = "",
    whole: bool = False,
    **sampling: Any,
) -> inference_pb2.GenerateRequest:
    made = inference_pb2.GenerateRequest(
        request_id=request_id,
        model=model,
        whole=whole,
        sampling=inference_pb2.SamplingParams(**{"seed": 0, **sampling}),
    )
    if isinstance(prompt, str):
        made.text = prompt
    else:
        made.token_ids.ids.extend([1, 2, 3] if prompt is None else prompt)
    return made


MakeCluster = Callable[..., Awaitable[Cluster]]


@pytest.fixture
async def make_cluster(model_dir: Path) -> AsyncIterator[MakeCluster]:
    clusters: list[Cluster] = []

    async def make(**config: Any) -> Cluster:
        cluster = Cluster(RouterServer(replace(FAST, **config)), model_dir)
        await cluster.open()
        clusters.append(cluster)
        return cluster

    yield make
    for cluster in clusters:
        await cluster.close()


@pytest.fixture
async def cluster(make_cluster: MakeCluster) -> Cluster:
    return await make_cluster()
