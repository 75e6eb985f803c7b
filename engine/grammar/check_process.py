"""Looks at strangers' grammars in a process of its own: `python -m engine.grammar.check_process`.

A grammar can make the library compute for hours, take all memory, or recurse too deeply. Here it
may: this process has little memory, an alarm clock, and nothing that anybody would miss.
"""

import contextlib
import json
import resource
import signal
import sys
from multiprocessing.connection import Connection

from engine.errors import InvalidRequestError
from engine.grammar.llguidance_source import check, library_text
from engine.grammar.spec import Grammar, GrammarKind

MEMORY_BYTES = 1 << 30
"""Address space; the process itself needs some 100 MiB."""

RECURSION_LIMIT = 5_000


def answer(request: bytes) -> bytes:
    """JSON `{"text": ...}`, the grammar as the library reads it, or `{"error": ...}`."""
    message = json.loads(request)
    try:
        text = library_text(Grammar(GrammarKind(message["kind"]), message["text"]))
        check(text)
    except InvalidRequestError as error:
        return json.dumps({"error": str(error)}).encode()
    except RecursionError:
        return json.dumps({"error": "the grammar is nested too deeply"}).encode()
    except MemoryError:
        return json.dumps({"error": "the grammar needs too much memory"}).encode()
    except ValueError as error:  # the library's wrappers, for what is no JSON and the like
        return json.dumps({"error": f"the grammar cannot be used: {error}"}).encode()
    return json.dumps({"text": text}).encode()


def main(fd: int, limit_s: float) -> None:
    """Answers until the other end is closed."""
    # Ctrl-C reaches the whole process group: this process ends with its engine, not before.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # No core file and no memory for what goes wrong here.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sys.setrecursionlimit(RECURSION_LIMIT)
    end = Connection(fd)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            request = end.recv_bytes()
            # The default action ends the process, in the middle of the library, too: also where
            # nobody is left to kill it.
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            reply = answer(request)
            signal.setitimer(signal.ITIMER_REAL, 0)
            end.send_bytes(reply)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
