"""A worker is killed, restarted at its address, or stopped past the lease, while KV travels: over
NIXL and over gRPC, between real processes. Exact tokens or a typed error within 5 s, and everything
comes back.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from baton import Client
from baton.errors import RequestError
from tests.checkpoints import random_prompt
from tests.e2e.parts import Parts, free_port, running_parts
from tests.e2e.worker_status import get_status, wait_for, wait_until_free

pytestmark = pytest.mark.timeout(400)

ANSWER_S = 5.0
LEASE_S = 4.0
SETTLE_S = LEASE_S + 1.0
PROMPT = random_prompt(3000, seed=8)
"""Prefilled in many chunks: its first pages land long before its last are computed."""
TOKENS = 8


class Pair:
    """A router, and a worker of each role at an address of its own."""

    def __init__(self, parts: Parts, transport: str) -> None:
        self._parts = parts
        self._flags = ("--transport", transport, "--page-size", "16", "--no-enable-radix-cache",
                       "--chunked-prefill-size", "64", "--max-total-tokens", "8192",
                       "--lease-s", str(LEASE_S))  # fmt: skip
        self._ports = {"prefill": free_port(), "decode": free_port()}
        self.router = parts.router()
        for role in self._ports:
            self.start(role)
        self.router.wait_until_ready()

    def start(self, role: str) -> None:
        port = str(self._ports[role])
        self._parts.worker(role, self.router, flags=(*self._flags, "--port", port))

    def signal(self, role: str, number: signal.Signals) -> dict[str, Any]:
        """Front and engine at once, as when a machine is gone."""
        worker = self.router.worker(role)
        for pid in (*worker["engine_pids"], worker["pid"]):
            os.kill(pid, number)
        return worker

    def generate(self) -> list[int]:
        with Client(self.router.grpc) as client:
            answer = client.complete(
                PROMPT, max_tokens=TOKENS, temperature=0, ignore_eos=True, timeout=60.0
            )
        return list(answer.token_ids)


@pytest.fixture(scope="module", params=["nixl", "grpc"])
def pair(
    request: pytest.FixtureRequest, slow_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    with ExitStack() as stack:
        directory = tmp_path_factory.mktemp("pair")
        parts = stack.enter_context(running_parts(slow_llama, directory))
        yield Pair(parts, str(request.param))


class Disturbed:
    """A request during which something happens, once its first pages have landed."""

    def __init__(self, pair: Pair, role: str, number: signal.Signals) -> None:
        self.tokens: list[int] | None = None
        self.error: RequestError | None = None
        decode = pair.router.worker("decode")["address"]
        thread = threading.Thread(target=self._generate, args=(pair,))
        thread.start()

        def landing() -> bool:
            status = get_status(decode)
            return bool(status.slots_granted and status.pages.in_use)

        wait_for(landing, "pages of the request in decode's pool", within_s=30.0)
        self.victim = pair.signal(role, number)
        struck = time.monotonic()
        thread.join()
        self.took_s = time.monotonic() - struck

    def _generate(self, pair: Pair) -> None:
        try:
            self.tokens = pair.generate()
        except RequestError as error:
            self.error = error


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_is_killed_in_mid_transfer_and_restarted_at_its_address(
    pair: Pair, role: str
) -> None:
    undisturbed = pair.generate()
    disturbed = Disturbed(pair, role, signal.SIGKILL)
    assert disturbed.error is not None, "the only worker of its role was killed"
    assert disturbed.took_s < ANSWER_S
    wait_until_free(pair.router, within_s=SETTLE_S)
    pair.start(role)
    pair.router.wait_until_ready()
    assert pair.router.worker(role)["id"] != disturbed.victim["id"]
    assert pair.generate() == undisturbed
    pair.router.wait_until_balanced()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_is_stopped_past_the_lease_and_goes_on(pair: Pair, role: str) -> None:
    undisturbed = pair.generate()
    disturbed = Disturbed(pair, role, signal.SIGSTOP)
    try:
        assert disturbed.error is not None
        assert disturbed.took_s < ANSWER_S
        time.sleep(SETTLE_S)  # past the lease: what is late now is late for good
    finally:
        for pid in (disturbed.victim["pid"], *disturbed.victim["engine_pids"]):
            os.kill(pid, signal.SIGCONT)
    pair.router.wait_until_ready()
    wait_until_free(pair.router, within_s=2 * SETTLE_S)
    assert pair.generate() == undisturbed
    pair.router.wait_until_balanced()
