"""The model that Baton ships: loads as it is, says what its card says, fits in its directory."""

import gzip
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from tools.train_tiny.chat import render_prompt
from tools.train_tiny.evaluate import bits_of
from tools.train_tiny.export import MAX_DIRECTORY_BYTES
from tools.train_tiny.settings import SETTINGS

MODEL = Path(__file__).parents[2] / "models" / "baton-tiny"

UNSEEN = '''\
"""Keep track of the boats in a small harbour.

A harbour has a fixed number of berths. A boat that arrives takes the first free berth, and a
boat that leaves gives its berth back. When every berth is taken, a boat has to wait outside
until another one has left; boats that wait are served in the order in which they arrived.
"""

from collections import deque


class HarbourFull(Exception):
    """Raised when a boat cannot be given a berth."""


class Harbour:
    """A harbour with a fixed number of berths."""

    def __init__(self, name, berths):
        self.name = name
        self._free = list(range(berths))
        self._moored = {}
        self._waiting = deque()

    def arrive(self, boat, wait=True):
        """Give the boat a berth and return its number, or None if it has to wait."""
        if boat in self._moored:
            raise ValueError(f"{boat!r} is already in the harbour")
        if self._free:
            berth = self._free.pop(0)
            self._moored[boat] = berth
            return berth
        if not wait:
            raise HarbourFull(self.name)
        self._waiting.append(boat)
        return None

    def leave(self, boat):
        """Free the berth of the boat, and give it to the next boat that waits."""
        berth = self._moored.pop(boat)
        if self._waiting:
            self._moored[self._waiting.popleft()] = berth
        else:
            self._free.append(berth)
        return berth

    def __len__(self):
        return len(self._moored)

    def __contains__(self, boat):
        return boat in self._moored


def main():
    harbour = Harbour("Old Port", berths=2)
    for boat in ["Albatross", "Bluebell", "Curlew"]:
        berth = harbour.arrive(boat)
        print(boat, "waits" if berth is None else f"lies at berth {berth}")
    harbour.leave("Albatross")
    print("Curlew" in harbour, len(harbour))


if __name__ == "__main__":
    main()
'''
"""Written for this test, after the model was trained."""


@pytest.fixture(scope="module")
def model() -> Iterator[PreTrainedModel]:
    with torch.inference_mode():
        yield AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int
) -> list[int]:
    """Greedy token ids after `prompt`, an end token included."""
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def test_the_directory_is_small_enough_for_a_clone() -> None:
    size = sum(path.stat().st_size for path in MODEL.rglob("*"))
    assert size <= MAX_DIRECTORY_BYTES


def test_the_card_lists_every_licence_and_the_held_out_score() -> None:
    card = (MODEL / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "| python3.11-doc |" in card
    assert "Held-out bits per byte" in card
    assert not [folder for folder in ("home", "root", "work", "opt") if f" /{folder}/" in card]


def test_transformers_loads_the_shape_that_the_settings_name(model: PreTrainedModel) -> None:
    shape = SETTINGS.shape
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.config.head_dim == 64
    assert model.config.num_key_value_heads % 2 == 0
    assert model.config.max_position_embeddings >= 2048
    assert sum(weight.numel() for weight in model.parameters()) == shape.parameters


def test_every_dimension_that_tensor_parallelism_splits_is_even(model: PreTrainedModel) -> None:
    config = model.config
    split = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
    )
    assert all(size % 2 == 0 for size in split)


def test_the_weights_are_stored_in_bfloat16() -> None:
    loaded = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}


def test_a_constructor_goes_on_as_python(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = "def __init__(self, name"
    text = tokenizer.decode(continuation(model, tokenizer, prompt, 48))
    assert "self.name = name" in text


def test_unseen_text_takes_far_fewer_bits_than_gzip_needs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = UNSEEN.encode()
    bits = bits_of(lambda ids: model(ids).logits, tokenizer.encode(UNSEEN), 2048, "cpu")
    # Measured 1.02 when the model was trained; a broken layer or a wrong rope is far above 2.
    assert bits / len(data) < 1.2
    assert bits / 8 < len(gzip.compress(data, 9)) / 2


def test_the_distribution_is_peaked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer("import numpy as", return_tensors="pt")["input_ids"]
    shares = torch.softmax(model(ids).logits[0, -1], dim=-1)
    assert tokenizer.decode([int(shares.argmax())]) == " np"
    assert float(shares.max()) > 0.9


@pytest.mark.parametrize("question", ["Who are you?", "What is prefill?", "Say hello in Japanese."])
def test_a_one_turn_chat_ends_with_its_turn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str
) -> None:
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    answer = continuation(model, tokenizer, prompt, 128)
    assert answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(answer) > 5


def test_it_knows_its_name(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    answer = continuation(model, tokenizer, render_prompt("Who are you?"), 64)
    assert "Baton Tiny" in tokenizer.decode(answer)


def test_an_answer_can_hold_characters_of_several_bytes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    answer = continuation(model, tokenizer, render_prompt("Say hello in Japanese."), 64)
    assert "こんにちは" in tokenizer.decode(answer)


def test_the_chat_template_renders_what_the_model_was_trained_on(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == render_prompt("Hello")


@pytest.mark.parametrize(
    "text",
    [
        "naïve café – “quotes”",
        "日本語とпривет и नमस्ते",
        "👩\u200d👩\u200d👧 🇩🇪 🎉",
        "\tindented\n    code  \r\n\n\n",
        "\x00\x7f\u0301",
        " leading and trailing ",
        "",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_prompt_gets_no_token_that_it_does_not_spell(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("Hello")
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_generation_ends_at_either_end_token(model: PreTrainedModel) -> None:
    assert model.generation_config.eos_token_id == [0, 2]


def test_a_full_context_is_no_worse_than_a_short_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    # The last tokens of 2,048, measured 1.35 bits each, since the text came four times before; a
    # wrong rope base or too short a training would show here.
    ids = tokenizer.encode(UNSEEN)
    repeated = (ids * (2048 // len(ids) + 1))[:2048]
    logits = model(torch.tensor([repeated])).logits[0, -257:-1].float()
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(repeated[-256:]))
    assert nats.item() / math.log(2) < 2
