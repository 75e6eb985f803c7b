"""How one worker's pages lie in the landing slots of another that cuts KV differently.

Two workers must share model, dtype and digest (the fingerprint); how many tokens make a page is
each one's own affair. A page always travels as its writer cut it, since its seal covers it so, and
lands in as many neighbouring slots as it needs; the copy out of the slots (kvtransfer/landing.py)
cuts it anew. So neither wire nor state machine knows of the difference.
"""

from dataclasses import dataclass, replace

from kvtransfer.layout import PageLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class KvGeometry:
    """What may differ between two workers that exchange KV."""

    page_size: int
    """Tokens a page."""

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise ValueError(f"pages of {self.page_size} tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterPages:
    """Pages as a writer sends them, in the window of this worker."""

    layout: PageLayout
    """One page, as the writer cut and sealed it."""

    slots: int
    """Neighbouring slots that a page takes, from the one that its ticket or credit names."""

    @property
    def page_size(self) -> int:
        return self.layout.page_size

    @property
    def page_bytes(self) -> int:
        return self.layout.page_bytes

    def pages_of(self, tokens: int) -> int:
        return self.layout.pages_of(tokens)

    def valid_tokens(self, position: int, total_tokens: int) -> int:
        return self.layout.valid_tokens(position, total_tokens)

    def first_position(self, prefix_len: int) -> int:
        """The page that the first token after `prefix_len` lies in: the first to travel."""
        return prefix_len // self.layout.page_size


def writer_pages(mine: PageLayout, theirs: KvGeometry, *, slot_bytes: int) -> WriterPages:
    """How pages of a writer with geometry `theirs` land in slots of `slot_bytes` here, where pages
    are `mine`."""
    layout = replace(mine, page_size=theirs.page_size)
    return WriterPages(layout=layout, slots=-(-layout.page_bytes // slot_bytes))
