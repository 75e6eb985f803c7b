"""API keys at rest: a YAML file that holds their digests, never the keys.

A key is 256 random bits, drawn here and shown once. Its SHA-256 is stored: a slow hash such as
bcrypt protects words that people choose, which can be guessed; nobody guesses 2^256 numbers however
fast each try is, and a hash that takes 100 ms for every request would be a means of attack itself.

    keys:
      - id: 3f9c2a1b
        tenant: acme
        sha256: 9b74c9897bac770ffc029102a200c5de...
        requests_per_minute: 600

Keys of one tenant share cached prefixes, those of different tenants do not, unless they name the
same `prefix_group`.
"""

import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

KEY = re.compile(r"baton_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")
"""A key: a word that scanners for leaked secrets can look for, its id, and the secret."""

MAX_KEY_CHARACTERS = 128
"""Longer credentials are refused unread."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_KEYS = 100_000
MAX_FILE_BYTES = 64 << 20


class KeyFileError(ValueError):
    """The file is no list of keys; the message says where and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One key as the file knows it."""

    id: str
    """Eight hex digits, part of the key; no secret."""
    tenant: str
    """Whose it is. Requests, prefixes and running requests of tenants are kept apart."""
    sha256: str
    """Of the whole key, in hex."""
    note: str = ""
    """For people."""
    prefix_group: str = ""
    """Tenants that name the same group share cached prefixes; empty: it shares with none."""
    operator: bool = False
    """May see the list of workers and their addresses."""
    revoked: bool = False
    """Refused, and kept so that its use is counted as such."""
    max_concurrent_requests: int = 0
    """Most requests at a time; each choice of an answer is one. 0: no limit."""
    requests_per_minute: int = 0
    """Most requests in a minute, each choice being one; 0: no limit."""
    tokens_per_minute: int = 0
    """Most tokens in a minute, prompt and output; 0: no limit."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{8}", self.id):
            raise KeyFileError(f"id must be eight hex digits, not {self.id!r}")
        if not NAME.fullmatch(self.tenant):
            raise KeyFileError(f"key {self.id}: tenant must be a name, not {self.tenant!r}")
        if self.prefix_group and not NAME.fullmatch(self.prefix_group):
            raise KeyFileError(f"key {self.id}: prefix_group must be a name")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            # It may be a key that somebody put here: it is not shown.
            raise KeyFileError(f"key {self.id}: sha256 must be 64 hex digits")
        for name in LIMITS:
            if getattr(self, name) < 0:
                raise KeyFileError(f"key {self.id}: {name} must not be negative")

    def opens_with(self, key: str) -> bool:
        """Whether this is the key; takes as long for a wrong one, wherever it differs."""
        return hmac.compare_digest(self.sha256, digest_of(key))


LIMITS = ("max_concurrent_requests", "requests_per_minute", "tokens_per_minute")


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def draw_key() -> tuple[str, str]:
    """(key, its id): a new one."""
    key_id = secrets.token_hex(4)
    return f"baton_{key_id}_{secrets.token_urlsafe(32)}", key_id


def read_keys(path: Path) -> dict[str, ApiKey]:
    """The file's keys by id.

    Raises:
        KeyFileError: it is no list of keys.
        OSError: it cannot be read.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise KeyFileError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        # The parser's own message shows what it read.
        raise KeyFileError(f"{path} is not valid YAML") from None
    listed = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(listed, list) or set(content) != {"keys"}:
        raise KeyFileError(f"{path} must be a mapping with one entry, `keys`, which is a list")
    if len(listed) > MAX_KEYS:
        raise KeyFileError(f"{path} lists {len(listed)} keys; at most {MAX_KEYS} are taken")
    keys: dict[str, ApiKey] = {}
    for number, entry in enumerate(listed, start=1):
        try:
            key = _key_of(entry)
        except KeyFileError as error:
            raise KeyFileError(f"{path}, entry {number}: {error}") from None
        if key.id in keys:
            raise KeyFileError(f"{path}, entry {number}: the id {key.id} occurs twice")
        keys[key.id] = key
    return keys


def _key_of(entry: Any) -> ApiKey:
    if not isinstance(entry, Mapping):
        raise KeyFileError("must be a mapping")
    kinds = {field.name: field.type for field in fields(ApiKey)}
    for name, value in entry.items():
        if name not in kinds:
            raise KeyFileError(f"unknown field {str(name)[:64]!r}")
        if type(value) is not kinds[name]:
            kind = getattr(kinds[name], "__name__", "?")
            raise KeyFileError(f"{name} must be {kind}, not {type(value).__name__} (quote texts)")
    for field in fields(ApiKey):
        if field.default is MISSING and field.name not in entry:
            raise KeyFileError(f"{field.name} is missing")
    return ApiKey(**entry)


def write_keys(path: Path, keys: Iterable[ApiKey]) -> None:
    """Replaces the file as a whole, readable by its owner alone: a router that reads it meanwhile
    sees the old one or the new one."""
    defaults = {field.name: field.default for field in fields(ApiKey)}
    entries = [
        {name: value for name, value in asdict(key).items() if value != defaults[name]}
        for key in keys
    ]
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yaml.safe_dump({"keys": entries}, file, sort_keys=False)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
