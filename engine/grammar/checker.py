"""The engine's end of `check_process`: one process, asked one grammar at a time."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time

from engine.errors import EngineError, GrammarsUnavailableError, InvalidRequestError
from engine.grammar.spec import Grammar

SPARE_S = 1.0
"""What the process's own alarm may come later than the limit."""


class GrammarChecker:
    """Used by one thread at a time; `close` by any."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._end: multiprocessing.connection.Connection | None = None
        self._closed = threading.Event()
        self._checking = threading.Lock()

    def check(self, grammar: Grammar, *, limit_s: float) -> str:
        """The grammar as the library reads it, known to compile.

        Raises `InvalidRequestError` for a grammar that is wrong, or that takes longer than
        `limit_s` or more memory than it may; `GrammarsUnavailableError` where no process starts.
        """
        with self._checking:
            return self._check(grammar, limit_s)

    def _check(self, grammar: Grammar, limit_s: float) -> str:
        if self._closed.is_set():
            raise EngineError("the engine ends")
        end = self._running(limit_s)
        request = json.dumps({"kind": grammar.kind.value, "text": grammar.text}).encode()
        started = time.monotonic()
        try:
            end.send_bytes(request)
            if end.poll(limit_s):
                answer = json.loads(end.recv_bytes())
                if "error" in answer:
                    raise InvalidRequestError(answer["error"])
                text: str = answer["text"]
                return text
        except (EOFError, OSError):
            pass  # it died of the grammar, or was closed
        self._kill()
        if self._closed.is_set():
            raise EngineError("the engine ends")
        if time.monotonic() - started >= limit_s:
            raise InvalidRequestError(
                f"the grammar ({grammar.kind.value}) was not compiled within {limit_s:g} s "
                "(--grammar-timeout-s); make it simpler"
            )
        raise InvalidRequestError(
            f"the grammar ({grammar.kind.value}) takes too much memory or is nested too deeply; "
            "make it simpler"
        )

    def _running(self, limit_s: float) -> "multiprocessing.connection.Connection":
        """The connection to a live process, a new one where the last has ended."""
        if self._process is not None and self._process.poll() is None and self._end is not None:
            return self._end
        self._kill()
        ours, theirs = multiprocessing.Pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "engine.grammar.check_process", str(theirs.fileno()),
                 str(limit_s + SPARE_S)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        except OSError as error:
            raise GrammarsUnavailableError(f"no process to check grammars in: {error}") from error
        finally:
            theirs.close()
        self._process, self._end = process, ours
        return ours

    def _kill(self) -> None:
        process, self._process = self._process, None
        end, self._end = self._end, None
        if end is not None:
            end.close()
        if process is not None:
            process.kill()
            process.wait()

    def close(self) -> None:
        """Ends the process; a `check` under way fails."""
        self._closed.set()
        process = self._process
        if process is not None:
            process.kill()
        with self._checking:
            self._kill()
