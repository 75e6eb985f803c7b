"""The three roles as scripts: transfers take the passes that each request's script says."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.errors import EngineError, OutOfMemoryError
from engine.memory.prefix_cache import LoadBack
from engine.scheduler.admission import Promise
from engine.scheduler.req import Req
from engine.scheduler.role import OwnerKind, SchedulerRole
from engine.scheduler.scheduler import Scheduler
from engine.types import RequestId
from tests.engine.scheduler.machine.cases import RequestScript, Squeeze
from tests.engine.scheduler.machine.chain import ChainKv
from tests.engine.scheduler.machine.host import page_digest


class ScriptedUnified(SchedulerRole):
    """Takes pages as a ticket does, and gives them back."""

    def __init__(self, squeezes: Sequence[Squeeze]) -> None:
        self.squeezes = squeezes
        self.taken: dict[int, list[int]] = {}
        self.passes = -1

    def poll(self) -> None:
        self.passes += 1
        memory = self.scheduler.memory
        for number, squeeze in enumerate(self.squeezes):
            if self.passes == squeeze.start:
                room = memory.available_tokens() // self.scheduler.page_size
                wanted = memory.allocator.num_pages * squeeze.sixteenths // 16
                self.taken[number] = memory.alloc_pages(min(room, wanted))
            elif self.passes == squeeze.start + squeeze.passes:
                memory.free_pages(self.taken.pop(number))

    def page_owners(self) -> list[tuple[OwnerKind, list[int]]]:
        return [("in_use", pages) for pages in self.taken.values()]

    def has_work(self) -> bool:
        return bool(self.taken)

    def in_transfer(self) -> bool:
        return bool(self.taken)


class Seals:
    """Implements `PageSeals`: what each whole page held when it was computed."""

    def __init__(self) -> None:
        self.kv: ChainKv
        self._sealed: dict[int, tuple[int, bytes]] = {}

    def seal(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.reseal(page, chain_hash=b"", digest=page_digest(self.kv.page(page)))

    def digest_of(self, page: int) -> bytes | None:
        generation, digest = self._sealed.get(page, (-1, b""))
        return digest if generation == self.kv.allocator.generation(page) else None

    def reseal(self, page: int, *, chain_hash: bytes, digest: bytes) -> None:
        self._sealed[page] = (self.kv.allocator.generation(page), digest)


@dataclass
class Sending:
    req: Req
    passes_left: int
    pages: list[int] = field(default_factory=list)
    ready: bool = False
    """The prompt is done, or the request has ended: the passes count."""


class ScriptedPrefill(SchedulerRole):
    """Reads the pages of each chunk until some passes after the request has left. Only what it was
    told of when it was computed may leave: a page of the prefix cache, too, must be one of these.
    """

    decodes = False

    def __init__(self, scripts: dict[str, RequestScript]) -> None:
        self.scripts = scripts
        self.sending: dict[RequestId, Sending] = {}
        self.kv: ChainKv
        self.seals = Seals()

    def attach(self, scheduler: Scheduler) -> None:
        super().attach(scheduler)
        self.seals.kv = self.kv
        scheduler.memory.tree_cache.seals = self.seals

    def on_extend_result(
        self, req: Req, *, prompt_done: bool, token: int | None, logprob: float | None
    ) -> None:
        sending = self.sending.setdefault(req.rid, Sending(req, self.scripts[req.rid].transfer))
        pages = self.scheduler.request_pages(req)
        if not prompt_done:
            pages = pages[: req.kv_ready_len // self.scheduler.page_size]
        assert pages[: len(sending.pages)] == sending.pages, "a page was swapped while it is read"
        size = self.scheduler.page_size
        self.seals.seal(pages[req.kv_ready_from // size : req.kv_ready_len // size])
        for page in pages[: req.kv_ready_len // size]:
            assert self.seals.digest_of(page) is not None, f"page {page} was never sealed"
        sending.pages = pages
        sending.ready |= prompt_done
        if prompt_done and self.scripts[req.rid].lost:
            self.scheduler.abort_request(req.rid)

    def on_request_aborted(self, req: Req) -> None:
        if req.rid in self.sending:
            self.sending[req.rid].ready = True

    def retain_pages(self, req: Req) -> bool:
        return req.rid in self.sending

    def has_work(self) -> bool:
        return bool(self.sending)

    def poll(self) -> None:
        for rid, sending in list(self.sending.items()):
            if not sending.ready:
                continue
            sending.passes_left -= 1
            if sending.passes_left > 0:
                continue
            req = sending.req
            known = min(len(sending.pages) * self.scheduler.page_size, req.kv_ready_len)
            self.kv.check_prompt(sending.pages, req.token_ids(known), req.extra_key)
            del self.sending[rid]
            self.scheduler.release_request(req)

    def in_transfer(self) -> bool:
        return any(sending.ready for sending in self.sending.values())


@dataclass
class Landing:
    req: Req
    first_token: int
    prefix: list[int]
    passes: int
    bind_at: int
    """Pages bind in that pass."""
    pages: list[int] = field(default_factory=list)


class ScriptedDecode(SchedulerRole):
    """Grants tickets first come, first served by the admission rule, the more important first where
    priorities count; KV lands passes later."""

    def __init__(self, scripts: dict[str, RequestScript]) -> None:
        self.scripts = scripts
        self.reservations: list[tuple[Req, int]] = []
        """With the first token that prefill will have drawn."""
        self.landings: dict[RequestId, Landing] = {}
        self.lost: list[RequestId] = []
        self.short_of_memory: list[RequestId] = []
        self.wrong_grammar: list[RequestId] = []
        self.kv: ChainKv

    def poll(self) -> None:
        for landing in list(self.landings.values()):
            landing.passes -= 1
            self._go_on(landing)
        self.on_room_made()

    def _in_order(self) -> list[tuple[Req, int]]:
        if not self.scheduler.config.enable_priority_scheduling:
            return list(self.reservations)
        return sorted(self.reservations, key=lambda pair: pair[0].priority)

    def waits_for_ticket(self) -> Req | None:
        has_slot = self.scheduler.admission.has_lora_slot_for
        return next((req for req, _ in self._in_order() if has_slot(req.lora_id)), None)

    def on_room_made(self) -> None:
        for reservation in self._in_order():
            if not self.scheduler.admission.has_lora_slot_for(reservation[0].lora_id):
                continue
            if not self._grant(*reservation):
                break
            self.reservations.remove(reservation)

    def _grant(self, req: Req, first_token: int) -> bool:
        prefix = self.scheduler.lock_prefix(req)
        page_size = self.scheduler.page_size
        if not self.scheduler.admission.can_admit(
            req.seqlen, len(prefix) * page_size, req.remaining_new_tokens, priority=req.priority
        ):
            self.scheduler.unlock_prefix(req)
            return False
        match self.scheduler.load_prefix(req):
            case LoadBack.DONE:
                self.scheduler.unlock_prefix(req)
                return self._grant(req, first_token)
            case LoadBack.PENDING:
                self.scheduler.unlock_prefix(req)
                return False
        transfer = self.scripts[req.rid].transfer
        landing = Landing(req, first_token, prefix, transfer, bind_at=transfer // 2)
        self.landings[req.rid] = landing
        self._go_on(landing)
        return True

    def _go_on(self, landing: Landing) -> None:
        req = landing.req
        if landing.passes <= landing.bind_at and not landing.pages:
            if self.scripts[req.rid].lost:
                self.lost.append(req.rid)
                return self.drop(req.rid)
            missing = -(-req.seqlen // self.scheduler.page_size) - len(landing.prefix)
            try:
                own = self.scheduler.memory.alloc_pages(missing)
            except OutOfMemoryError:
                self.short_of_memory.append(req.rid)
                return self.drop(req.rid)
            landing.pages = landing.prefix + own
            start = len(landing.prefix) * self.scheduler.page_size
            self.kv.write_prompt(landing.pages, req.fill_ids, req.extra_key, start=start)
            if self.scripts[req.rid].described:
                self.scheduler.expect_prebuilt(req, landing.pages)
        if landing.passes <= 0:
            del self.landings[req.rid]
            good = not self.scripts[req.rid].spoilt
            self.scheduler.add_prebuilt(
                req, landing.pages, landing.first_token, kv_check=lambda: good
            )
        return None

    def drop(self, rid: RequestId) -> None:
        landing = self.landings.pop(rid)
        self.scheduler.grammar_queue.discard(rid)
        self.scheduler.memory.free_pages(landing.pages[len(landing.prefix) :])
        self.scheduler.unlock_prefix(landing.req)

    def on_grammar_failed(self, req: Req, error: EngineError) -> None:
        self.wrong_grammar.append(req.rid)
        if not self.forget_reservation(req.rid):
            self.drop(req.rid)

    def forget_reservation(self, rid: RequestId) -> bool:
        before = len(self.reservations)
        self.reservations = [pair for pair in self.reservations if pair[0].rid != rid]
        return len(self.reservations) < before

    def promises(self) -> list[Promise]:
        return [
            Promise(
                prompt_len=landing.req.seqlen,
                max_new_tokens=landing.req.remaining_new_tokens,
                prefix_len=len(landing.prefix) * self.scheduler.page_size,
                pages_allocated=bool(landing.pages),
                lora_id=landing.req.lora_id,
            )
            for landing in self.landings.values()
        ]

    def page_owners(self) -> list[tuple[OwnerKind, list[int]]]:
        return [("in_use", landing.pages or landing.prefix) for landing in self.landings.values()]

    def has_work(self) -> bool:
        return bool(self.landings or self.reservations)

    def in_transfer(self) -> bool:
        return bool(self.landings)
