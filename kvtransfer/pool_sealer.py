"""The digests of source pages, when they are sealed and again when they leave."""

from collections.abc import Sequence
from typing import Protocol

import torch

from kvtransfer.digest import digest_pages, seals_of
from kvtransfer.layout import PageLayout


class Sealer(Protocol):
    """Over all ranks of this worker: a seal holds the digest of each rank's part, in order."""

    def seals(self, pages: Sequence[int], valid_tokens: Sequence[int]) -> list[bytes]:
        """Seals of pool pages as they are now; waits for the device."""
        ...


class PoolSealer:
    """`Sealer` of one pool."""

    def __init__(self, pool: torch.Tensor, layout: PageLayout) -> None:
        """`pool`: [pages, page_bytes] uint8."""
        self._pool = pool
        self._layout = layout

    def seals(self, pages: Sequence[int], valid_tokens: Sequence[int]) -> list[bytes]:
        return seals_of(digest_pages(self._pool, pages, valid_tokens, self._layout))
