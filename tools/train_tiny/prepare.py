"""Build the corpus: collect, remove copies, hold files out, add chat, train the tokenizer, encode.

Writes into `<work>/corpus/`: `train.bin` (uint16 token ids, little-endian), `starts.npy` (int64
place of each document's first token), `tokenizer.json`, `held_out.jsonl` (a text a line) and
`manifest.json` (every source with version, licence and bytes).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .chat import conversations
from .collect import Document, Found, collect, stable_hash
from .settings import DEFAULT_WORK, END_OF_TEXT, SETTINGS, SPECIAL_TOKENS, Corpus
from .small_talk import Exchange
from .small_talk import exchanges as small_talk
from .sources import SOURCES
from .texts import long_line_hashes

SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where a token may not cross: digits stand alone, an indentation is one piece."""

SMALL_TALK_EXCHANGES = 36_000
"""About one part in fifty of the training text: enough to know its name by heart."""


def split_and_deduplicate(
    found: list[Found], settings: Corpus
) -> tuple[list[Document], list[Document]]:
    """`(training, held out)` documents. A file is held out by the hash of its path; it
    stays so only if hardly any of its long lines occur in the training text."""
    seen: set[int] = set()
    training: list[Document] = []
    candidates: list[Document] = []
    for document in (d for f in found for d in f.documents):
        if stable_hash(f"held out {document.path}") % settings.held_out_of == 0:
            candidates.append(document)
            continue
        lines = long_line_hashes(document.text, settings.duplicate_line_chars)
        if _copied_share(lines, seen) <= settings.duplicate_share:
            training.append(document)
            seen.update(digest for digest, _ in lines)
    held_out = []
    for document in candidates:
        lines = long_line_hashes(document.text, settings.duplicate_line_chars)
        if lines and _copied_share(lines, seen) <= settings.held_out_duplicate_share:
            held_out.append(document)
    return training, held_out


def _copied_share(lines: list[tuple[int, int]], seen: set[int]) -> float:
    total = sum(chars for _, chars in lines)
    return sum(chars for digest, chars in lines if digest in seen) / total if total else 0.0


def chat_texts(training: list[Document], settings: Corpus, rng: random.Random) -> list[str]:
    """Conversations from the training documents and small talk, within `chat_share`."""
    exchanges: list[Exchange] = [e for d in training for e in d.exchanges]
    rng.shuffle(exchanges)
    plain = sum(len(d.text) for d in training)
    allowed = int(plain * settings.chat_share / (1 - settings.chat_share))
    taken = list(small_talk(rng, SMALL_TALK_EXCHANGES))
    size = sum(len(q) + len(a) + 70 for q, a in taken)
    for exchange in exchanges:
        size += len(exchange[0]) + len(exchange[1]) + 70
        if size > allowed:
            break
        taken.append(exchange)
    rng.shuffle(taken)
    return list(conversations(taken, rng))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE without normalisation: every byte string round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _shuffled(documents: list[str], rng: random.Random) -> Iterator[str]:
    """The documents in random order."""
    order = list(range(len(documents)))
    rng.shuffle(order)
    for place in order:
        yield documents[place]


def _sample(texts: list[str], size: int, rng: random.Random) -> Iterator[str]:
    for text in _shuffled(texts, rng):
        if size <= 0:
            return
        size -= len(text)
        yield text


def encode(
    tokenizer: Tokenizer, texts: list[str], rng: random.Random
) -> tuple[np.ndarray, np.ndarray]:
    """`(ids uint16 [tokens], starts int64 [documents])`; each document ends with END_OF_TEXT."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[np.ndarray] = []
    lengths: list[int] = []
    ordered = list(_shuffled(texts, rng))
    for place in range(0, len(ordered), 2000):
        for encoding in tokenizer.encode_batch_fast(ordered[place : place + 2000]):
            ids.append(np.array([*encoding.ids, end], dtype=np.uint16))
            lengths.append(len(ids[-1]))
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    return np.concatenate(ids), starts


def manifest(found: list[Found], training: list[Document]) -> list[dict[str, object]]:
    """One entry a source, with the bytes that stayed after copies were removed."""
    kept: dict[str, int] = {}
    for document in training:
        name = document.path.split("/")[0]
        kept[name] = kept.get(name, 0) + len(document.text.encode())
    return [
        {
            "name": f.source.name,
            "kind": f.source.kind,
            "version": f.version,
            "licence": f.source.licence,
            "stated_licence": f.stated_licence,
            "bytes": kept.get(f.source.name, 0),
        }
        for f in found
    ]


def main() -> None:
    """Run the whole preparation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    work: Path = parser.parse_args().work
    settings = SETTINGS.corpus
    out = work / "corpus"
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    one = partial(collect, work=work, cap_bytes=settings.code_cap_bytes)
    with multiprocessing.Pool(os.cpu_count()) as pool:
        found = [f for f in pool.imap(one, SOURCES, chunksize=1) if f is not None]
    say(f"{len(found)} of {len(SOURCES)} sources, {sum(len(f.documents) for f in found)} files")

    training, held_out = split_and_deduplicate(found, settings)
    rng = random.Random(settings.seed)
    plain = [d.text for d in training]
    chat = chat_texts(training, settings, rng)
    plain_bytes = sum(len(t.encode()) for t in plain)
    chat_bytes = sum(len(t.encode()) for t in chat)
    say(f"{plain_bytes / 1e6:.1f} MB in {len(plain)} files, {chat_bytes / 1e6:.1f} MB of chat in "
        f"{len(chat)} conversations, {len(held_out)} files held out")  # fmt: skip

    # Special tokens inside the chat text must not become merges.
    tokenizer = train_tokenizer(
        _sample(plain + chat, settings.tokenizer_sample_bytes, rng), SETTINGS.shape.vocab_size
    )
    say(f"tokenizer of {tokenizer.get_vocab_size()} entries")
    ids, starts = encode(tokenizer, plain + chat, rng)
    total = plain_bytes + chat_bytes
    say(f"{len(ids) / 1e6:.2f} M tokens, {total / len(ids):.2f} bytes a token")

    tokenizer.save(str(out / "tokenizer.json"))
    ids.astype("<u2").tofile(out / "train.bin")
    np.save(out / "starts.npy", starts)
    with (out / "held_out.jsonl").open("w", encoding="utf-8") as file:
        for document in held_out:
            file.write(json.dumps({"path": document.path, "text": document.text}) + "\n")
    facts = {
        "sources": manifest(found, training),
        "plain_bytes": plain_bytes,
        "chat_bytes": chat_bytes,
        "tokens": len(ids),
        "documents": len(starts),
        "held_out_files": len(held_out),
        "held_out_bytes": sum(len(d.text.encode()) for d in held_out),
    }
    (out / "manifest.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    say("done")


if __name__ == "__main__":
    main()
