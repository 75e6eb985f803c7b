"""Compiles grammars off the scheduler's thread, each distinct one once.

Bounded in every direction: threads, waiting compilations, time of one, text, and what is kept. A
grammar is a program that a stranger sends; none may cost the other requests their next token.
"""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

from engine.errors import EngineError, InvalidRequestError, QueueFullError
from engine.grammar.backend import CompiledGrammar, GrammarBackend
from engine.grammar.spec import Grammar

COMPILE_THREADS = 2
"""One slow grammar must not hold up all others; more would take cores from the model."""

MAX_WAITING = 64
"""Compilations that may wait for a thread; one more is refused."""

CACHED_GRAMMARS = 256
"""Compiled grammars, and refusals, that are kept; a few 10 KB each."""


class Compilation:
    """One grammar on its way; shared by all who asked for it."""

    __slots__ = ("_future", "waiters")

    def __init__(self, future: "Future[CompiledGrammar]") -> None:
        self._future = future
        self.waiters = 0

    def done(self) -> bool:
        return self._future.done()

    def started(self) -> bool:
        return self._future.running() or self._future.done()

    def result(self) -> CompiledGrammar:
        """Call when `done`. Raises the `EngineError` that it ended with."""
        try:
            return self._future.result(timeout=0)
        except CancelledError as error:
            raise EngineError("the grammar's compilation was given up") from error

    def is_final(self) -> bool:
        """Whether the same would come of another try. Call when `done`."""
        try:
            self.result()
        except InvalidRequestError:
            return True  # the grammar's own fault
        except EngineError:
            return False
        return True

    def cancel(self) -> bool:
        """True where it had not begun."""
        return self._future.cancel()


class GrammarCompiler:
    """Used from the scheduler's thread; `on_done` runs on others."""

    def __init__(
        self,
        backend: GrammarBackend,
        *,
        timeout_s: float,
        on_done: Callable[[], None] = lambda: None,
        threads: int = COMPILE_THREADS,
        max_waiting: int = MAX_WAITING,
        cached: int = CACHED_GRAMMARS,
    ) -> None:
        """`timeout_s`: longest compilation. `on_done`: called when one has ended, however; must
        not block."""
        self.backend = backend
        self.timeout_s = timeout_s
        self._on_done = on_done
        self._max_waiting = max_waiting
        self._cached = cached
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="grammar")
        self._under_way: dict[Grammar, Compilation] = {}
        self._finished: OrderedDict[Grammar, Compilation] = OrderedDict()
        # The first grammar need not wait for the tokenizer's tables. What goes wrong is told to
        # whoever sends one.
        self._pool.submit(backend.warm_up)

    def submit(self, grammar: Grammar) -> Compilation:
        """Starts compiling, or joins one that is under way or done; `leave` is its counterpart.

        Raises `QueueFullError`.
        """
        self._collect()
        compilation = self._finished.get(grammar)
        if compilation is not None:
            self._finished.move_to_end(grammar)
            return compilation
        compilation = self._under_way.get(grammar)
        if compilation is None:
            waiting = sum(1 for other in self._under_way.values() if not other.started())
            if waiting >= self._max_waiting:
                raise QueueFullError(
                    f"{waiting} grammars wait to be compiled already, the bound; try again later"
                )
            compilation = Compilation(
                self._pool.submit(self.backend.compile, grammar, limit_s=self.timeout_s)
            )
            self._under_way[grammar] = compilation
            compilation._future.add_done_callback(lambda _: self._on_done())
        compilation.waiters += 1
        return compilation

    def leave(self, grammar: Grammar) -> None:
        """Somebody who waited for it does not any more; it is given up if nobody else does."""
        compilation = self._under_way.get(grammar)
        if compilation is None:
            return
        compilation.waiters -= 1
        if compilation.waiters <= 0 and compilation.cancel():
            del self._under_way[grammar]

    def _collect(self) -> None:
        """Moves what is done to the cache, and drops what was used longest ago."""
        for grammar in [g for g, c in self._under_way.items() if c.done()]:
            compilation = self._under_way.pop(grammar)
            if compilation.is_final():
                self._finished[grammar] = compilation
        while len(self._finished) > self._cached:
            self._finished.popitem(last=False)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.backend.close()
