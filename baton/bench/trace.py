"""Reads a trace: JSON lines, one request each, as public traces have them.

Field names: `timestamp` (or Azure's `TIMESTAMP`, a date and time), `input_length` (or
`ContextTokens`), `output_length` (or `GeneratedTokens`). Mooncake's `hash_ids` are honoured: equal
ids give equal blocks of 512 tokens, so that prefixes are shared as they were. Any other field is
refused by name.
"""

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from baton.bench.workload import BLOCK_TOKENS
from baton.config import SettingsError

TIME_NAMES = ("timestamp", "TIMESTAMP")
INPUT_NAMES = ("input_length", "ContextTokens")
OUTPUT_NAMES = ("output_length", "GeneratedTokens")
HASH_NAMES = ("hash_ids",)
KNOWN = frozenset({*TIME_NAMES, *INPUT_NAMES, *OUTPUT_NAMES, *HASH_NAMES})


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceEntry:
    """One request of a trace."""

    at_s: float
    """Arrival after the trace's first one."""

    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()
    """Names of the prompt's blocks; empty: its tokens are random."""


def read_trace(path: Path, *, ms_per_unit: float) -> list[TraceEntry]:
    """The requests of a file by arrival, the first one at 0 s.

    Args:
        ms_per_unit: what one unit of a numeric timestamp is: 1 for milliseconds, 1000 for seconds.

    Raises:
        SettingsError: the file cannot be read, or a line is no request; it names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"trace: {path} cannot be read: {error}") from error
    entries = [
        _entry(line, where=f"trace: {path}, line {number}", ms_per_unit=ms_per_unit)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not entries:
        raise SettingsError(f"trace: {path} holds no request")
    entries.sort(key=lambda entry: entry.at_s)
    first = entries[0].at_s
    return [
        TraceEntry(
            at_s=entry.at_s - first,
            input_length=entry.input_length,
            output_length=entry.output_length,
            hash_ids=entry.hash_ids,
        )
        for entry in entries
    ]


def _entry(line: str, *, where: str, ms_per_unit: float) -> TraceEntry:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{where}: no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise SettingsError(f"{where}: must be a JSON object")
    unknown = sorted(fields.keys() - KNOWN)
    if unknown:
        raise SettingsError(
            f"{where}: unknown field {unknown[0]}; known: {', '.join(sorted(KNOWN))}"
        )
    length = _length(fields, INPUT_NAMES, where)
    return TraceEntry(
        at_s=_seconds(_value(fields, TIME_NAMES, where), where, ms_per_unit),
        input_length=length,
        output_length=_length(fields, OUTPUT_NAMES, where),
        hash_ids=_hash_ids(fields.get("hash_ids", []), length, where),
    )


def _value(fields: dict[str, Any], names: tuple[str, ...], where: str) -> Any:
    present = [name for name in names if name in fields]
    if len(present) != 1:
        raise SettingsError(f"{where}: needs one of {', '.join(names)}")
    return fields[present[0]]


def _length(fields: dict[str, Any], names: tuple[str, ...], where: str) -> int:
    value = _value(fields, names, where)
    if type(value) is not int or value < 1:
        raise SettingsError(f"{where}: {names[0]} must be a whole number above 0, not {value!r}")
    return value


def _seconds(value: Any, where: str, ms_per_unit: float) -> float:
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise SettingsError(f"{where}: {value!r} is no date and time") from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if type(value) not in (int, float) or not math.isfinite(value):
        raise SettingsError(f"{where}: timestamp must be a finite number, not {value!r}")
    return float(value) * ms_per_unit / 1000


def _hash_ids(value: Any, length: int, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise SettingsError(f"{where}: hash_ids must be a list of whole numbers")
    if value and len(value) * BLOCK_TOKENS < length:
        raise SettingsError(
            f"{where}: {len(value)} hash_ids of {BLOCK_TOKENS} tokens do not cover {length} tokens"
        )
    return tuple(value)
