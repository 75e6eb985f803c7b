"""Requests with a grammar: masked at every draw, wherever it happens."""

import random
import time
from typing import Any

import pytest
import torch

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.spec import Grammar, GrammarKind
from engine.scheduler.req import FinishReason
from engine.scheduler.schedule_batch import ScheduleBatch
from tests.engine.grammar.tokenizers import STUB_TEXTS
from tests.engine.scheduler.drawn import logits_after, wanted
from tests.engine.scheduler.grammar_engine import PLAIN, REQUESTS, TEXTS, GrammarEngine, listed
from tests.engine.scheduler.handover import FakeDecodeRole, FakePrefillRole, Pair
from tests.engine.scheduler.stub import EOS


def test_the_oracle_sees_every_kind_of_end() -> None:
    outputs = [request.tokens() for request in REQUESTS]
    texts = ["".join(STUB_TEXTS[t] for t in tokens if t != EOS) for tokens in outputs]
    assert sum(text in TEXTS for text in texts) >= 4
    assert len(set(texts)) >= 4
    assert any(tokens[-1] == EOS for tokens in outputs)
    pairs = list(zip(outputs, texts, strict=True))
    assert any(tokens[-1] != EOS and text in TEXTS for tokens, text in pairs)


@pytest.mark.parametrize(
    "settings",
    [{}, {"overlap": True}, {"mixed": True}, {"split": 2}, {"split": 2, "overlap": True}],
    ids=str,
)
def test_every_token_is_one_that_the_grammar_allows(
    compiler: GrammarCompiler, settings: dict[str, Any]
) -> None:
    for request in REQUESTS:
        # A late device cannot count penalised tokens (`AsyncRunner`).
        late = not request.params.has_penalties
        engine = GrammarEngine(compiler, chunked_prefill_size=16, late=late, **settings)
        engine.add(request.req(), PLAIN.req())
        engine.finish()
        assert not engine.errors
        assert engine.tokens("r") == request.tokens()
        assert engine.tokens("plain") == PLAIN.tokens()


@pytest.mark.parametrize("overlap", [False, True])
def test_members_of_a_batch_keep_their_own_grammars(
    compiler: GrammarCompiler, overlap: bool
) -> None:
    requests = [
        listed([i + 1] * (1 + i % 7), rid=f"r{i}", temperature=1.2, seed=i) for i in range(6)
    ]
    engine = GrammarEngine(compiler, overlap=overlap, rows=8, pages=64)
    engine.add(*(request.req() for request in requests), PLAIN.req())
    engine.finish()
    for request in [*requests, PLAIN]:
        assert engine.tokens(request.rid) == request.tokens()


def test_a_replay_at_any_token_goes_on_alike(compiler: GrammarCompiler) -> None:
    for request in REQUESTS:
        expected = request.tokens()
        for cut in range(len(expected)):
            engine = GrammarEngine(compiler)
            engine.add(request.req(expected[:cut]))
            engine.finish()
            assert engine.tokens("r") == expected[cut:]


def test_a_handover_at_any_token_goes_on_alike(compiler: GrammarCompiler) -> None:
    for request in REQUESTS:
        expected = request.tokens()
        for cut in range(len(expected)):
            pair = Pair(
                GrammarEngine(compiler, role=FakePrefillRole()),
                GrammarEngine(compiler, role=FakeDecodeRole()),
                random.Random(cut),
            )
            prior = expected[:cut]
            pair.submit(request.req(prior), request.req(prior))
            end = time.monotonic() + 30
            while (
                pair.busy()
                or pair.prefill.scheduler._lifecycle.live
                or (pair.decode.scheduler._lifecycle.live)
            ):
                assert time.monotonic() < end
                pair.step()
            assert pair.prefill.tokens("r") + pair.decode.tokens("r") == expected[cut:]
            assert len(pair.prefill.tokens("r")) == 1


def test_a_retraction_at_any_token_goes_on_alike(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = listed([7] * 9, rid="b", temperature=1.1, seed=2, ignore_eos=True)
    other = listed([1, 2], rid="a", temperature=1.1, seed=5)
    enough = ScheduleBatch.check_decode_mem
    short: list[bool] = []
    monkeypatch.setattr(
        ScheduleBatch,
        "check_decode_mem",
        lambda batch, **more: False if short and short.pop() else enough(batch, **more),
    )
    retracted = 0
    for shortage in range(1, len(request.tokens()) + 1):
        engine = GrammarEngine(compiler, radix=shortage % 2 == 0)
        victim = request.req()
        for req in (victim, other.req(), PLAIN.req()):
            engine.add(req)
        while engine.scheduler.grammar_queue:
            engine.step()
        for passes in range(60):
            short[:] = [passes == shortage]
            engine.step()
        short.clear()
        engine.finish()
        retracted += victim.retraction_count
        for wanted_request in (request, other, PLAIN):
            assert engine.tokens(wanted_request.rid) == wanted_request.tokens()
    assert retracted


def test_logprobs_stay_those_of_the_models_own_distribution(compiler: GrammarCompiler) -> None:
    request = listed([5, 5], temperature=0.9, seed=4, top_logprobs=3)
    engine = GrammarEngine(compiler)
    engine.add(request.req())
    engine.finish()
    tokens = list(request.prompt)
    for output in engine.outputs["r"]:
        own = torch.log_softmax(logits_after(tokens), dim=-1)
        assert output.logprob == pytest.approx(own[output.token].item(), abs=1e-5)
        assert output.top[0][1] == pytest.approx(own.max().item(), abs=1e-5)
        tokens.append(output.token)


B = frozenset({STUB_TEXTS.index("b")})


@pytest.mark.parametrize(
    ("pattern", "params", "reason", "last"),
    [
        ("ab", {}, FinishReason.STOP, None),
        ("ab", {"ignore_eos": True}, FinishReason.STOP, None),
        ("ab", {"min_tokens": 9}, FinishReason.STOP, None),
        ("(ab)+", {"logit_bias": {EOS: 100.0}}, FinishReason.STOP, EOS),
        ("(ab)+", {"ignore_eos": True}, FinishReason.LENGTH, None),
        ("(ab)+", {"min_tokens": 12, "logit_bias": {EOS: 100.0}}, FinishReason.LENGTH, None),
        ("ab*", {"logit_bias": {10: 100.0}, "stop_token_ids": B}, FinishReason.STOP, 10),
        ("(a|b){30}", {}, FinishReason.LENGTH, None),
    ],
)  # fmt: skip
def test_how_an_output_ends(
    compiler: GrammarCompiler,
    pattern: str,
    params: dict[str, Any],
    reason: FinishReason,
    last: int | None,
) -> None:
    engine = GrammarEngine(compiler)
    grammar = Grammar(GrammarKind.REGEX, pattern)
    request = wanted([3, 1], grammar=grammar, **{"max_new_tokens": 12, **params})
    engine.add(request.req())
    engine.finish()
    output = engine.outputs["r"][-1]
    assert output.finish_reason is reason
    assert output.stop_token == last
