"""Measure the held-out bits per byte, and write samples.

Bits per byte are comparable with a compressor's: the model's cross entropy over the held-out text,
divided by its bytes, beside what gzip and xz make of the same text as one stream.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from .chat import render_prompt
from .model import TinyLlama
from .settings import DEFAULT_WORK, END_OF_TEXT, MINIATURE, SETTINGS, SPECIAL_TOKENS, TURN_END

SAMPLE_TOKENS = 96
SAMPLE_SEED = 0


@dataclass(frozen=True)
class Sample:
    """A prompt that the model card shows a continuation of."""

    prompt: str

    temperature: float = 0.0
    """0 takes the likeliest token. Long greedy text of a small model runs in circles, so text that
    has no natural end is sampled."""


def _chat(question: str) -> Sample:
    return Sample(render_prompt(question))


SAMPLES = (
    Sample("def __init__(self, name"),
    Sample("import os\n\n\ndef read_lines(path):\n", 0.7),
    Sample('def save(self, path):\n    """', 0.7),
    Sample("The function returns a list of", 0.7),
    _chat("Who are you?"),
    _chat("What does os.path.join do?"),
    _chat("Write a function that adds two numbers."),
    _chat("Say hello in Japanese."),
    _chat("Tell me about cats."),
)

Logits = Callable[[Tensor], Tensor]
"""Token ids [1, length] to logits [1, length, vocabulary]."""


def bits_of(logits: Logits, ids: list[int], context: int, device: str) -> float:
    """Bits of all `ids`, each predicted from at least half a context of what precedes it.

    The first token is predicted after an end of text, which has token id 0."""
    stride = context // 2
    sequence = torch.tensor([0, *ids], device=device)
    bits = 0.0
    for begin in range(0, len(ids), stride):
        # Tokens begin..begin+stride are scored; the window reaches back over the stride before.
        back = max(0, begin - stride)
        window = sequence[back : min(begin + stride, len(ids)) + 1]
        scores = logits(window[None, :-1])[0].float()[begin - back :]
        nats = F.cross_entropy(scores, window[1:][begin - back :], reduction="sum")
        bits += nats.item() / math.log(2)
    return bits


def compressed_bits_per_byte(data: bytes) -> dict[str, float]:
    """Bits a byte of gzip -9 and of xz -9e on `data` as one stream."""
    xz = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    squeezed = {"gzip -9": gzip.compress(data, 9, mtime=0), "xz -9e": xz}
    return {name: 8 * len(out) / len(data) for name, out in squeezed.items()}


def held_out_scores(
    logits: Logits, tokenizer: Tokenizer, texts: dict[str, str], context: int, device: str
) -> dict[str, dict[str, float]]:
    """For Python files, for documentation and for both: bytes scored, bits per byte of the model
    and of the compressors. `texts` maps paths to texts."""
    end = SPECIAL_TOKENS.index(END_OF_TEXT)
    bits: dict[str, float] = {}
    data: dict[str, bytes] = {}
    for path, text in texts.items():
        scored = bits_of(logits, [*tokenizer.encode(text).ids, end], context, device)
        for group in ("all", "Python" if path.endswith(".py") else "documentation"):
            bits[group] = bits.get(group, 0.0) + scored
            data[group] = data.get(group, b"") + text.encode()
    return {
        group: {
            "bytes": len(data[group]),
            "model": bits[group] / len(data[group]),
            **compressed_bits_per_byte(data[group]),
        }
        for group in bits
    }


def continue_text(
    logits: Logits, tokenizer: Tokenizer, sample: Sample, context: int, device: str
) -> str:
    """The text that follows the sample's prompt, up to an end token."""
    ends = {SPECIAL_TOKENS.index(END_OF_TEXT), SPECIAL_TOKENS.index(TURN_END)}
    # Drawn on the CPU, whose generator gives the same numbers everywhere.
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    ids = tokenizer.encode(sample.prompt).ids
    start = len(ids)
    while len(ids) < min(start + SAMPLE_TOKENS, context):
        last = logits(torch.tensor([ids], device=device))[0, -1].float().cpu()
        if sample.temperature == 0:
            token = int(last.argmax())
        else:
            shares = torch.softmax(last / sample.temperature, dim=-1)
            token = int(torch.multinomial(shares, 1, generator=generator))
        if token in ends:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:])


def read_held_out(path: Path, most_bytes: int) -> dict[str, str]:
    """Held-out texts by path, until `most_bytes` are read."""
    texts: dict[str, str] = {}
    size = 0
    for line in path.open(encoding="utf-8"):
        entry = json.loads(line)
        texts[entry["path"]] = entry["text"]
        size += len(entry["text"].encode())
        if size >= most_bytes:
            break
    return texts


def main() -> None:
    """Score `<work>/run/model.safetensors`; write `evaluation.json` beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--miniature", action="store_true")
    parser.add_argument("--most-bytes", type=int, default=10**9, help="held-out bytes to score")
    args = parser.parse_args()
    shape = (MINIATURE if args.miniature else SETTINGS).shape
    context = shape.max_position_embeddings
    model = TinyLlama(shape).to(args.device)
    weights = load_file(args.work / "run" / "model.safetensors", device=args.device)
    # The weights as they ship: rounded to bfloat16, computed with in float32.
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    model.eval()
    tokenizer = Tokenizer.from_file(str(args.work / "corpus" / "tokenizer.json"))
    texts = read_held_out(args.work / "corpus" / "held_out.jsonl", args.most_bytes)
    samples = []
    with torch.inference_mode():
        for sample in SAMPLES:
            text = continue_text(model.logits, tokenizer, sample, context, args.device)
            samples.append({**asdict(sample), "text": text})
            print(f"--- {sample}\n{text}", flush=True)
        scores = held_out_scores(model.logits, tokenizer, texts, context, args.device)
    print(json.dumps(scores), flush=True)
    facts = {
        "files": len(texts),
        "bits_per_byte": scores,
        "samples": samples,
        "sample_seed": SAMPLE_SEED,
        "sample_tokens": SAMPLE_TOKENS,
    }
    (args.work / "run" / "evaluation.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
