"""Finished layers leave while others are computed, between real workers: of a step in parts, and
on a GPU of any step."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from baton import Client
from kvtransfer.nixl_transport import unavailable_reason
from tests.checkpoints import random_prompt, reference_model
from tests.e2e.cluster import Cluster, running_cluster
from tests.e2e.parts import running_parts
from tests.e2e.test_oracle import Reference
from tests.e2e.worker_status import Probe, get_status

NIXL = pytest.param(
    "nixl", marks=pytest.mark.skipif(bool(unavailable_reason()), reason=unavailable_reason())
)


@pytest.fixture(scope="module", params=[NIXL, "grpc"])
def cluster(
    llama: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Cluster]:
    flags = (
        "--page-size", "16",
        "--chunked-prefill-size", "64",
        "--transport", request.param,
        "--split-prefill-layers", "1",
    )  # fmt: skip
    with running_cluster(llama, tmp_path_factory.mktemp("early"), *flags) as running:
        yield running


def test_tokens_are_exact_and_layers_left_early(cluster: Cluster, llama: Path) -> None:
    model = reference_model(llama)
    prompts = [random_prompt(length, seed=length) for length in (16, 37, 64, 150)]
    with Client(cluster.grpc) as client:
        for prompt in prompts:
            answer = client.complete(prompt, max_tokens=8, temperature=0, ignore_eos=True)
            with torch.no_grad():
                expected = model.generate(
                    torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=-1
                )[0, len(prompt) :].tolist()
            assert answer.token_ids == expected
            assert answer.report.replays == 0
    probe = Probe(cluster)
    try:
        assert answer.report.transport == probe.transport
        assert probe.prefill().early_layers_sent > 0
    finally:
        probe.close()
    cluster.wait_until_balanced()


@pytest.mark.gpu
@pytest.mark.parametrize(("transport", "ranks"), [("nixl", 1), ("grpc", 1), ("cuda_ipc", 2)])
def test_on_a_gpu_the_host_sends_layers_on_while_the_last_ones_are_computed(
    slow_llama: Path, tmp_path: Path, transport: str, ranks: int
) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    reference = Reference(slow_llama)
    flags = ("--device", "cuda", "--dtype", "float32", "--max-total-tokens", "16384",
             "--transport", transport, "--tp", str(ranks))  # fmt: skip
    with running_parts(slow_llama, tmp_path) as parts:
        router = parts.router()
        for role in ("prefill", "decode"):
            parts.worker(role, router, flags=flags)
        router.wait_until_ready()
        with Client(router.grpc) as client:
            for length in (100, 900, 1800):
                prompt = random_prompt(length, seed=length)
                answer = client.complete(prompt, max_tokens=8, temperature=0, ignore_eos=True)
                assert answer.token_ids == reference.continue_greedily(prompt, 8)[0]
                assert answer.report.transport == transport
                assert answer.report.replays == 0
        assert get_status(router.worker("prefill")["address"]).early_layers_sent > 0
        router.wait_until_balanced()
