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
from kvtransfer.layout import PageLayout
from kvtransfer.transport import MessageArrived, PeerLost, WriteDone, WriteFailed

LAYOUT = PageLayout(layers=32, page_size=64, kv_heads=8, head_dim=128, itemsize=2)
"""An 8B Llama's: pages of 8 MiB."""
PAGES = 32
STEP_CYCLES = 10_000_000
"""Of a kernel that stands for a step: 5 ms."""
STORM_WRITES = 64
"""Writes that are queued when a process dies: some 40 ms of work."""


def checksum(memory: torch.Tensor) -> str:
    return hashlib.sha256(memory.cpu().numpy().tobytes()).hexdigest()


def writer_main(pipe: Connection, device: int) -> None:
    torch.cuda.set_device(device)
    generator = torch.Generator("cuda").manual_seed(7)
    shape = (PAGES, LAYOUT.page_bytes)
    pool = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=generator)
    transport = CudaIpcTransport(layout=LAYOUT, pool=pool, landing=None)
    pipe.send(("offer", transport.local_offer()))

    def write(peer: str, pages: list[int]) -> None:
        transport.write(peer, [(page, slot) for slot, page in enumerate(pages)], b"pages")
        pipe.send(("ended", _outcome(transport)))
        pipe.send(("sums", [checksum(pool[page]) for page in pages]))

    def write_parts(peer: str, pages: list[int]) -> None:
        copies = [(page, slot) for slot, page in enumerate(pages)]
        middle = LAYOUT.page_bytes // LAYOUT.layers * 10
        transport.write(peer, copies, b"early", part=(0, middle))
        early = _outcome(transport)
        transport.write(peer, copies, b"rest", part=(middle, LAYOUT.page_bytes))
        pipe.send(("ended", (early, _outcome(transport))))
        pipe.send(("sums", [checksum(pool[page]) for page in pages]))

    def computing(pages: list[int]) -> torch.cuda.Event:
        """A kernel that takes a while, and one behind it that fills the pages anew."""
        torch.cuda._sleep(STEP_CYCLES)
        for page in pages:
            pool[page].random_(0, 256)
        computed = torch.cuda.Event()
        computed.record()
        return computed

    def write_behind(peer: str, pages: list[int]) -> None:
        copies = [(page, slot) for slot, page in enumerate(pages)]
        middle = LAYOUT.page_bytes // LAYOUT.layers * 10
        first = computing(pages)
        transport.write_behind(peer, copies, part=(0, middle), passed=first)
        torch.cuda._sleep(STEP_CYCLES)
        second = torch.cuda.Event()
        second.record()
        rest = (middle, LAYOUT.page_bytes)
        transport.write_behind(peer, copies, part=rest, passed=second)
        busy = transport.busy()
        pipe.send(("ended", (busy, _outcomes(transport, 2))))
        pipe.send(("sums", [checksum(pool[page]) for page in pages]))

    def storm(peer: str, seconds: float) -> None:
        """Writes on, also to a peer that has died: (done, failed, lost)."""
        copies = [(page, page) for page in range(PAGES)]
        counts, in_flight, lost = [0, 0], 0, False
        pipe.send(("storming", None))
        end = time.monotonic() + seconds
        while time.monotonic() < end or in_flight:
            while in_flight < 4 and time.monotonic() < end:
                if in_flight % 2:
                    transport.write(peer, copies, b"storm")
                else:
                    whole = (0, LAYOUT.page_bytes)
                    transport.write_behind(peer, copies, part=whole, passed=computing([]))
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
        whole = (0, LAYOUT.page_bytes)
        transport.write_behind(peer, copies, part=whole, passed=computing([0]))
        os.kill(os.getpid(), signal.SIGKILL)

    commands = {
        "write": write,
        "write_parts": write_parts,
        "write_behind": write_behind,
        "storm": storm,
        "die": die,
    }
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


def _outcome(transport: CudaIpcTransport) -> tuple[str, str]:
    """What became of the one write under way."""
    return _outcomes(transport, 1)[0]


def _outcomes(transport: CudaIpcTransport, count: int) -> list[tuple[str, str]]:
    ends: list[tuple[str, str]] = []
    while len(ends) < count:
        for event in transport.poll():
            if isinstance(event, WriteDone):
                ends.append(("done", ""))
            elif isinstance(event, WriteFailed):
                ends.append(("failed", event.reason))
    return ends


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
            count: int = arguments[0]
            torch.cuda.synchronize()
            sums = [checksum(window[slot]) for slot in range(count)]
            rest = int(window[count:].count_nonzero())
            window.zero_()
            torch.cuda.synchronize()
            pipe.send(("landed", (sums, rest)))
