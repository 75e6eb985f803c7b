"""Prefill and decode that cut KV differently hand it over all the same, token for token."""

import json
from pathlib import Path

import pytest

from baton import Client
from tests.e2e.parts import running_parts
from tests.e2e.test_oracle import CHUNK, NEW, Reference, prompts


@pytest.mark.parametrize(
    ("transport", "theirs", "mine"), [("grpc", 64, 16), ("nixl", 16, 64), ("nixl", 48, 32)]
)
def test_unequal_pages_equal_transformers(
    llama: Path, tmp_path: Path, transport: str, theirs: int, mine: int
) -> None:
    flags = ("--transport", transport, "--max-total-tokens", "4096", "--page-size")
    chunk = ("--chunked-prefill-size", str(2 * CHUNK))
    reference = Reference(llama)
    with running_parts(llama, tmp_path) as parts:
        router = parts.router()
        parts.worker("prefill", router, flags=(*chunk, *flags, str(theirs)))
        parts.worker("decode", router, flags=(*flags, str(mine)))
        router.wait_until_ready()
        with Client(router.grpc) as client:
            for prompt in prompts(reference.vocab):
                answer = client.complete(prompt, max_tokens=NEW, temperature=0, ignore_eos=True)
                assert answer.token_ids == reference.continue_greedily(prompt, NEW)[0]
                assert answer.report.transport == transport
                assert answer.report.kv_bytes == -(-len(prompt) // theirs) * page_bytes(
                    llama, theirs
                )
                # The second turn's prefix is decode's already, in pages of its own.
                turn = prompt + answer.token_ids + [7, 8, 9]
                second = client.complete(turn, max_tokens=NEW, temperature=0, ignore_eos=True)
                assert second.token_ids == reference.continue_greedily(turn, NEW)[0]
                assert (answer.report.replays, second.report.replays) == (0, 0)
        router.wait_until_balanced()


def page_bytes(model: Path, page_size: int) -> int:
    config = json.loads((model / "config.json").read_text())
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    kv_heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
    return int(page_size * layers * 2 * kv_heads * head_dim * 4)


@pytest.mark.parametrize(
    ("transport", "theirs", "mine"),
    [("nixl", 1, 2), ("nixl", 2, 1), ("grpc", 2, 2), ("grpc", 1, 2)],
)
def test_unequal_ranks_equal_transformers(
    llama: Path, tmp_path: Path, transport: str, theirs: int, mine: int
) -> None:
    flags = ("--transport", transport, "--max-total-tokens", "4096")
    split = ("--chunked-prefill-size", str(CHUNK), "--split-prefill-layers", "1")
    reference = Reference(llama)
    with running_parts(llama, tmp_path) as parts:
        router = parts.router()
        prefill = (*flags, *split, "--page-size", "16", "--tp", str(theirs))
        # Other pages, too, where the ranks are as many.
        size = "32" if theirs == mine else "16"
        parts.worker("prefill", router, flags=prefill)
        parts.worker("decode", router, flags=(*flags, "--page-size", size, "--tp", str(mine)))
        router.wait_until_ready()
        with Client(router.grpc) as client:
            for prompt in prompts(reference.vocab):
                answer = client.complete(prompt, max_tokens=NEW, temperature=0, ignore_eos=True)
                assert answer.token_ids == reference.continue_greedily(prompt, NEW)[0]
                assert answer.report.transport == transport
                assert answer.report.kv_bytes == -(-len(prompt) // 16) * page_bytes(llama, 16)
                turn = prompt + answer.token_ids + [7, 8, 9]
                second = client.complete(turn, max_tokens=NEW, temperature=0, ignore_eos=True)
                assert second.token_ids == reference.continue_greedily(turn, NEW)[0]
                assert (answer.report.replays, second.report.replays) == (0, 0)
        router.wait_until_balanced()
