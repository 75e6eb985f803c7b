"""Two real processes that hand KV over through NIXL; each obeys its test through a pipe."""

import contextlib
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from kvtransfer.agent import TransferAgent
from kvtransfer.digest import copy_and_digest, digest_pages, seals_of
from kvtransfer.events import (
    KvEvent,
    PagesLanded,
    PeerAttached,
    SourceReleased,
    TransferCompleted,
    TransferFailedEvent,
)
from kvtransfer.layout import PageLayout
from kvtransfer.nixl_transport import NixlTransport
from kvtransfer.quarantine import Quarantine
from kvtransfer.states import TransferFailure
from kvtransfer.ticket import SourcePage, Ticket
from kvtransfer.transport import WriteId
from kvtransfer.window import LandingWindow

LAYOUT = PageLayout(layers=4, page_size=16, kv_heads=4, head_dim=64, itemsize=4)
"""Pages of 128 KiB."""
PAGES = 64
SLOTS = 16
LEASE_S = 4.0


def checksum(pool: torch.Tensor, pages: int) -> str:
    return hashlib.sha256(pool[:pages].numpy().tobytes()).hexdigest()


class StoppingTransport(NixlTransport):
    """Stops its whole process (SIGSTOP) at the very moment before a write is posted, when told."""

    stop_next = False

    def write(
        self,
        peer: str,
        copies: Sequence[tuple[int, int]],
        message: bytes,
        *,
        part: tuple[int, int] | None = None,
    ) -> WriteId:
        if self.stop_next:
            self.stop_next = False
            # To this very thread: the process's own signal might reach the main one first, and the
            # write be posted before everything stands still.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        return super().write(peer, copies, message, part=part)


class NoQuarantine(Quarantine):
    """The guard taken out: slots of a failed ticket are given to the next one at once."""

    def hold(
        self,
        ticket: Ticket,
        window: LandingWindow,
        slots: set[int],
        failure: TransferFailure,
        detail: str,
    ) -> None:
        window.release(slots, ticket.ticket_id)


