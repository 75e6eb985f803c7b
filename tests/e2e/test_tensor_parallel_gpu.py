"""KV from the GPUs of one worker to those of another through cuda_ipc, whatever their numbers: each
rank maps the windows of the ranks that want its heads. Both workers' ranks share two GPUs."""

from pathlib import Path

import pytest
import torch

from baton import Client
from tests.e2e.parts import running_parts
from tests.e2e.test_oracle import CHUNK, NEW, Reference, prompts
from tests.e2e.worker_status import get_status

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2,
        reason=f"needs two CUDA devices; torch sees {torch.cuda.device_count()}",
    ),
]

FLAGS = ("--device", "cuda", "--dtype", "float32", "--max-total-tokens", "4096",
         "--transport", "cuda_ipc")  # fmt: skip


@pytest.mark.parametrize(
    ("theirs", "mine", "split"), [(2, 2, 0), (1, 2, 0), (2, 1, 1)], ids=["2to2", "1to2", "2to1"]
)
def test_ranks_on_two_gpus_hand_over_what_transformers_continues(
    llama: Path, tmp_path: Path, theirs: int, mine: int, split: int
) -> None:
    reference = Reference(llama)
    chunk = ("--chunked-prefill-size", str(CHUNK), "--split-prefill-layers", str(split))
    with running_parts(llama, tmp_path) as parts:
        router = parts.router()
        prefill = (*FLAGS, *chunk, "--page-size", "16", "--tp", str(theirs))
        parts.worker("prefill", router, flags=prefill)
        parts.worker("decode", router, flags=(*FLAGS, "--page-size", "32", "--tp", str(mine)))
        router.wait_until_ready()
        with Client(router.grpc) as client:
            for prompt in prompts(reference.vocab):
                answer = client.complete(prompt, max_tokens=NEW, temperature=0, ignore_eos=True)
                assert answer.token_ids == reference.continue_greedily(prompt, NEW)[0]
                assert answer.report.transport == "cuda_ipc"
                turn = prompt + answer.token_ids + [7, 8, 9]
                second = client.complete(turn, max_tokens=NEW, temperature=0, ignore_eos=True)
                assert second.token_ids == reference.continue_greedily(turn, NEW)[0]
                assert (answer.report.replays, second.report.replays) == (0, 0)
        if split or theirs == 1:
            status = get_status(router.worker("prefill")["address"])
            assert status.early_layers_sent > 0, "parts of a step, or what one device marks"
        router.wait_until_balanced()
