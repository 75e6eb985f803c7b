"""Text as tokens come: the same as decoding all at once, never half a character."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from router.token_bytes import token_name
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


def metaspace() -> Tokenizer:
    """As sentencepiece's: ids 0-255 are bytes, then pieces with and without a leading space."""
    vocab = {f"<0x{i:02X}>": i for i in range(256)}
    for piece in ("▁", "▁hi", "hi", "▁▁", "é", "▁你", ",", "<unk>"):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def wordpiece() -> Tokenizer:
    words = ["[UNK]", "the", "##ing", "run", ".", "n't", "##s", "'", "你", "!"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.add_special_tokens(["[CLS]"])
    return tokenizer


def llama() -> Tokenizer:
    tokenizer = byte_fallback()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


KINDS = {
    "byte level": byte_level_bpe(),
    "metaspace": metaspace(),
    "llama": llama(),
    "word piece": wordpiece(),
}


@st.composite
def whole_tokens(draw: st.DrawFn) -> tuple[str, list[int]]:
    """A kind of tokenizer and any of its tokens, where bytes come as whole characters.

    A byte-fallback decoder shows a whole run of bytes as U+FFFD for one bad byte at its end, which
    nobody can know while the run goes on.
    """
    kind = draw(st.sampled_from(sorted(KINDS)))
    tokenizer = KINDS[kind]
    if kind == "byte level":
        return kind, draw(st.lists(st.integers(0, 258), max_size=40))
    size = tokenizer.get_vocab_size()
    single = st.integers(256 if size > 256 else 0, size - 1).map(lambda i: [i])
    spelled = st.sampled_from("aé你😀\n ").map(lambda c: list(c.encode()))
    parts = draw(st.lists(single | spelled if size > 256 else single, max_size=20))
    return kind, [token_id for part in parts for token_id in part]


@given(whole_tokens(), st.booleans())
@settings(max_examples=400)
def test_every_kind_of_tokenizer_gives_what_decoding_at_once_gives(
    case: tuple[str, list[int]], skip: bool
) -> None:
    kind, ids = case
    detokenizer = TextCodec(KINDS[kind]).detokenizer(skip_special_tokens=skip)
    parts = [*(detokenizer.push(i) for i in ids), detokenizer.flush()]
    assert "".join(parts) == KINDS[kind].decode(ids, skip_special_tokens=skip)


@given(whole_tokens(), st.data())
@settings(max_examples=300)
def test_an_output_continues_its_prompt(case: tuple[str, list[int]], data: st.DataObject) -> None:
    kind, ids = case
    tokenizer = KINDS[kind]
    cut = data.draw(st.integers(0, len(ids)))
    prompt = tokenizer.decode(ids[:cut])
    whole = tokenizer.decode(ids)
    if "\ufffd" in whole + prompt:
        return  # cut inside a character
    detokenizer = TextCodec(tokenizer).detokenizer(prompt_ids=ids[:cut])
    parts = [*(detokenizer.push(i) for i in ids[cut:]), detokenizer.flush()]
    assert prompt + "".join(parts) == whole


def test_a_leading_space_is_kept_after_a_prompt_and_dropped_without_one() -> None:
    for tokenizer in (metaspace(), llama()):
        codec, hi = TextCodec(tokenizer), tokenizer.token_to_id("▁hi")
        assert codec.detokenizer().push(hi) == "hi"
        assert codec.detokenizer(prompt_ids=[hi]).push(hi) == " hi"


def test_special_tokens_are_text_where_asked_for() -> None:
    shown = CODEC.detokenizer(skip_special_tokens=False)
    assert [shown.push(i) for i in [*TOKENIZER.encode("a").ids, SPECIAL]] == ["a", "<eos>"]


def test_ids_that_the_tokenizer_does_not_know_have_no_text() -> None:
    detokenizer = CODEC.detokenizer()
    one, two, three = TOKENIZER.encode("你").ids
    assert "".join(detokenizer.push(i) for i in [one, 9999, 9999, two, 9999, three]) == "你"


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_make_the_text(kind: str) -> None:
    tokenizer = KINDS[kind]
    codec = TextCodec(tokenizer)
    text = {"word piece": "the runing"}.get(kind, "hi你 é")
    ids = {
        "byte level": TOKENIZER.encode(text).ids,
        "word piece": [1, 3, 2],
    }.get(kind) or [256, *"你".encode(), *b" ", *"é".encode()]
    if kind == "metaspace":
        ids[0] = tokenizer.token_to_id("hi")
    if kind == "word piece":
        text = " the runing"
    if kind == "llama":
        text = " " + text
    assert b"".join(codec.token_bytes(i) for i in ids).decode() == text


def test_many_ids_of_one_character_are_told_apart_by_their_bytes() -> None:
    ids = TOKENIZER.encode("😀你").ids
    assert len({token_name(CODEC.token_bytes(i)) for i in ids}) == len(set(ids))
    assert token_name(CODEC.token_bytes(ids[0])) == "bytes:\\xf0"
