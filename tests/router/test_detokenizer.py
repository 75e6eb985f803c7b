"""Text as tokens come: the same as decoding all at once, never half a character."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from router.tokenizer import TextCodec
from tests.router.conftest import byte_level_bpe

TOKENIZER = byte_level_bpe()
CODEC = TextCodec(TOKENIZER)
SPECIAL = TOKENIZER.token_to_id("<eos>")


def byte_fallback() -> Tokenizer:
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"▁hi": 256, "▁": 257, "<unk>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return tokenizer


def pieces(codec: TextCodec, ids: list[int]) -> list[str]:
    detokenizer = codec.detokenizer()
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@given(st.text())
def test_any_text_comes_back_whole_and_never_half_a_character(text: str) -> None:
    parts = pieces(CODEC, TOKENIZER.encode(text).ids)
    assert "".join(parts) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@given(st.lists(st.integers(0, 258), max_size=80))
@settings(max_examples=300)
def test_any_tokens_at_all_give_what_decoding_them_at_once_gives(ids: list[int]) -> None:
    assert "".join(pieces(CODEC, ids)) == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.text(st.characters(min_codepoint=0x20, exclude_categories=["Cs"]), max_size=30))
def test_byte_fallback_tokens_make_whole_characters(text: str) -> None:
    tokenizer = byte_fallback()
    ids = [256]
    for character in text:
        ids += [257] if character == " " else list(character.encode())
    parts = pieces(TextCodec(tokenizer), ids)
    assert "".join(parts) == tokenizer.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


def test_a_character_over_four_tokens_appears_with_its_last() -> None:
    parts = pieces(CODEC, TOKENIZER.encode("a😀b").ids)
    assert parts == ["a", "", "", "", "😀", "b", ""]


def test_special_tokens_have_no_text_even_inside_a_character() -> None:
    one, two, three = TOKENIZER.encode("你").ids
    assert "".join(pieces(CODEC, [one, SPECIAL, two, three, SPECIAL])) == "你"


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    ids = TOKENIZER.encode("ok😀").ids[:-1]
    assert pieces(CODEC, ids)[-1] == "\ufffd"


@pytest.mark.parametrize("kind", ["plain", "invalid", "many bytes"])
def test_the_cost_is_linear_in_the_length(kind: str) -> None:
    text = {"plain": "the ", "many bytes": "😀"}.get(kind, "")
    unit = TOKENIZER.encode(text).ids or [TOKENIZER.encode("你").ids[0]]

    def cost_s(tokens: int) -> float:
        ids = (unit * tokens)[:tokens]
        best = 1e9
        for _ in range(3):
            started = time.perf_counter()
            pieces(CODEC, ids)
            best = min(best, time.perf_counter() - started)
        return best

    assert cost_s(8000) < 12 * cost_s(2000)


async def test_truncation_and_padding_of_a_training_run_are_off(tmp_path: object) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    assert len(await TextCodec(tokenizer).encode("abcdefgh")) == 8
    assert len(await TextCodec(tokenizer).encode("abcdefgh" * 1000)) == 8000
