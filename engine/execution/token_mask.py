"""Masks over the vocabulary, from the host to the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TokenMask:
    """Which tokens the `r` requests with a grammar may draw."""

    rows: torch.Tensor
    """[r] int64; places in the batch."""
    masks: Callable[[], torch.Tensor]
    """Gives [r, words] int32 on the logits' device, bit `t % 32` of word `t // 32` for token `t`.
    Called once a step, when the forward was launched: the host computes masks while the device
    computes logits. May wait for the steps before, as the masks depend on what they drew."""

    def after(self, tokens_known: Callable[[], None]) -> TokenMask:
        """The same, once `tokens_known` has returned: it sees to it that the draws of all steps
        before have reached their grammars."""

        def masks() -> torch.Tensor:
            tokens_known()
            return self.masks()

        return TokenMask(rows=self.rows, masks=masks)

    def apply(self, logits: torch.Tensor) -> None:
        """Sets the logits [b, vocab] float32 of tokens that may not be drawn to -inf, in place."""
        # As bytes: eight bits each, and a quarter of what words would take to spread out.
        spread = self.masks().view(torch.uint8)
        bit = torch.arange(8, dtype=torch.uint8, device=logits.device)
        allowed = ((spread[:, :, None] >> bit) & 1).bool().flatten(1)[:, : logits.shape[-1]]
        logits[self.rows] = logits[self.rows].masked_fill(~allowed, float("-inf"))


class MaskBuffer:
    """Memory for masks on the host, used again in every step; pinned where that helps."""

    def __init__(self) -> None:
        self._host = torch.empty(0, dtype=torch.int32)
        self._copied: torch.cuda.Event | None = None

    def upload(
        self,
        count: int,
        words: int,
        fill: Callable[[torch.Tensor], None],
        device: torch.device,
    ) -> torch.Tensor:
        """[count, words] int32 on `device`, as `fill` writes them on the host; valid until the next
        call. Does not wait for the device, except for a copy that may still read the memory."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._host.numel() < count * words:
            self._host = torch.empty(
                count * words, dtype=torch.int32, pin_memory=device.type == "cuda"
            )
        masks = self._host[: count * words].view(count, words)
        fill(masks)
        if device.type != "cuda":
            return masks.to(device)
        on_device = masks.to(device, non_blocking=True)
        if self._copied is None:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()
        return on_device
