"""A writer and readers of the cuda_ipc transport in processes of their own, on GPUs; each obeys its
test through a pipe."""

import hashlib
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from kvtransfer.cuda_ipc_transport import CudaIpcTransport
from kvtransfer.cuda_memory import allocate_window
from kvtransfer.digest import digest_pages, seals_of
from kvtransfer.layout import PageLayout
from kvtransfer.transport import MessageArrived, PeerLost, SealCheck, WriteDone, WriteFailed

LAYOUT = PageLayout(layers=32, page_size=64, kv_heads=8, head_dim=128, itemsize=2)
"""An 8B Llama's: pages of 8 MiB."""
PAGES = 32
STORM_WRITES = 64
"""Kernels that are queued when a process dies: some 40 ms of work."""


def checksum(memory: torch.Tensor) -> str:
    return hashlib.sha256(memory.cpu().numpy().tobytes()).hexdigest()


def expected_rows(memory: torch.Tensor, valid: int) -> torch.Tensor:
    """The valid part of a page's rows, on the host."""
    return memory.cpu().view(LAYOUT.rows, -1)[:, : valid * LAYOUT.token_bytes].contiguous()


def writer_main(pipe: Connection, device: int) -> None:
    torch.cuda.set_device(device)
    generator = torch.Generator("cuda").manual_seed(7)
    shape = (PAGES, LAYOUT.page_bytes)
    pool = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=generator)
    transport = CudaIpcTransport(layout=LAYOUT, pool=pool, landing=None)
    pipe.send(("offer", transport.local_offer()))

    def check_of(pages: list[int], valid: list[int], spoilt: bool) -> SealCheck:
        wanted = seals_of(digest_pages(pool, pages, valid, LAYOUT))
        if spoilt:
            pool[pages[-1], valid[-1] * LAYOUT.token_bytes - 1] ^= 1
            torch.cuda.synchronize()
        return SealCheck(tuple(valid), tuple(wanted))

    def write(peer: str, pages: list[int], valid: list[int], spoilt: bool) -> None:
        copies = [(page, slot) for slot, page in enumerate(pages)]
        transport.write_checked(peer, copies, b"pages", check_of(pages, valid, spoilt))
        pipe.send(("ended", _outcome(transport)))
        pairs = zip(pages, valid, strict=True)
        pipe.send(("sums", [checksum(expected_rows(pool[p], v)) for p, v in pairs]))

    def write_parts(peer: str, pages: list[int]) -> None:
        copies = [(page, slot) for slot, page in enumerate(pages)]
        middle = LAYOUT.page_bytes // LAYOUT.layers * 10
        transport.write(peer, copies, b"early", part=(0, middle))
        early = _outcome(transport)
        check = check_of(pages, [64] * len(pages), False)
        transport.write_checked(peer, copies, b"rest", check, part=(middle, LAYOUT.page_bytes))
        pipe.send(("ended", (early, _outcome(transport))))
        pipe.send(("sums", [checksum(expected_rows(pool[p], 64)) for p in pages]))

    def storm(peer: str, seconds: float) -> None:
        """Writes on, also to a peer that has died: (done, failed, lost)."""
        copies = [(page, page) for page in range(PAGES)]
        check = check_of(list(range(PAGES)), [64] * PAGES, False)  # a test may have spoilt some
        counts, in_flight, lost = [0, 0], 0, False
        pipe.send(("storming", None))
        end = time.monotonic() + seconds
        while time.monotonic() < end or in_flight:
            while in_flight < 4 and time.monotonic() < end:
                transport.write_checked(peer, copies, b"storm", check)
                in_flight += 1
            for event in transport.poll():
                if isinstance(event, WriteDone | WriteFailed):
                    counts[isinstance(event, WriteFailed)] += 1
                    in_flight -= 1
                lost = lost or isinstance(event, PeerLost)
        torch.cuda.synchronize()
        transport.disconnect(peer)
        pipe.send(("stormed", (*counts, lost)))

    def die(peer: str) -> None:
        copies = [(page, page) for page in range(PAGES)]
        for _ in range(STORM_WRITES):
            transport.write(peer, copies, b"last words")
        os.kill(os.getpid(), signal.SIGKILL)

    commands = {"write": write, "write_parts": write_parts, "storm": storm, "die": die}
    while True:
        name, arguments = pipe.recv()
        if name == "stop":
            transport.close()
            pipe.send(("stopped", None))
            return
        if name == "connect":
            transport.connect(*arguments)
            pipe.send(("connected", None))
        else:
            commands[name](*arguments)


def _outcome(transport: CudaIpcTransport) -> tuple[str, str, bool]:
    """What became of the one write under way."""
    while True:
        for event in transport.poll():
            if isinstance(event, WriteDone):
                return "done", "", False
            if isinstance(event, WriteFailed):
                return "failed", event.reason, event.mismatch


def reader_main(pipe: Connection, device: int) -> None:
    torch.cuda.set_device(device)
    window = allocate_window(PAGES, LAYOUT.page_bytes, torch.device("cuda", device))
    transport = CudaIpcTransport(layout=LAYOUT, pool=None, landing=window)
    pipe.send(("offer", transport.local_offer()))
    messages: list[bytes] = []
    lost: list[str] = []

    def listen(until: Any) -> bool:
        end = time.monotonic() + 10
        while not until() and time.monotonic() < end:
            for event in transport.poll():
                if isinstance(event, MessageArrived):
                    messages.append(event.message)
                elif isinstance(event, PeerLost):
                    lost.append(event.peer)
            time.sleep(0.0005)
        return bool(until())

    while True:
        name, arguments = pipe.recv()
        if name == "stop":
            transport.close()
            pipe.send(("stopped", None))
            return
        if name == "connect":
            transport.connect(*arguments)
            pipe.send(("connected", None))
        elif name == "gone":
            listen(lambda: lost)
            transport.disconnect(*arguments)
            torch.cuda.synchronize()
            window.zero_()
            pipe.send(("lost", list(lost)))
        elif name == "messages":
            listen(lambda wanted=arguments[0]: len(messages) >= wanted)
            pipe.send(("messages", list(messages)))
            messages.clear()
        elif name == "landed":
            valid: list[int] = arguments[0]
            torch.cuda.synchronize()
            sums = [checksum(expected_rows(window[s], v)) for s, v in enumerate(valid)]
            rest = [
                int(window[s].view(LAYOUT.rows, -1)[:, v * LAYOUT.token_bytes :].count_nonzero())
                for s, v in enumerate(valid)
            ]
            window.zero_()
            torch.cuda.synchronize()
            pipe.send(("landed", (sums, rest)))
