"""`baton keys`: makes, lists and revokes the API keys of a router's file.

The key is printed once, on standard output, and can be had no second time: the file holds its
digest. Routers read the file again within a second of its change.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from baton.config import Scalar, SettingsError, fill
from baton.tables import keys_table, show
from router.api_keys import ApiKey, KeyFileError, digest_of, draw_key, read_keys, write_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFile:
    """Which file."""

    api_keys_file: str = "api-keys.yaml"
    """YAML file with the digests of API keys, as `baton router --api-keys-file` takes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey(KeyFile):
    """A key to be made."""

    note: str = ""
    """For people: what the key is for."""

    prefix_group: str = ""
    """Tenants that name the same group share cached prefixes; empty: the tenant shares with none.
    Who shares can learn from the time of an answer whether others have sent a prefix."""

    operator: bool = False
    """May also see the list of workers (`baton ps`)."""

    max_concurrent_requests: int = 0
    """Most requests at a time; each choice of an answer is one. 0: no limit."""

    requests_per_minute: int = 0
    """Most requests in a minute; 0: no limit."""

    tokens_per_minute: int = 0
    """Most tokens in a minute, prompt and output; 0: no limit."""


def run_add(given: dict[str, Scalar]) -> int:
    """Makes a key of a tenant, and prints it."""
    config = fill(NewKey, given)
    path = Path(config.api_keys_file)
    keys = _read(path, missing_ok=True)
    key, key_id = draw_key()
    while key_id in keys:
        key, key_id = draw_key()
    named = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(NewKey)
        if field.name != "api_keys_file"
    }
    try:
        made = ApiKey(id=key_id, tenant=str(given["tenant"]), sha256=digest_of(key), **named)
    except KeyFileError as error:
        raise SettingsError(str(error)) from error
    _write(path, {**keys, key_id: made})
    print(key)
    return 0


def run_list(given: dict[str, Scalar]) -> int:
    """Shows the keys of a file, which are not the keys themselves."""
    show(keys_table(list(_read(Path(fill(KeyFile, given).api_keys_file)).values())))
    return 0


def run_revoke(given: dict[str, Scalar]) -> int:
    """Has a key refused from now on."""
    path, key_id = Path(fill(KeyFile, given).api_keys_file), str(given["id"])
    keys = _read(path)
    if key_id not in keys:
        raise SettingsError(f"{path} has no key with the id {key_id!r} (`baton keys list`)")
    _write(path, {**keys, key_id: dataclasses.replace(keys[key_id], revoked=True)})
    return 0


def _read(path: Path, *, missing_ok: bool = False) -> dict[str, ApiKey]:
    try:
        return read_keys(path)
    except FileNotFoundError as error:
        if missing_ok:
            return {}
        raise SettingsError(f"{path} does not exist; `baton keys add` makes it") from error
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except KeyFileError as error:
        raise SettingsError(str(error)) from error


def _write(path: Path, keys: dict[str, ApiKey]) -> None:
    try:
        write_keys(path, keys.values())
    except OSError as error:
        raise SettingsError(f"{path}: cannot be written: {error.strerror}") from error
