"""Masks on their way from the host to the logits."""

import pytest
import torch

from engine.execution.logit_edits import LogitBias, LogitEdits
from engine.execution.token_mask import MaskBuffer, TokenMask

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def words_of(allowed: torch.Tensor) -> torch.Tensor:
    """[r, words] int32 from [r, tokens] bool."""
    tokens = allowed.shape[1]
    padded = torch.zeros(allowed.shape[0], -(-tokens // 32) * 32, dtype=torch.int64)
    padded[:, :tokens] = allowed
    weights = torch.tensor([2**bit for bit in range(31)] + [-(2**31)])
    return (padded.view(allowed.shape[0], -1, 32) * weights).sum(-1).to(torch.int32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000])
def test_a_mask_forbids_exactly_its_own_rows_tokens(device: str, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(5, vocab, generator=generator)
    allowed = torch.rand(2, vocab, generator=generator) < 0.5
    # A backend's vocabulary may be wider than the logits.
    words = words_of(torch.cat([allowed, torch.ones(2, 40, dtype=torch.bool)], dim=1))
    buffer = MaskBuffer()
    mask = TokenMask(
        rows=torch.tensor([3, 1], device=device),
        masks=lambda: buffer.upload(
            2, words.shape[1], lambda host: host.copy_(words), torch.device(device)
        ),
    )
    bias = LogitBias(
        rows=torch.tensor([1], device=device),
        token_ids=torch.tensor([0], device=device),
        values=torch.tensor([100.0], device=device),
    )
    before = logits.to(device)
    position = torch.zeros(5, dtype=torch.int64, device=device)
    edited = LogitEdits(bias=bias, mask=mask).apply(before, position).cpu()
    assert torch.equal(before.cpu(), logits)
    wanted = logits.clone()
    wanted[1, 0] += 100.0
    wanted[3][~allowed[0]] = -torch.inf
    wanted[1][~allowed[1]] = -torch.inf
    assert torch.equal(edited, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_a_buffer_is_used_again_and_never_under_a_copy(device: str) -> None:
    buffer, places = MaskBuffer(), set()
    uploaded = []
    for step in range(50):
        rows = 1 + step % 4

        def fill(host: torch.Tensor, value: int = step) -> None:
            places.add(host.data_ptr())
            host.fill_(value)

        uploaded.append(buffer.upload(rows, 100_000, fill, torch.device(device)).sum() // rows)
    assert len(places) <= 4  # it only grew
    assert [int(total) for total in uploaded] == [step * 100_000 for step in range(50)]
