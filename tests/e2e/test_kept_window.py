"""A writer that stops keeps most of a landing window of several ranks: another takes its place on
each of them, between real processes, and requests go on."""

import contextlib
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from baton import Client
from baton.errors import RequestError
from kvtransfer.nixl_transport import unavailable_reason
from tests.checkpoints import random_prompt
from tests.e2e.parts import running_parts
from tests.e2e.worker_status import get_status, wait_for, wait_until_free

SLOTS = 8
ANSWER_S = 5.0
TOKENS = 4
FLAGS = ("--page-size", "16", "--no-enable-radix-cache", "--chunked-prefill-size", "64",
         "--max-total-tokens", "16384", "--lease-s", "2")  # fmt: skip


CASES = [
    pytest.param(
        "nixl",
        2,
        marks=pytest.mark.skipif(bool(unavailable_reason()), reason=unavailable_reason()),
    ),
    ("grpc", 1),
    pytest.param(
        "cuda_ipc",
        2,
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
        ],
    ),
]


@pytest.mark.parametrize(("transport", "theirs"), CASES)
def test_a_window_of_two_ranks_that_a_stopped_writer_keeps_is_replaced_on_both(
    slow_llama: Path, tmp_path: Path, transport: str, theirs: int
) -> None:
    device = "cuda" if transport == "cuda_ipc" else "cpu"
    flags = (*FLAGS, "--transport", transport, "--device", device, "--dtype", "float32")
    prompt = random_prompt(400, seed=1)
    with running_parts(slow_llama, tmp_path) as parts:
        router = parts.router()
        parts.worker("prefill", router, flags=(*flags, "--tp", str(theirs)))
        parts.worker("decode", router, flags=(*flags, "--tp", "2", "--landing-slots", str(SLOTS)))
        router.wait_until_ready()

        def ask(prompt: list[int]) -> list[int]:
            with Client(router.grpc) as client:
                return list(
                    client.complete(
                        prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True
                    ).token_ids
                )

        undisturbed = ask(prompt)
        decode = router.worker("decode")["address"]
        stopped = router.worker("prefill")["engine_pids"]

        def ask_in_vain(seed: int) -> None:
            with contextlib.suppress(RequestError):
                ask(random_prompt(2000, seed=seed))

        # Each may have a quarter of the window under way.
        asking = [threading.Thread(target=ask_in_vain, args=(seed,)) for seed in range(4)]
        for thread in asking:
            thread.start()
        wait_for(
            lambda: get_status(decode).slots_granted == SLOTS, "all slots granted", within_s=30.0
        )
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            for thread in asking:
                thread.join(ANSWER_S)
            assert not any(thread.is_alive() for thread in asking)
            wait_for(lambda: get_status(decode).window_replacements == 1, "another window")
            status = get_status(decode)
            assert status.slots_free == SLOTS
            assert status.slots_quarantined == status.slots_total - SLOTS > SLOTS // 2
            parts.worker("prefill", router, flags=flags)
            wait_for(lambda: router.get("/health").status_code == 200, "a prefill", within_s=60.0)
            assert ask(prompt) == undisturbed
            assert get_status(decode).slots_quarantined == status.slots_quarantined
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        wait_until_free(router, within_s=30.0)
        assert get_status(decode).slots_total == SLOTS
        assert ask(prompt) == undisturbed
        router.wait_until_balanced()
