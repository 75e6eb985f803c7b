"""The hash of a token chain, page by page: names a page by all tokens up to and including it.

Two pages with the same chain hash hold the KV of the same tokens after the same tokens, on
whichever worker, so a seal that carries it says *what* a page holds, not only that its bytes are
whole.
"""

import hashlib
import struct
from collections.abc import Sequence

CHAIN_HASH_BYTES = 16


def namespace_key(lora_id: str, cache_salt: str) -> str:
    """The prefix cache's name space of an adapter and a salt; "" where there is neither. No two
    pairs share one, whatever characters they hold: the adapter's length comes first.
    """
    if not lora_id and not cache_salt:
        return ""
    return f"{len(lora_id)}:{lora_id}{cache_salt}"


def namespace_hash(extra_key: str) -> bytes:
    """What comes before the first page of a namespace (`namespace_key`): b"" for the empty
    one, else 16 bytes that no page's hash equals."""
    if not extra_key:
        return b""
    return hashlib.blake2b(
        extra_key.encode(), digest_size=CHAIN_HASH_BYTES, person=b"namespace"
    ).digest()


def chain_hash(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """16 bytes: BLAKE2b over `previous` and `token_ids` as little-endian int64.

    `previous` is the hash of the page before, or for the first page that of the namespace.
    """
    digest = hashlib.blake2b(previous, digest_size=CHAIN_HASH_BYTES)
    digest.update(struct.pack(f"<{len(token_ids)}q", *token_ids))
    return digest.digest()


def page_chain_hashes(
    token_ids: Sequence[int], page_size: int, *, previous: bytes = b""
) -> list[bytes]:
    """One hash a page of `token_ids`; a last, partly filled page has one of its own."""
    hashes: list[bytes] = []
    for start in range(0, len(token_ids), page_size):
        previous = chain_hash(previous, token_ids[start : start + page_size])
        hashes.append(previous)
    return hashes
