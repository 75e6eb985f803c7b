"""Small batches gain nothing from threads, and several test processes share the cores."""

from collections.abc import Iterator

import pytest
import torch

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.llguidance_backend import LlguidanceBackend
from tests.engine.grammar.tokenizers import write_stub_tokenizer
from tests.engine.scheduler.stub import EOS, VOCAB


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrammarCompiler]:
    path = write_stub_tokenizer(tmp_path_factory.mktemp("stub"))
    backend = LlguidanceBackend(path, vocab_size=VOCAB, eos_token_ids=[EOS], checkers=1)
    made = GrammarCompiler(backend, timeout_s=20.0, threads=1)
    yield made
    made.close()
