"""Tokenizers of every kind that grammars must get along with."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.engine.scheduler.stub import EOS, VOCAB

TINY = Path(__file__).resolve().parents[3] / "models" / "baton-tiny" / "tokenizer.json"
"""Byte-level, 8,192 tokens."""
TINY_VOCAB, TINY_EOS = 8192, (0, 2)

STUB_TEXTS = ["<eos>", *'{}[]":, abcdef0123456789-.x', "ab", '":', "true", "null", "1e", '{"', "bc",
              "],", "é", "dc", "a1", "z"]  # fmt: skip
"""Token id → text, for the scheduler's stub."""


def write_stub_tokenizer(directory: Path) -> Path:
    """Byte-level, as many tokens as the scheduler's stub draws from."""
    assert len(STUB_TEXTS) == VOCAB
    assert STUB_TEXTS[EOS] == "<eos>"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab = {"<eos>": EOS} | {
        "".join(_byte_name(byte) for byte in text.encode()): token
        for token, text in enumerate(STUB_TEXTS)
        if token != EOS
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    path = directory / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def _byte_name(byte: int) -> str:
    """GPT-2's printable name of a byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in plain:
        return chr(byte)
    others = [b for b in range(256) if b not in plain]
    return chr(256 + others.index(byte))


def write_sentencepiece_tokenizer(directory: Path) -> Path:
    """Unigram with blanks as `▁` and bytes as `<0x41>`, as Llama 2 and T5 have it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "the", "e", "t", "a", "▁a", "b", "c", "1", "2", "3", "▁1", "{", "}"]
    pieces += ['"', '":', "▁{", ",", "name", "▁name", "true", "é", "▁▁", "-", "x", "yz"]
    tokenizer = Tokenizer(
        models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0, True)
    )
    tokenizer.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    path = directory / "tokenizer.json"
    tokenizer.save(str(path))
    return path
