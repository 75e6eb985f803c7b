"""Requests whose grammar is compiled meanwhile (scheduling.md section 2, step 1)."""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.errors import (
    EngineError,
    GrammarsUnavailableError,
    InvalidRequestError,
    QueueFullError,
)
from engine.grammar.backend import Endings
from engine.grammar.compiler import Compilation, GrammarCompiler
from engine.grammar.spec import Grammar
from engine.scheduler.req import Req
from engine.types import RequestId


@dataclass(slots=True)
class _Pending:
    req: Req
    grammar: Grammar
    compilation: Compilation
    deadline: float
    """`time.monotonic()` seconds."""
    waits_here: bool = False


class GrammarQueue:
    """A request waits here between its arrival and its grammar's. Others are only known here:
    their role, or a transfer, holds them until theirs is compiled.

    Nothing here takes time: compiling happens on other threads, `settled` looks what they have.
    """

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        """`compiler`: None where outputs cannot be constrained."""
        self._compiler = compiler
        self._pending: dict[RequestId, _Pending] = {}

    def __len__(self) -> int:
        """Requests that wait here for nothing but their grammar."""
        return sum(1 for pending in self._pending.values() if pending.waits_here)

    def __iter__(self) -> Iterator[Req]:
        return (pending.req for pending in self._pending.values() if pending.waits_here)

    def start(self, req: Req, now: float) -> None:
        """Starts compiling a request's grammar, if it has one that is not compiled or under way.
        `now`: `time.monotonic()` seconds. Raises `GrammarsUnavailableError` or `QueueFullError`.
        """
        grammar = req.sampling_params.grammar
        if grammar is None or req.grammar is not None or req.rid in self._pending:
            return
        if self._compiler is None:
            raise GrammarsUnavailableError(
                f"request {req.rid}: outputs cannot be constrained by a grammar here"
            )
        compilation = self._compiler.submit(grammar)
        deadline = now + self._compiler.timeout_s
        self._pending[req.rid] = _Pending(req, grammar, compilation, deadline)

    def is_pending(self, req: Req) -> bool:
        """Whether the request must not be scheduled yet."""
        return req.rid in self._pending

    def hold(self, req: Req) -> bool:
        """The request waits here from now on; False: it need not."""
        pending = self._pending.get(req.rid)
        if pending is None:
            return False
        pending.waits_here = True
        return True

    def discard(self, rid: RequestId) -> bool:
        """The request is gone, or nobody cares for its grammar any more; True: it waited here."""
        pending = self._pending.pop(rid, None)
        if pending is None:
            return False
        if self._compiler is not None:
            self._compiler.leave(pending.grammar)
        return pending.waits_here

    def has_settled(self, now: float) -> bool:
        """Whether `settled` has something to tell."""
        return any(
            pending.compilation.done() or now >= pending.deadline
            for pending in self._pending.values()
        )

    def settled(self, now: float) -> list[tuple[Req, EngineError | None, bool]]:
        """(request, what went wrong, whether it waited here) for those whose grammar is compiled,
        or will not be. A request whose grammar is compiled has its matcher, after the outputs that
        it came with."""
        if not self._pending:
            return []
        done: list[tuple[Req, EngineError | None, bool]] = []
        for rid, pending in list(self._pending.items()):
            if not pending.compilation.done() and now < pending.deadline:
                continue
            error = self._settle(pending)
            done.append((pending.req, error, pending.waits_here))
            self.discard(rid)
        return done

    def _settle(self, pending: _Pending) -> EngineError | None:
        req = pending.req
        if not pending.compilation.done():
            return self._too_late(pending)
        try:
            compiled = pending.compilation.result()
        except EngineError as error:
            return type(error)(f"request {req.rid}: {error}")
        params = req.sampling_params
        matcher = compiled.matcher(
            Endings(
                allowed=req.stop_token_ids,
                held_back=req.ending_token_ids,
                min_tokens=min(params.min_tokens, req.max_new_tokens),
            )
        )
        for token in req.output_ids:
            matcher.advance(token)
        req.grammar = matcher
        return matcher.error

    def _too_late(self, pending: _Pending) -> EngineError:
        limit = self._compiler.timeout_s if self._compiler is not None else 0.0
        if pending.compilation.started():
            return InvalidRequestError(
                f"request {pending.req.rid}: its grammar was not compiled within {limit:g} s "
                "(--grammar-timeout-s); make it simpler"
            )
        return QueueFullError(
            f"request {pending.req.rid}: other grammars kept the compiler busy for {limit:g} s; "
            "try again later"
        )
