"""What a KV page looks like to the transfer, and the fingerprint that two workers must share.

A page is one contiguous block `[layers, 2, page_size, kv_heads, head_dim]` (keys, then values, of
every layer): one descriptor on the wire, one seal, one copy.
"""

from dataclasses import dataclass

from protos.fingerprint import make_fingerprint

WORD_BYTES = 4
"""The digest reads pages as 32-bit words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    """Shape of one KV page."""

    layers: int
    """Attention layers whose KV the page holds."""

    page_size: int
    """Tokens a page."""

    kv_heads: int
    """KV heads of this rank."""

    head_dim: int
    """Elements of one head's key or value."""

    itemsize: int
    """Bytes an element: 2 for bfloat16, 4 for float32."""

    def __post_init__(self) -> None:
        for name in ("layers", "page_size", "kv_heads", "head_dim", "itemsize"):
            if getattr(self, name) < 1:
                raise ValueError(f"PageLayout.{name} is {getattr(self, name)}; must be >= 1")
        if self.head_dim * self.itemsize % WORD_BYTES:
            raise ValueError(
                f"a head of {self.head_dim} elements of {self.itemsize} bytes is not a whole "
                f"number of {WORD_BYTES}-byte words, which page digests need"
            )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys (or values) in one layer."""
        return self.kv_heads * self.head_dim * self.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of the keys (or values) of one layer: a contiguous part of the page."""
        return self.page_size * self.token_bytes

    @property
    def rows(self) -> int:
        """Rows of a page: (layer, key or value) pairs."""
        return self.layers * 2

    @property
    def page_bytes(self) -> int:
        return self.rows * self.row_bytes

    def pages_of(self, tokens: int) -> int:
        """Pages that hold that many tokens."""
        return -(-tokens // self.page_size)

    def valid_tokens(self, position: int, total_tokens: int) -> int:
        """Tokens of the page at `position` of a sequence of `total_tokens`; 0 beyond its end."""
        return max(0, min(self.page_size, total_tokens - position * self.page_size))


def compatibility_fingerprint(model_digest: str, dtype_name: str, layout: PageLayout) -> str:
    """Everything that two workers must share to exchange KV, as `protos.fingerprint` reads it.

    `model_digest` identifies configuration and weights. The page's size may differ
    (kvtransfer/geometry.py); the protocol's version is compared apart.
    """
    return make_fingerprint(
        model=model_digest[:16],
        dtype=dtype_name.removeprefix("torch."),
        layers=layout.layers,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        element_bytes=layout.itemsize,
    )
