"""The model card, written from what the preparation, the training and the evaluation recorded."""

from __future__ import annotations

from typing import Any

from .settings import Shape

CARD_SAMPLES = 5

ROWS = {
    "baton-tiny": "model",
    "`xz -9e`, the files as one stream": "xz -9e",
    "`gzip -9`, likewise": "gzip -9",
}
"""Label in the card to key in `evaluation.json`."""

Facts = dict[str, Any]
"""A decoded JSON object that an earlier step wrote."""


def model_card(shape: Shape, *, manifest: Facts, progress: Facts, evaluation: Facts) -> str:
    """MODEL_CARD.md as text."""
    scores = evaluation["bits_per_byte"]
    training = progress["settings"]["training"]
    seconds = progress["trained_s"]
    tokens = progress["tokens"]
    groups = [group for group in ("all", "Python", "documentation") if group in scores]
    held_out = scores["all"]["bytes"]
    samples = evaluation["samples"]
    return f"""# baton-tiny

A Llama-architecture language model of {shape.parameters / 1e6:.1f} million weights, trained from
scratch by the Baton project so that a fresh clone can serve real text without a network.

## What it is, and what it is not

It is a toy with a real model's shape. It continues Python code as plausible Python and technical
English as plausible English, it closes its turn in a chat, and it knows a few exchanges by heart
(its name, what prefill and decode are, greetings, small JSON objects). Its distributions are peaked
as a trained model's are, which is what Baton's tests need of it.

It is not an assistant. It knows nothing: its answers to questions are imitations of documentation,
with names, numbers and claims made up. It cannot reason or follow instructions, it speaks hardly
any language but English, and its code is often wrong. Do not use what it writes. Nothing was done
to make its output safe beyond choosing technical text to train on. To serve a model that is of use,
pass your own Hugging Face directory to `baton up --model`.

The weights are under Baton's licence, Apache-2.0. The training text stays under its authors'; it is
listed below.

## Shape

| | |
| --- | --- |
| architecture | `LlamaForCausalLM`, tied embeddings, bfloat16 |
| layers, width, MLP | {shape.num_hidden_layers}, {shape.hidden_size}, {shape.intermediate_size} |
| heads | {shape.num_attention_heads} query, {shape.num_key_value_heads} KV, of {shape.head_dim} |
| context | {shape.max_position_embeddings:,} tokens |
| vocabulary | {shape.vocab_size:,} entries, byte-level BPE: any byte string round-trips |
| weights | {shape.parameters:,} |

## Held-out bits per byte

On {evaluation["files"]} files ({held_out:,} bytes) that were kept out of training, each with at
most a tenth of its long lines in the training text. They come from the same projects as the
training text, so the number says how well the model fits this kind of text, not text in general.

| bits a byte | {" | ".join(groups)} |
|{" --- |" * (1 + len(groups))}
{chr(10).join(_score(name, row, scores, groups) for name, row in ROWS.items())}

The model predicts each token from at least {shape.max_position_embeddings // 2:,} tokens before
it in the same file (fewer at a file's start). A compressor needs no 23 MB of weights, and the model
has seen {tokens / 1e9:.2f} billion tokens first: the comparison places the number, no more.

## Samples

The prompts of `tools/train_tiny/evaluate.py`, in its order, unedited and not chosen; the prompt
ends at `⟶`. At most {evaluation["sample_tokens"]} tokens; "greedy" takes the likeliest token,
"sampled" draws at temperature 0.7 with seed {evaluation["sample_seed"]}. Greedy text that has no
natural end soon runs in circles; sample it.

{chr(10).join(_sample(sample) for sample in samples[:CARD_SAMPLES])}
And more one-turn chats, made the same way; the first and the last show what it makes of a
question that it was not taught to answer:

{chr(10).join(_sample(sample) for sample in samples[CARD_SAMPLES:])}
## Chat

The template is ChatML: `<|im_start|>role`, the text, `<|im_end|>`. Generation ends at `<|im_end|>`
or `<|endoftext|>`. There is no default system prompt. It was trained on conversations of one to
three turns.

## Training

`tools/train_tiny/run.sh` makes this directory from nothing on one GPU. This copy saw
{tokens / 1e6:,.0f} million tokens ({tokens / manifest["tokens"]:.1f} passes over
{manifest["tokens"] / 1e6:.1f} million) in {progress["step"]:,} steps of
{training["batch_windows"]} x {shape.max_position_embeddings:,} tokens, {seconds:.0f} seconds on one
{progress["device"]}, {tokens / seconds / 1e6:.2f} million tokens a second. Muon
for the matrices of the layers, AdamW for the embedding and the norms; a constant rate, then a
linear fall to zero. Every number is in `tools/train_tiny/settings.py`.

## Training text

{manifest["plain_bytes"] / 1e6:.0f} MB of source code and documentation, and
{manifest["chat_bytes"] / 1e6:.0f} MB of conversations made by program: questions from templates,
answers from the docstrings, functions and manual sections of the same text, and some exchanges
written for this project (`tools/train_tiny/small_talk.py`). No downloaded data set and no other
model's weights or output was used. Licence headers, tables and copies were removed; one file in a
hundred was held out.

`python` is the standard library of CPython. The licence is the project's for the files that were
read; "stated" is what the package's own metadata (PyPI) or `debian/copyright` (Debian, its first
stanza) says, vendored and binary parts included, which were not read.

| source | version | from | licence | stated | MB |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(_source(entry) for entry in manifest["sources"])}
{"".join(f"{chr(10)}{note}{chr(10)}" for note in manifest.get("notes", []))}"""


def _score(label: str, row: str, scores: Facts, groups: list[str]) -> str:
    return f"| {label} | " + " | ".join(f"{scores[g][row]:.3f}" for g in groups) + " |"


def _sample(sample: Facts) -> str:
    fence = "````"
    manner = "sampled" if sample["temperature"] else "greedy"
    return f"{manner}:\n\n{fence}text\n{sample['prompt']}⟶{sample['text']}\n{fence}\n"


def _source(entry: Facts) -> str:
    places = {"stdlib": "CPython", "installed": "PyPI", "wheel": "PyPI", "debian": "Debian"}
    stated = str(entry["stated_licence"]).replace("|", "/")
    return (
        f"| {entry['name']} | {entry['version']} | {places[entry['kind']]} | {entry['licence']} "
        f"| {stated} | {entry['bytes'] / 1e6:.2f} |"
    )
