"""The processes of `nixl_peers`, as a test sees them."""

import multiprocessing
import time
from collections.abc import Callable
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
# Forked from one process that has imported torch and NIXL, and has no thread yet.
CONTEXT.set_forkserver_preload(["tests.kvtransfer.nixl_peers"])


class Process:
    """One side, as its test sees it."""

    def __init__(self, main: Callable[[Connection, str], None], instance: str) -> None:
        self.instance = instance
        self._pipe, there = multiprocessing.Pipe()
        self.process = CONTEXT.Process(target=main, args=(there, instance))
        self.process.start()
        there.close()
        self._seen: list[tuple[str, Any]] = []

    @cached_property
    def offer(self) -> bytes:
        """Its NIXL offer, once it is up."""
        return bytes(self.expect("offer", 100))

    def tell(self, name: str, argument: Any = None) -> None:
        self._pipe.send((name, argument))

    def expect(self, name: str, within_s: float = 20.0) -> Any:
        """The next answer of that name."""
        end = time.monotonic() + within_s
        while True:
            for index, (kind, value) in enumerate(self._seen):
                if kind == name:
                    del self._seen[index]
                    return value
            if not self._pipe.poll(max(0.0, end - time.monotonic())):
                raise AssertionError(f"no {name} within {within_s} s; seen {self._seen}")
            self._seen.append(self._pipe.recv())

    def stop(self) -> int | None:
        """Exit code after a regular stop."""
        self.tell("stop")
        self.expect("stopped")
        self.process.join(10)
        return self.process.exitcode

    def end(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()
        self._pipe.close()


def join(prefill: Process, decode: Process) -> None:
    decode.tell("connect", (prefill.instance, prefill.offer))
    prefill.tell("connect", (decode.instance, decode.offer))
    assert decode.expect("attached")
    assert prefill.expect("attached")


def slots_of(decode: Process) -> tuple[int, int, int]:
    """(free, granted, quarantined)."""
    decode.tell("slots")
    free, granted, quarantined = decode.expect("slots")
    return free, granted, quarantined


def begin(prefill: Process, decode: Process, request: str, tokens: int) -> str:
    """Grants, sends; the checksum of what prefill sends."""
    decode.tell("grant", (request, tokens, prefill.instance))
    prefill.tell("ticket", decode.expect("ticket"))
    return str(prefill.expect("checksum"))
