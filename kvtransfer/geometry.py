"""How one worker's pages lie in the landing slots of another that cuts KV differently.

Two workers must share model, dtype and digest (the fingerprint); how many tokens make a page and
among how many ranks the heads are split is each one's own affair. A page travels as its writer cut
it, one piece a rank, since its seal covers it so, and lands in as many neighbouring slots as it
needs; the copy out of the slots (kvtransfer/landing.py) cuts it anew. So neither wire nor state
machine knows of the difference.
"""

from dataclasses import dataclass, replace

from kvtransfer.layout import PageLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class KvGeometry:
    """What may differ between two workers that exchange KV."""

    page_size: int
    """Tokens a page."""

    tp_size: int = 1
    """Ranks that share the heads."""

    def __post_init__(self) -> None:
        if self.page_size < 1 or self.tp_size < 1:
            raise ValueError(f"pages of {self.page_size} tokens on {self.tp_size} ranks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One writing rank's part of a page, in the slots of one window."""

    rank: int
    """Whose digest in the seal covers it."""

    heads: range
    """The model's KV heads that it holds."""

    offset: int
    """Where it begins in the first slot. Bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterPages:
    """Pages as a writer sends them, in a window of this worker."""

    geometry: KvGeometry
    layout: PageLayout
    """One rank's part of a page, as the writer cut and sealed it."""

    pieces: tuple[Piece, ...]
    """What lies in the window: of every rank whose heads are wanted there."""

    slots: int
    """Neighbouring slots that a page takes, from the one that its ticket or credit names."""

    page_bytes: int
    """KV of a page, over all ranks."""

    @property
    def page_size(self) -> int:
        return self.layout.page_size

    @property
    def window_bytes(self) -> int:
        """Bytes of a page in the window."""
        return len(self.pieces) * self.layout.page_bytes

    def pages_of(self, tokens: int) -> int:
        return self.layout.pages_of(tokens)

    def valid_tokens(self, position: int, total_tokens: int) -> int:
        return self.layout.valid_tokens(position, total_tokens)

    def first_position(self, prefix_len: int) -> int:
        """The page that the first token after `prefix_len` lies in: the first to travel."""
        return prefix_len // self.layout.page_size


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlace:
    """Where one rank of this worker finds what lands for it."""

    layout: PageLayout
    """Its pages."""

    kv_heads: int
    """Of the whole model."""

    rank: int = 0
    tp_size: int = 1

    shared_window: bool = False
    """Whether one window takes all heads for all ranks (host memory), or each rank has its own,
    which takes the heads of that rank."""

    @property
    def heads(self) -> range:
        """The model's KV heads that this rank holds."""
        return rank_heads(self.kv_heads, rank=self.rank, tp_size=self.tp_size)

    def writer_pages(self, theirs: KvGeometry, *, slot_bytes: int) -> WriterPages:
        """How pages of a writer with that geometry land in this rank's window. Raises ValueError
        for one that splits the heads as no worker does."""
        if self.kv_heads % theirs.tp_size and theirs.tp_size % self.kv_heads:
            raise ValueError(f"{self.kv_heads} KV heads cannot lie on {theirs.tp_size} ranks")
        share = len(rank_heads(self.kv_heads, rank=0, tp_size=theirs.tp_size))
        layout = replace(self.layout, page_size=theirs.page_size, kv_heads=share)
        most = max(len(self._pieces(theirs, layout, rank)) for rank in range(self.tp_size))
        return WriterPages(
            geometry=theirs,
            layout=layout,
            pieces=self._pieces(theirs, layout, self.rank),
            # Of all ranks alike, since they go by the books of one.
            slots=-(-most * layout.page_bytes // slot_bytes),
            page_bytes=layout.page_bytes // share * self.kv_heads,
        )

    def _pieces(self, theirs: KvGeometry, layout: PageLayout, rank: int) -> tuple[Piece, ...]:
        wanted = range(self.kv_heads)
        if not self.shared_window:
            wanted = rank_heads(self.kv_heads, rank=rank, tp_size=self.tp_size)
        return pieces_for(wanted, self.kv_heads, theirs.tp_size, piece_bytes=layout.page_bytes)


def rank_heads(kv_heads: int, *, rank: int, tp_size: int) -> range:
    """The KV heads of one rank, where one of the two numbers divides the other: with more ranks
    than heads, each head lives on several."""
    if tp_size <= kv_heads:
        share = kv_heads // tp_size
        return range(rank * share, (rank + 1) * share)
    head = rank * kv_heads // tp_size
    return range(head, head + 1)


def pieces_for(
    wanted: range, kv_heads: int, tp_size: int, *, piece_bytes: int
) -> tuple[Piece, ...]:
    """The parts of a page of `tp_size` ranks that hold the heads `wanted`, one behind another; of
    ranks that hold the same, the first."""
    chosen: list[Piece] = []
    for rank in range(tp_size):
        heads = rank_heads(kv_heads, rank=rank, tp_size=tp_size)
        again = bool(chosen) and chosen[-1].heads == heads
        if not again and heads.start < wanted.stop and wanted.start < heads.stop:
            chosen.append(Piece(rank=rank, heads=heads, offset=len(chosen) * piece_bytes))
    return tuple(chosen)
