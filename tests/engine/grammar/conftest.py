"""Backends over the tokenizers of this folder; a session shares them, as they start processes."""

from collections.abc import Iterator

import pytest

from engine.grammar.llguidance_backend import LlguidanceBackend
from tests.engine.grammar.tokenizers import (
    TINY,
    TINY_EOS,
    TINY_VOCAB,
    write_sentencepiece_tokenizer,
)


@pytest.fixture(scope="session")
def tiny() -> Iterator[LlguidanceBackend]:
    """Byte-level: the embedded model's."""
    backend = LlguidanceBackend(TINY, vocab_size=TINY_VOCAB, eos_token_ids=TINY_EOS, checkers=1)
    yield backend
    backend.close()


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlguidanceBackend]:
    """Unigram with byte fallback; the model's logits are wider than the vocabulary."""
    path = write_sentencepiece_tokenizer(tmp_path_factory.mktemp("unigram"))
    backend = LlguidanceBackend(path, vocab_size=320, eos_token_ids=(2,), checkers=1)
    yield backend
    backend.close()
