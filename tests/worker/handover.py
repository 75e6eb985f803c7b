"""A prefill and a decode worker in one thread: real roles, schedulers, transfers, seals and pages;
a stub model, the fake transport, and a clock that moves when the test says so.

The router's part is played in a few lines: tickets go from one worker to the other, tokens and
errors are collected. It aborts nothing by itself, so that each worker has to find its own way out.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from decode_service.role import DecodeRole
from engine.execution.forward_batch import ForwardBatch, ForwardResult, LayersDone
from engine.memory.pools import MemoryPools, make_memory_pools
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.scheduler import Scheduler
from kvtransfer.agent import TransferAgent
from kvtransfer.fake_transport import FakeNetwork, FakeTransport, Fault
from kvtransfer.geometry import RankPlace
from kvtransfer.layout import PageLayout
from kvtransfer.window import LandingWindow
from prefill_service.role import PrefillRole
from protos.baton.v1 import channel_pb2, worker_pb2
from tests.engine.scheduler.stub import CONTEXT, EOS, NUM_LAYERS, VOCAB, StubRunner
from worker.engine_role import EngineRole
from worker.rank_kv import RankKv, RankLander, RankSealer

PREFILL, DECODE = "prefill-1", "decode-1"
PAGE_SIZE = 4
LAYOUT = PageLayout(layers=NUM_LAYERS, page_size=PAGE_SIZE, kv_heads=1, head_dim=2, itemsize=4)
PAGES = 32
REDIAL_S = 0.5
"""Until fronts that have lost each other are connected again."""
STEP_S = 0.02
"""What a round of everything takes."""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class _Rows:
    """One of the stub's two lists, [tokens] int64, as words of the pool's last layer: what the stub
    reads is what has travelled."""

    def __init__(self, pool: torch.Tensor, row: int) -> None:
        words = pool.view(torch.int64).view(len(pool), NUM_LAYERS, 2, PAGE_SIZE)
        self._words = words[:, -1, row]

    def __getitem__(self, where: torch.Tensor) -> torch.Tensor:
        return self._words[where // PAGE_SIZE, where % PAGE_SIZE]

    def __setitem__(self, where: torch.Tensor, values: Any) -> None:
        self._words[where // PAGE_SIZE, where % PAGE_SIZE] = values


class PagedStub(StubRunner):
    """The stub over pages that can travel."""

    def __init__(self, memory: MemoryPools, pool: torch.Tensor, *, marks: bool) -> None:
        """`marks`: steps tell when their layers are done, so that pages leave behind them."""
        super().__init__(memory)
        self.kv_token: Any = _Rows(pool, 0)
        self.kv_position: Any = _Rows(pool, 1)
        self.marks = marks

    def forward(self, batch: ForwardBatch) -> ForwardResult:
        result = super().forward(batch)
        if not self.marks or not batch.forward_mode.is_extend():
            return result
        done = LayersDone(NUM_LAYERS - 2, None), LayersDone(NUM_LAYERS, None)
        return replace(result, layers_done=done)


class Worker:
    """One engine without its processes."""

    def __init__(self, handover: "Handover", role: type[EngineRole], instance: str) -> None:
        sends = role is PrefillRole
        self.instance = instance
        self.said: list[channel_pb2.EngineToFront] = []
        self.pool = torch.zeros((PAGES, LAYOUT.page_bytes), dtype=torch.uint8)
        slots = torch.zeros((handover.slots, LAYOUT.page_bytes), dtype=torch.uint8)
        self.window = None if sends else LandingWindow(slots)
        self.transport = FakeTransport(
            instance_id=instance,
            network=handover.network,
            pool=self.pool if sends else None,
            landing=None if sends else slots,
            writes_behind=not handover.by_host,
        )
        self.agent = TransferAgent(
            instance_id=instance,
            layout=LAYOUT,
            transports={"fake": self.transport},
            pool=self.pool if sends else None,
            window=self.window,
            lease_s=handover.lease_s,
            clock=handover.clock,
            more_windows=lambda _: torch.zeros_like(slots),
        )
        self.memory = make_memory_pools(
            num_pages=PAGES, page_size=PAGE_SIZE, num_rows=8, max_context_len=CONTEXT
        )
        kv = RankKv(self.pool, RankPlace(layout=LAYOUT, kv_heads=LAYOUT.kv_heads))
        parts: Any = SimpleNamespace(
            agent=self.agent,
            channel=SimpleNamespace(send=self.said.append),
            config=SimpleNamespace(
                enable_priority_scheduling=False,
                max_queued_requests=64,
                verify_kv=True,
                handover_trace="",
            ),
            model_config=SimpleNamespace(eos_token_ids=[EOS]),
            memory=self.memory,
            kv_pool=SimpleNamespace(as_bytes=lambda: self.pool),
            layout=LAYOUT,
            sealer=RankSealer(kv, ()),
            lander=RankLander(kv, ()),
        )
        self.role = role(parts)
        self.scheduler = Scheduler(
            SchedulerConfig(
                page_size=PAGE_SIZE,
                context_length=CONTEXT,
                vocab_size=VOCAB,
                chunked_prefill_size=8,
                max_running_requests=8,
                max_queued_requests=64,
                decode_reserve_tokens=8,
                split_prefill_layers=handover.split if sends else 0,
                enable_overlap=handover.overlap,
            ),
            PagedStub(self.memory, self.pool, marks=handover.behind),
            self.memory,
            self.role,
        )

    def tell(self, **message: Any) -> None:
        self.role.handle(channel_pb2.FrontToEngine(**message))

    def step(self, *, busy: bool = False) -> list[channel_pb2.EngineToFront]:
        """One round of transfer and scheduler, with the invariant behind it; what was said.
        `busy`: the scheduler is in the middle of a long step."""
        self.agent.thread.step()
        if not busy:
            result = self.scheduler.step()
            self.role.publish(result)
            if result.ran or result.released:
                self.scheduler.check_invariant()
        said, self.said[:] = list(self.said), []
        return said

    def owned(self) -> dict[str, int]:
        """What is kept for requests: nothing while idle. What silent writers keep is told apart."""
        status = self.role.status()
        counts = self.scheduler.page_counts()
        return {
            "pages in use": counts.in_use,
            "pages held": counts.held,
            "slots granted": status.slots_granted,
            "rows": status.rows_total - status.rows_free,
            "transfers": self.agent.stats().sending + self.agent.stats().receiving,
            "requests": len(self.role.arrivals),
        }


class Handover:
    """Both workers, their network, and what a client would have got."""

    def __init__(
        self,
        *,
        faults: tuple[Fault, ...] = (),
        seed: int = 0,
        lease_s: float = 2.0,
        slots: int = 8,
        split: int = 0,
        behind: bool = False,
        by_host: bool = False,
        overlap: bool = False,
    ) -> None:
        """`by_host`: what leaves behind layers does so when the host sees that they are there."""
        self.clock = Clock()
        self.by_host = by_host
        self.lease_s, self.slots = lease_s, slots
        self.split, self.behind, self.overlap = split, behind, overlap
        self.network = FakeNetwork(seed=seed, faults=faults)
        self.prefill = Worker(self, PrefillRole, PREFILL)
        self.decode = Worker(self, DecodeRole, DECODE)
        self.tokens: dict[str, dict[int, int]] = {}
        self.errors: dict[str, list[tuple[float, str, worker_pb2.Error]]] = {}
        """(when, who, what)."""
        self._redial_at: float | None = None
        self.connect()
        self.step()

    def connect(self) -> None:
        for worker, peer in ((self.decode, PREFILL), (self.prefill, DECODE)):
            worker.agent.peer_connected(peer, "fake", peer.encode())

    def generate(self, name: str, prompt: list[int], *, max_tokens: int = 6) -> None:
        sampling = worker_pb2.ResolvedSampling(max_tokens=max_tokens, top_p=1.0, ignore_eos=True)
        common = {"request_id": name, "prompt_ids": prompt, "sampling": sampling}
        self.tokens[name], self.errors[name] = {}, []
        self.prefill.tell(prefill=worker_pb2.PrefillRequest(decode_instance=DECODE, **common))
        self.decode.tell(reserve=worker_pb2.ReserveRequest(prefill_instance=PREFILL, **common))

    def abort(self, name: str) -> None:
        """The client leaves."""
        for worker in (self.prefill, self.decode):
            worker.tell(abort=worker_pb2.AbortWork(request_id=name))

    def step(self, seconds: float = STEP_S, *, busy: str = "") -> None:
        """A round of everything; `busy`: the instance whose scheduler takes no part in it."""
        self.clock.now += seconds
        for worker in (self.decode, self.prefill):
            for message in worker.step(busy=worker.instance == busy):
                self._hear(worker, message)
        if self._redial_at is not None and self.clock.now >= self._redial_at:
            self._redial_at = None
            self.connect()

    def _hear(self, worker: Worker, message: channel_pb2.EngineToFront) -> None:
        kind = message.WhichOneof("kind")
        if kind == "reserved":
            reserved = message.reserved
            ticket = worker_pb2.TicketForPrefill(
                request_id=reserved.request_id, attempt=reserved.attempt, ticket=reserved.ticket
            )
            self.prefill.tell(ticket=ticket)
        elif kind == "step":
            for output in message.step.outputs:
                got = self.tokens[output.request_id]
                for token in output.tokens:
                    assert got.setdefault(token.index, token.id) == token.id
        elif kind == "work_failed":
            failed = message.work_failed
            entry = (self.clock.now, worker.instance, failed.error)
            self.errors[failed.request_id].append(entry)
        elif kind == "peer_attached" and not message.peer_attached.ok:
            # the session ends with it, and with the session both engines' peers
            peer = message.peer_attached.instance_id
            other = self.prefill if worker is self.decode else self.decode
            worker.agent.peer_gone(peer, message.peer_attached.reason, proven_dead=False)
            other.agent.peer_gone(worker.instance, "the session has ended", proven_dead=False)
            self._redial_at = self.clock.now + REDIAL_S

    def lose_for_good(self) -> None:
        """Each has seen the other's process exit."""
        self.prefill.agent.peer_gone(DECODE, "exited", proven_dead=True)
        self.decode.agent.peer_gone(PREFILL, "exited", proven_dead=True)

    def output(self, name: str) -> list[int]:
        """Tokens from the first on, up to the first that is missing."""
        got = self.tokens[name]
        return [got[index] for index in range(len(got)) if index in got]

    def owned(self) -> dict[str, int]:
        """Whatever either worker keeps for requests, by worker and kind."""
        return {
            f"{worker.instance}: {what}": count
            for worker in (self.prefill, self.decode)
            for what, count in worker.owned().items()
            if count
        }
