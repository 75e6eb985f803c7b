"""Greedy tokens through the real processes equal `transformers` in fp32, token for token."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from baton import Client
from tests.checkpoints import write_checkpoint
from tests.e2e.cluster import Cluster, running_cluster

PAGE = 16
CHUNK = 32
NEW = 12
LENGTHS = [1, PAGE - 1, PAGE, PAGE + 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
"""A token, a page less one, a page, a page and one, whole and several chunks."""

FLAGS = (
    "--page-size",
    str(PAGE),
    "--chunked-prefill-size",
    str(CHUNK),
    "--max-total-tokens",
    "4096",
)

FAMILIES = ["llama-mha-tied", "llama3-rope", "llama-sharded", "mistral", "qwen2", "qwen3"]


def prompts(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(5, vocab, (n,), generator=generator).tolist() for n in LENGTHS]


class Reference:
    """transformers' own greedy continuation and the log probability of each token."""

    def __init__(self, directory: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.vocab = json.loads((directory / "config.json").read_text())["vocab_size"]

    @torch.inference_mode()
    def continue_greedily(self, prompt: list[int], new: int) -> tuple[list[int], list[float]]:
        ids, tokens, logprobs = list(prompt), [], []
        for _ in range(new):
            logits = self._model(torch.tensor([ids])).logits[0, -1].float()
            token = int(logits.argmax())
            tokens.append(token)
            logprobs.append(float(logits.log_softmax(-1)[token]))
            ids.append(token)
        return tokens, logprobs


def check(cluster: Cluster, reference: Reference, transport: str, page_bytes_floor: int) -> None:
    with Client(cluster.grpc) as client:
        for prompt in prompts(reference.vocab):
            answer = client.complete(
                prompt, max_tokens=NEW, temperature=0, ignore_eos=True, logprobs=True
            )
            tokens, logprobs = reference.continue_greedily(prompt, NEW)
            assert answer.token_ids == tokens
            assert answer.logprobs == pytest.approx(logprobs, abs=1e-3)
            assert answer.report is not None
            assert answer.report.transport == transport
            pages = -(-len(prompt) // PAGE)
            assert answer.report.kv_bytes >= pages * page_bytes_floor
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == len(prompt)
    cluster.wait_until_balanced()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_equals_transformers(family: str, tmp_path: Path) -> None:
    model_directory = tmp_path / "model"
    model_directory.mkdir()
    model = write_checkpoint(model_directory, family, seed=3)
    with running_cluster(model, tmp_path, *FLAGS) as cluster:
        check(cluster, Reference(model), "nixl", 1)


@pytest.mark.parametrize("transport", ["nixl", "grpc"])
def test_both_transports_equal_transformers_and_say_what_moved(
    llama: Path, tmp_path: Path, transport: str
) -> None:
    with running_cluster(llama, tmp_path, *FLAGS, "--transport", transport) as cluster:
        config = json.loads((llama / "config.json").read_text())
        per_token = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"]
        floor = per_token * PAGE * (config["hidden_size"] // config["num_attention_heads"])
        check(cluster, Reference(llama), transport, floor)
        _concurrent_equal_alone(cluster, Reference(llama))


def _concurrent_equal_alone(cluster: Cluster, reference: Reference) -> None:
    wanted = {
        tuple(prompt): reference.continue_greedily(prompt, NEW)[0]
        for prompt in prompts(reference.vocab)
    }
    with Client(cluster.grpc) as client, ThreadPoolExecutor(16) as pool:

        def ask(prompt: tuple[int, ...]) -> list[int]:
            answer = client.complete(list(prompt), max_tokens=NEW, temperature=0, ignore_eos=True)
            return answer.token_ids

        asked = [prompt for prompt in wanted for _ in range(4)]
        for prompt, tokens in zip(asked, pool.map(ask, asked), strict=True):
            assert tokens == wanted[prompt]
    cluster.wait_until_balanced()


def test_the_http_door_streams_the_same_tokens_and_reports(llama: Path, tmp_path: Path) -> None:
    with running_cluster(llama, tmp_path, *FLAGS) as cluster:
        prompt = prompts(Reference(llama).vocab)[-1]
        body = {"prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        whole = cluster.complete(**body).json()
        text, last = "", {}
        with httpx.stream(
            "POST", f"{cluster.http}/v1/completions", json={**body, "stream": True}, timeout=30
        ) as response:
            lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        for line in lines[:-1]:
            last = json.loads(line)
            text += "".join(choice["text"] for choice in last["choices"])
        assert text == whole["choices"][0]["text"]
        for report in (last["baton"], whole["baton"]):
            assert report["transport"] == "nixl"
            assert report["kv_bytes"] > 0
            assert report["prefill_worker"].startswith("prefill-")
            assert report["decode_worker"].startswith("decode-")
            phases = report["phases_ms"]
            parts = ("admission", "reserve", "queue", "prefill", "network")
            assert sum(phases[p] for p in parts) == pytest.approx(phases["ttft"], abs=1.0)
            tail = ("transfer_tail", "verify", "join", "first_decode_step", "handover_network")
            assert sum(phases[p] for p in tail) == pytest.approx(phases["handover"], abs=1.0)
            assert all(phases[p] >= 0 for p in parts)
        cluster.wait_until_balanced()