def prefill_main(pipe: Connection, instance: str) -> None:
    """Sends pages 0..n of its pool for each ticket it is given."""
    torch.set_num_threads(1)
    torch.seed()  # forked processes begin with one state, and each is to have pages of its own
    pool = torch.randint(0, 256, (PAGES, LAYOUT.page_bytes), dtype=torch.uint8)
    transport = StoppingTransport(instance_id=instance, pool=pool, landing=None)
    agent = TransferAgent(
        instance_id=instance, layout=LAYOUT, transports={"nixl": transport}, pool=pool, window=None
    )
    kill_after: list[int] = []

    def command(name: str, argument: Any) -> None:
        if name == "ticket":
            ticket: Ticket = argument
            pages = LAYOUT.pages_of(ticket.total_tokens)
            valid = [LAYOUT.valid_tokens(i, ticket.total_tokens) for i in range(pages)]
            seals = seals_of(digest_pages(pool, list(range(pages)), valid, LAYOUT))
            agent.open(ticket)
            sealed = [
                SourcePage(page=i, position=i, valid_tokens=valid[i], seal=seals[i])
                for i in range(pages)
            ]
            # Said before the push: the write may stop this whole process.
            pipe.send(("checksum", checksum(pool, pages)))
            agent.push(ticket.request_id, sealed)
            agent.complete(ticket.request_id, 42)
        elif name == "stop_before_next_write":
            transport.stop_next = True
        elif name == "die_after_more_bytes":
            kill_after.append(agent.stats().bytes_sent + argument)

    def event(happened: KvEvent) -> None:
        if isinstance(happened, SourceReleased):
            pipe.send(("released", happened.request_id))

    def idle() -> None:
        if kill_after and agent.stats().bytes_sent >= kill_after[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    _serve(pipe, agent, command, event, idle)


def careless_decode_main(pipe: Connection, instance: str) -> None:
    """`decode_main` without a quarantine."""
    decode_main(pipe, instance, quarantine=NoQuarantine)


def decode_main(
    pipe: Connection, instance: str, *, quarantine: type[Quarantine] = Quarantine
) -> None:
    """Grants tickets, copies and verifies what lands."""
    torch.set_num_threads(1)
    pool = torch.zeros((PAGES, LAYOUT.page_bytes), dtype=torch.uint8)
    window = LandingWindow(torch.zeros((SLOTS, LAYOUT.page_bytes), dtype=torch.uint8))
    transport = NixlTransport(instance_id=instance, pool=None, landing=window.memory)
    agent = TransferAgent(
        instance_id=instance,
        layout=LAYOUT,
        transports={"nixl": transport},
        pool=None,
        window=window,
        lease_s=LEASE_S,
        quarantine=quarantine,
    )
    waiting: list[PagesLanded] = []
    """Events put off; while the list is in use, see `put_off`."""
    put_off: list[bool] = []
    kill_after: list[int] = []
    pages_of: dict[str, int] = {}

    def command(name: str, argument: Any) -> None:
        if name == "grant":
            request, tokens, writer = argument
            pages_of[request] = LAYOUT.pages_of(tokens)
            ticket = agent.grant(
                request_id=request,
                writer=writer,
                total_pages=pages_of[request],
                total_tokens=tokens,
                prefix_len=0,
                token_hash=b"",
            )
            pipe.send(("ticket", ticket))
        elif name == "die_after_pages":
            kill_after.append(argument)
        elif name == "put_off_copies":
            put_off.append(True)
        elif name == "copy":
            put_off.clear()
            for landed in waiting:
                event(landed)
            waiting.clear()
        elif name == "are_slots_intact":
            pipe.send(("intact", all(seals_of_slots(e) == seals_told(e) for e in waiting)))
        elif name == "slots":
            counts = window.counts()
            pipe.send(("slots", (counts.free, counts.granted, counts.quarantined)))

    def event(happened: KvEvent) -> None:
        if isinstance(happened, PagesLanded) and put_off:
            waiting.append(happened)
            pipe.send(("landed", len(happened.pages)))
        elif isinstance(happened, PagesLanded):
            slots = [page.slot for page in happened.pages]
            positions = [page.position for page in happened.pages]
            valid = [page.valid_tokens for page in happened.pages]
            digests = copy_and_digest(happened.window, slots, pool, positions, valid, LAYOUT)
            if kill_after and sum(p >= kill_after[0] for p in positions):
                os.kill(os.getpid(), signal.SIGKILL)
            if seals_of(digests) != seals_told(happened):
                agent.reject(happened.request_id, "digest")
                pipe.send(("rejected", happened.request_id))
            else:
                agent.accept(happened.request_id, positions)
        elif isinstance(happened, TransferCompleted):
            checksums = checksum(pool, pages_of[happened.request_id])
            pipe.send(("completed", (happened.first_token, happened.total_bytes, checksums)))

    _serve(pipe, agent, command, event, lambda: None)


def seals_told(event: PagesLanded) -> list[bytes]:
    return [page.seal for page in event.pages]


def seals_of_slots(event: PagesLanded) -> list[bytes]:
    """Of what lies in the slots now."""
    slots = [page.slot for page in event.pages]
    valid = [page.valid_tokens for page in event.pages]
    return seals_of(digest_pages(event.window, slots, valid, LAYOUT))


def _serve(
    pipe: Connection,
    agent: TransferAgent,
    command: Callable[[str, Any], None],
    event: Callable[[KvEvent], None],
    idle: Callable[[], None],
) -> None:
    pipe.send(("offer", agent.local_offers()["nixl"]))
    agent.start()
    with contextlib.suppress(EOFError):
        while True:
            while pipe.poll():
                name, argument = pipe.recv()
                if name == "stop":
                    agent.close()
                    pipe.send(("stopped", None))
                    return
                if name == "connect":
                    agent.peer_connected(argument[0], "nixl", argument[1])
                elif name == "gone":
                    agent.peer_gone(argument[0], "process exited", proven_dead=argument[1])
                else:
                    command(name, argument)
            for happened in agent.poll_events():
                if isinstance(happened, TransferFailedEvent):
                    pipe.send(("failed", (happened.failure.name, happened.quiesced)))
                if isinstance(happened, PeerAttached):
                    pipe.send(("attached", happened.ok))
                event(happened)
            idle()
            time.sleep(0.0005)
