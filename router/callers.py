"""Who calls: authentication by API key, and what each key may use at a time.

Without a file of keys everybody is the same caller, without limits. With one, a request without a
valid key is refused at the door, before its body is read. The file is read again when it changes,
so that a revoked key is refused within a second; what a key has used outlives that.

Limits are token buckets of one number each: however many requests come, a key costs as much memory.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from protos.errors import BatonError, ErrorCode
from router.api_keys import KEY, MAX_KEY_CHARACTERS, ApiKey, KeyFileError, read_keys

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0
"""Pause between two looks at the file."""
CONCURRENT_RETRY_S = 1.0
"""Hint where a key's requests must end first."""

Clock = Callable[[], float]


class Bucket:
    """So many a minute, spent as one likes: up to a minute's worth at once."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self._clock = clock
        self._level = float(per_minute)
        self._filled_at = clock()
        self.per_minute = per_minute

    def _fill(self) -> None:
        now = self._clock()
        gained = (now - self._filled_at) * self.per_minute / 60
        self._level = min(float(self.per_minute), self._level + gained)
        self._filled_at = now

    def wait_s(self, amount: float) -> float:
        """Seconds until so much is there; 0: it is."""
        self._fill()
        return max(0.0, (amount - self._level) * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        """Also more than there is: the next one waits for it."""
        self._fill()
        self._level -= amount


class Caller:
    """One key's use. Everybody without keys shares `ANYBODY`."""

    def __init__(self, key: ApiKey | None = None, *, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._running = 0
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self._limit = 0
        self._key: ApiKey | None = None
        if key is not None:
            self.follow(key)

    @property
    def key(self) -> ApiKey | None:
        """None: no keys are asked for."""
        return self._key

    @property
    def tenant(self) -> str:
        """Whose requests these are; empty: everybody's."""
        return self._key.tenant if self._key is not None else ""

    @property
    def operator(self) -> bool:
        """May see the workers."""
        return self._key is None or self._key.operator

    def follow(self, key: ApiKey) -> None:
        """The file says this of the key now; a limit that stays keeps its level."""
        self._key = key
        self._limit = key.max_concurrent_requests
        self._requests = self._bucket(self._requests, key.requests_per_minute)
        self._tokens = self._bucket(self._tokens, key.tokens_per_minute)

    def _bucket(self, present: Bucket | None, per_minute: int) -> Bucket | None:
        if present is not None and present.per_minute == per_minute:
            return present
        return Bucket(per_minute, self._clock) if per_minute else None

    def enter(self) -> None:
        """Counts one request from now until `leave`.

        Raises:
            CallerLimitError: the key has used what it may.
        """
        if self._limit and self._running >= self._limit:
            raise CallerLimitError("max_concurrent_requests", self._limit, CONCURRENT_RETRY_S)
        if self._tokens is not None and (wait_s := self._tokens.wait_s(1.0)):
            raise CallerLimitError("tokens_per_minute", self._tokens.per_minute, wait_s)
        self.count_call()
        self._running += 1

    def count_call(self) -> None:
        """A call that takes no place, such as tokenizing.

        Raises:
            CallerLimitError: there were too many in a minute.
        """
        if self._requests is None:
            return
        if wait_s := self._requests.wait_s(1.0):
            raise CallerLimitError("requests_per_minute", self._requests.per_minute, wait_s)
        self._requests.take(1.0)

    def use_tokens(self, count: int) -> None:
        """Tokens of a prompt, when it is known, and of an output, when it has ended."""
        if self._tokens is not None:
            self._tokens.take(count)

    def leave(self) -> None:
        self._running -= 1

    def cache_salt(self, salt: str) -> str:
        """The name space of cached prefixes: the caller's own, and within it the request's."""
        key = self._key
        if key is None:
            return salt
        space = f"group:{key.prefix_group}" if key.prefix_group else f"tenant:{key.tenant}"
        # Names hold no line break, so nothing a request says leads into another's space.
        return hashlib.sha256(f"{space}\n{salt}".encode()).hexdigest()


ANYBODY = Caller()
"""Without keys, everybody is one caller, without limits."""


class CallerLimitError(BatonError):
    """A key has used what it may; says when more is there."""

    def __init__(self, limit: str, value: int, retry_after_s: float) -> None:
        super().__init__(
            ErrorCode.RESOURCE_EXHAUSTED,
            f"this API key's limit is reached: {limit} {value}; try again in "
            f"{math.ceil(retry_after_s)} s",
            retry_after_s=retry_after_s,
        )
        self.limit = limit


class UnknownCallerError(BatonError):
    """No valid key came with the call."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(ErrorCode.UNAUTHENTICATED, message)
        self.reason = reason
        """missing, malformed, unknown or revoked."""


@dataclass(slots=True)
class Callers:
    """Everybody who may call."""

    path: Path | None
    """The file of keys; None: everybody may."""
    clock: Clock = time.monotonic
    _callers: dict[str, Caller] = field(default_factory=dict)
    _seen: tuple[int, int, int] = (0, 0, 0)
    _looked_at: float = 0.0

    def __post_init__(self) -> None:
        """Raises OSError: the file cannot be read, or is no list of keys."""
        if self.path is None:
            return
        try:
            self._read(self.path)
        except KeyFileError as error:
            raise OSError(f"api_keys_file: {error}") from None
        if not self._callers:
            logger.warning("%s holds no key: every request will be refused", self.path)

    def caller(self, authorization: str | None) -> Caller:
        """Who calls with that header.

        Raises:
            UnknownCallerError: nobody who may.
        """
        if self.path is None:
            return ANYBODY
        self._look()
        if not authorization:
            raise UnknownCallerError("missing", "give an API key, as `Authorization: Bearer KEY`")
        scheme, _, key = authorization.strip().partition(" ")
        key = key.strip()
        found = KEY.fullmatch(key) if len(key) <= MAX_KEY_CHARACTERS else None
        if scheme.lower() != "bearer" or found is None:
            raise UnknownCallerError("malformed", "this is no API key of Baton's: Bearer baton_...")
        caller = self._callers.get(found[1])
        known = caller.key if caller is not None else None
        if caller is None or known is None or not known.opens_with(key):
            raise UnknownCallerError("unknown", "this API key is not known here")
        if known.revoked:
            raise UnknownCallerError("revoked", f"the API key {known.id} was revoked")
        return caller

    def _look(self) -> None:
        now = self.clock()
        if self.path is None or now - self._looked_at < LOOK_INTERVAL_S:
            return
        self._looked_at = now
        try:
            if self._state(self.path) != self._seen:
                self._read(self.path)
                logger.info("%s was read again: %d keys", self.path, len(self._callers))
        except (OSError, KeyFileError) as error:
            logger.error("the API keys stay as they were: %s", error)

    def _read(self, path: Path) -> None:
        self._seen = self._state(path)
        keys = read_keys(path)
        for gone in self._callers.keys() - keys.keys():
            del self._callers[gone]
        for key_id, key in keys.items():
            if key_id in self._callers:
                self._callers[key_id].follow(key)
            else:
                self._callers[key_id] = Caller(key, clock=self.clock)

    @staticmethod
    def _state(path: Path) -> tuple[int, int, int]:
        stat = path.stat()
        return stat.st_mtime_ns, stat.st_ino, stat.st_size
