"""Seals: what they catch, what they ignore, and that ranges add up."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.digest import (
    copy_and_digest,
    digest_pages,
    digest_parts,
    seal_from_int,
    seal_to_int,
    seals_of,
)
from kvtransfer.layout import PageLayout, compatibility_fingerprint
from protos.fingerprint import difference

LAYOUTS = [
    PageLayout(layers=1, page_size=1, kv_heads=1, head_dim=2, itemsize=2),
    PageLayout(layers=2, page_size=4, kv_heads=2, head_dim=4, itemsize=2),
    PageLayout(layers=3, page_size=8, kv_heads=1, head_dim=8, itemsize=4),
    PageLayout(layers=2, page_size=16, kv_heads=3, head_dim=6, itemsize=2),
]


def random_pool(layout: PageLayout, pages: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (pages, layout.page_bytes)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


def seal(pool: torch.Tensor, page: int, valid: int, layout: PageLayout) -> bytes:
    return seals_of(digest_pages(pool, [page], [valid], layout))[0]


def is_valid_byte(layout: PageLayout, offset: int, valid: int) -> bool:
    return offset % layout.row_bytes < valid * layout.token_bytes


@given(st.sampled_from(LAYOUTS), st.data())
def test_a_flipped_bit_changes_the_seal_if_and_only_if_its_token_is_valid(
    layout: PageLayout, data: st.DataObject
) -> None:
    pool = random_pool(layout, seed=data.draw(st.integers(0, 100)))
    valid = data.draw(st.integers(1, layout.page_size))
    offset = data.draw(st.integers(0, layout.page_bytes - 1))
    bit = data.draw(st.integers(0, 7))
    before = seal(pool, 1, valid, layout)
    pool[1, offset] ^= 1 << bit
    changed = seal(pool, 1, valid, layout) != before
    assert changed == is_valid_byte(layout, offset, valid)


@given(st.sampled_from(LAYOUTS), st.data())
def test_swapped_tokens_and_swapped_layers_change_the_seal(
    layout: PageLayout, data: st.DataObject
) -> None:
    pool = random_pool(layout)
    before = seal(pool, 0, layout.page_size, layout)
    rows = pool[0].view(layout.rows, layout.row_bytes)
    if layout.page_size > 1 and data.draw(st.booleans()):
        tokens = rows.view(layout.rows, layout.page_size, layout.token_bytes)
        tokens[0, [0, 1]] = tokens[0, [1, 0]].clone()
    else:
        rows[[0, 1]] = rows[[1, 0]].clone()
    assert seal(pool, 0, layout.page_size, layout) != before


@given(st.sampled_from(LAYOUTS), st.data())
def test_ranges_over_layers_and_heads_sum_to_the_page(
    layout: PageLayout, data: st.DataObject
) -> None:
    pool = random_pool(layout)
    valid = data.draw(st.integers(1, layout.page_size))
    parts = digest_parts(pool[2], valid, layout)
    assert parts.shape == (layout.layers, 2, layout.kv_heads)
    assert seal_from_int(int(parts.sum())) == seal(pool, 2, valid, layout)


@given(st.sampled_from(LAYOUTS), st.data())
def test_token_ranges_sum_to_the_page(layout: PageLayout, data: st.DataObject) -> None:
    pool = random_pool(layout)
    valid = data.draw(st.integers(1, layout.page_size))
    head, rest = pool.clone(), pool.clone()
    size = valid * layout.token_bytes
    for page in (0, 1, 2):
        head[page].view(layout.rows, -1)[:, size:] = 0
        rest[page].view(layout.rows, -1)[:, :size] = 0
    total = digest_pages(pool, [0, 1, 2], [layout.page_size] * 3, layout)
    split = digest_pages(head, [0, 1, 2], [layout.page_size] * 3, layout) + digest_pages(
        rest, [0, 1, 2], [layout.page_size] * 3, layout
    )
    assert torch.equal(total, split)


def test_the_seal_of_a_page_is_fixed_for_ever() -> None:
    layout = LAYOUTS[1]
    page = (torch.arange(layout.page_bytes) % 251).to(torch.uint8).view(1, -1)
    assert seal_to_int(seal(page, 0, 3, layout)) == 17916775818560072704


@given(st.sampled_from(LAYOUTS), st.data())
def test_copying_brings_valid_tokens_only_and_digests_what_was_copied(
    layout: PageLayout, data: st.DataObject
) -> None:
    window, pool = random_pool(layout, seed=1), random_pool(layout, pages=5, seed=2)
    before = pool.clone()
    valid = data.draw(st.integers(1, layout.page_size))
    digests = copy_and_digest(window, [2], pool, [4], [valid], layout)
    assert seals_of(digests)[0] == seal(window, 2, valid, layout)
    assert digests.shape == (1, 1)
    for offset in range(layout.page_bytes):
        source = window[2] if is_valid_byte(layout, offset, valid) else before[4]
        assert pool[4, offset] == source[offset]
    assert torch.equal(pool[:4], before[:4])


@pytest.mark.parametrize(("page", "valid"), [(-1, 1), (3, 1), (0, 0), (0, 5)])
def test_pages_and_token_counts_out_of_range_are_refused(page: int, valid: int) -> None:
    layout = LAYOUTS[1]
    with pytest.raises(ValueError):
        digest_pages(random_pool(layout), [page], [valid], layout)


def test_seals_are_little_endian() -> None:
    assert seal_from_int(1) == b"\x01" + b"\0" * 7
    assert seal_to_int(seal_from_int(-1)) == 2**64 - 1


def test_a_head_that_is_no_whole_number_of_words_is_refused() -> None:
    with pytest.raises(ValueError):
        PageLayout(layers=1, page_size=4, kv_heads=1, head_dim=1, itemsize=2)


def test_the_fingerprint_changes_with_every_fact() -> None:
    prints = {compatibility_fingerprint("m", "bfloat16", layout) for layout in LAYOUTS}
    prints.add(compatibility_fingerprint("n", "bfloat16", LAYOUTS[0]))
    prints.add(compatibility_fingerprint("m", "float16", LAYOUTS[0]))
    assert len(prints) == len(LAYOUTS) + 2


def test_the_fingerprint_leaves_the_page_size_out() -> None:
    smaller = replace(LAYOUTS[1], page_size=2)
    assert compatibility_fingerprint("m", "bfloat16", smaller) == compatibility_fingerprint(
        "m", "bfloat16", LAYOUTS[1]
    )


def test_what_differs_between_two_fingerprints_is_named() -> None:
    ours = compatibility_fingerprint("m", "torch.float32", replace(LAYOUTS[1], itemsize=4))
    theirs = compatibility_fingerprint("m", "torch.bfloat16", LAYOUTS[1])
    assert difference(ours, theirs) == "dtype is float32, not bfloat16; element_bytes is 4, not 2"
    assert difference(ours, "f00d") == f"{ours} and f00d"


@pytest.mark.gpu
def test_both_devices_agree_on_every_seal() -> None:
    layout = PageLayout(layers=4, page_size=64, kv_heads=8, head_dim=128, itemsize=2)
    pool = random_pool(layout, pages=40)
    pages, valid = list(range(40)), [64] * 38 + [1, 63]
    on_gpu = pool.cuda()
    expected = seals_of(digest_pages(pool, pages, valid, layout))
    assert seals_of(digest_pages(on_gpu, pages, valid, layout)) == expected
    target = torch.zeros_like(on_gpu)
    torch.cuda.synchronize()
    digests = copy_and_digest(on_gpu, pages, target, pages[::-1], valid, layout)
    assert seals_of(digests) == expected
    for page, count in zip(pages, valid, strict=True):
        copied = target[39 - page].view(layout.rows, -1)[:, : count * layout.token_bytes]
        rest = target[39 - page].view(layout.rows, -1)[:, count * layout.token_bytes :]
        wanted = pool[page].view(layout.rows, -1)[:, : count * layout.token_bytes]
        assert torch.equal(copied.cpu(), wanted)
        assert not rest.any()
    from_host = copy_and_digest(pool, pages, target, pages, valid, layout)
    assert seals_of(from_host) == expected
