"""Log lines of every process: text for people, JSON for machines, with the same facts in both.

A line about a request names it (`request_id`); workers add the attempt, as `id#attempt`. The id is
the client's own where it sent one, so that one search finds a request in every process's log.
"""

import json
import logging
import time
from collections.abc import Mapping
from typing import Any, Literal

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What every record has; the rest came by `extra`."""

_BREAKS = {code: f"\\x{code:02x}" for code in (*range(32), 127, 0x85)} | {
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}
"""Characters that could make one line look like two, or move a terminal's cursor."""


def configure(*, level: LogLevel, format: LogFormat, facts: Mapping[str, str]) -> None:
    """Sets this process's logging up, on standard error. `facts`: in every JSON line (role,
    worker)."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(facts) if format == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class TextLines(logging.Formatter):
    """Time, level, module, message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        record.message = record.message.translate(_BREAKS)
        return super().formatMessage(record)


class JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, the process's facts, and whatever the
    line's author gave beside the message."""

    def __init__(self, facts: Mapping[str, str]) -> None:
        super().__init__()
        self._facts = {**facts}

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
            **self._facts,
        }
        line |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # Escaped to ASCII: some readers break lines at characters that JSON leaves as they are.
        return json.dumps(line, default=str)
