"""Two engines joined by roles that move 'KV' between their stubs, slowly and at random."""

import random
from dataclasses import dataclass, field

from engine.memory.req_to_token import page_slots
from engine.scheduler.admission import Promise
from engine.scheduler.req import Req
from engine.scheduler.role import OwnerKind, SchedulerRole
from engine.types import RequestId
from tests.engine.scheduler.stub import Engine


@dataclass
class Sending:
    req: Req
    pages: list[int] = field(default_factory=list)
    """As they were when they were sent; they must still be so when they are read."""
    first_token: int | None = None


class FakePrefillRole(SchedulerRole):
    """Sends whole pages as chunks end; reads them later, when the transfer gets to them."""

    decodes = False

    def __init__(self) -> None:
        self.sending: dict[RequestId, Sending] = {}
        self.extends: list[tuple[str, int, bool]] = []

    def on_extend_result(
        self, req: Req, *, prompt_done: bool, token: int | None, logprob: float | None
    ) -> None:
        self.extends.append((req.rid, req.kv_ready_len, prompt_done))
        sending = self.sending.setdefault(req.rid, Sending(req))
        pages = self.scheduler.request_pages(req)
        assert pages[: len(sending.pages)] == sending.pages
        if not prompt_done:
            pages = pages[: req.kv_ready_len // self.scheduler.page_size]
        sending.pages = pages
        sending.first_token = token

    def retain_pages(self, req: Req) -> bool:
        return req.rid in self.sending

    def has_work(self) -> bool:
        return bool(self.sending)


class FakeDecodeRole(SchedulerRole):
    """Grants tickets by the admission rule; pages bind when the KV arrives."""

    def __init__(self) -> None:
        self.tickets: dict[RequestId, Promise] = {}

    def promises(self) -> list[Promise]:
        return list(self.tickets.values())

    def page_owners(self) -> list[tuple[OwnerKind, list[int]]]:
        return []


class Pair:
    """Prefill and decode, and the road between them."""

    def __init__(self, prefill: Engine, decode: Engine, rng: random.Random) -> None:
        self.prefill, self.decode, self.rng = prefill, decode, rng
        assert isinstance(prefill.scheduler.role, FakePrefillRole)
        assert isinstance(decode.scheduler.role, FakeDecodeRole)
        self.sender, self.receiver = prefill.scheduler.role, decode.scheduler.role
        self.waiting: list[tuple[Req, Req]] = []
        self.arriving: dict[RequestId, Req] = {}
        self.aborted: set[str] = set()

    def submit(self, at_prefill: Req, at_decode: Req) -> None:
        """The same request twice, as each side makes its own."""
        self.prefill.scheduler.check_request(at_prefill)
        self.decode.scheduler.check_request(at_decode)
        self.waiting.append((at_prefill, at_decode))

    def abort(self, rid: RequestId) -> None:
        self.aborted.add(rid)
        self.waiting = [pair for pair in self.waiting if pair[0].rid != rid]
        self.prefill.scheduler.abort_request(rid)
        self.decode.scheduler.abort_request(rid)
        self.receiver.tickets.pop(rid, None)
        self.arriving.pop(rid, None)

    def busy(self) -> bool:
        return bool(
            self.waiting or self.prefill.scheduler.has_work() or self.decode.scheduler.has_work()
        )

    def step(self) -> None:
        self._grant()
        if self.rng.random() < 0.8:
            self.prefill.step()
        for rid in list(self.sender.sending):
            if self.rng.random() < 0.4:
                self._deliver(rid)
        if self.rng.random() < 0.8:
            self.decode.step()

    def _grant(self) -> None:
        while self.waiting:
            at_prefill, at_decode = self.waiting[0]
            if not self.decode.scheduler.admission.can_admit(
                at_decode.seqlen, 0, at_decode.remaining_new_tokens
            ):
                return
            self.waiting.pop(0)
            rid = at_decode.rid
            self.receiver.tickets[rid] = Promise(
                prompt_len=at_decode.seqlen,
                max_new_tokens=at_decode.remaining_new_tokens,
                pages_allocated=False,
            )
            self.arriving[rid] = at_decode
            self.prefill.add(at_prefill)

    def _deliver(self, rid: RequestId) -> None:
        sending = self.sender.sending[rid]
        source, target = self.prefill.runner, self.decode.runner
        page_size = self.prefill.scheduler.page_size
        at_decode = self.arriving.get(rid)
        if sending.req.finished() or at_decode is None:
            # Finished with its first token, or aborted: nothing is wanted, but reading goes on
            # until now, so the pages must not have changed hands.
            self._check_source(sending)
            del self.sender.sending[rid]
            self.prefill.scheduler.release_request(sending.req)
            self.receiver.tickets.pop(rid, None)
            self.arriving.pop(rid, None)
            return
        if sending.first_token is None:
            return
        self._check_source(sending)
        length = at_decode.seqlen
        pages = self.decode.memory.alloc_pages(-(-length // page_size))
        src = page_slots(sending.pages, page_size, 0, length)
        dst = page_slots(pages, page_size, 0, length)
        target.kv_token[dst] = source.kv_token[src]
        target.kv_position[dst] = source.kv_position[src]
        del self.sender.sending[rid], self.receiver.tickets[rid], self.arriving[rid]
        self.prefill.scheduler.release_request(sending.req)
        self.decode.scheduler.add_prebuilt(at_decode, pages, sending.first_token)

    def _check_source(self, sending: Sending) -> None:
        page_size = self.prefill.scheduler.page_size
        req = sending.req
        length = min(len(sending.pages) * page_size, req.prompt_len + req.prior_output_len)
        slots = page_slots(sending.pages, page_size, 0, length)
        assert self.prefill.runner.kv_token[slots].tolist() == req.token_ids(length)
