"""Edits of logits hang on prompt and output alone: wherever a request is cut, its tokens stay."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequestError
from engine.scheduler.schedule_batch import ScheduleBatch
from tests.engine.scheduler.drawn import SamplingRunner, logits_after, wanted
from tests.engine.scheduler.handover import FakeDecodeRole, FakePrefillRole, Pair
from tests.engine.scheduler.stub import EOS, VOCAB, Engine, make_req

tokens = st.integers(0, VOCAB - 1)
params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.0, 0.7, 1.5]),
        "min_p": st.sampled_from([0.0, 0.05, 0.4]),
        "seed": st.integers(0, 2**31),
        "repetition_penalty": st.sampled_from([1.0, 0.5, 1.3, 5.0]),
        "presence_penalty": st.sampled_from([0.0, -1.5, 2.0]),
        "frequency_penalty": st.sampled_from([0.0, -0.5, 0.7]),
        "logit_bias": st.dictionaries(tokens, st.sampled_from([-100.0, -3.0, 2.0]), max_size=5),
        "min_tokens": st.sampled_from([0, 0, 3, 9]),
        "stop_token_ids": st.frozensets(tokens, max_size=2),
        "ignore_eos": st.booleans(),
    }
)
prompts = st.lists(tokens, min_size=1, max_size=30)
EVERYTHING: dict[str, Any] = {
    "temperature": 0.8,
    "min_p": 0.02,
    "seed": 11,
    "repetition_penalty": 1.4,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.6,
    "logit_bias": {3: 2.0, 9: -100.0},
    "min_tokens": 10,
    "stop_token_ids": frozenset({5}),
}
PLAIN = wanted([2, 4, 6], rid="plain", max_new_tokens=14, ignore_eos=True)


def sampling_engine(**settings: Any) -> Engine:
    return Engine(runner=SamplingRunner, **settings)


@given(prompts, params)
@settings(max_examples=12, deadline=None)
def test_a_replay_at_any_token_goes_on_alike(prompt: list[int], given_params: Any) -> None:
    request = wanted(prompt, **given_params)
    expected = request.tokens()
    for cut in range(len(expected)):
        engine = sampling_engine()
        engine.add(request.req(expected[:cut]), PLAIN.req())
        engine.drain()
        assert engine.tokens("r") == expected[cut:]
        assert engine.tokens("plain") == PLAIN.tokens()


@given(prompts, params, st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_a_handover_at_any_token_goes_on_alike(
    prompt: list[int], given_params: Any, seed: int
) -> None:
    request = wanted(prompt, **given_params)
    expected = request.tokens()
    for cut in range(len(expected)):
        pair = Pair(
            sampling_engine(role=FakePrefillRole()),
            sampling_engine(role=FakeDecodeRole()),
            random.Random(seed),
        )
        for other in (request, PLAIN):
            prior = expected[:cut] if other is request else []
            pair.submit(other.req(prior), other.req(prior))
        while pair.busy():
            pair.step()
        for other, whole in ((request, expected[cut:]), (PLAIN, PLAIN.tokens())):
            ends = pair.prefill.tokens(other.rid), pair.decode.tokens(other.rid)
            assert len(ends[0]) == 1
            assert ends[0] + ends[1] == whole


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_retraction_at_any_token_goes_on_alike(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**EVERYTHING, "temperature": temperature, "max_new_tokens": 14, "ignore_eos": True}
    first = wanted([1, 2, 3, 4, 5], rid="a", **asked)
    second = wanted([7] * 9, rid="b", **{**asked, "seed": 4})
    enough = ScheduleBatch.check_decode_mem
    short: list[bool] = []
    monkeypatch.setattr(
        ScheduleBatch,
        "check_decode_mem",
        lambda batch, **more: False if short and short.pop() else enough(batch, **more),
    )
    for first_shortage in range(1, 14):
        engine = sampling_engine(radix=first_shortage % 2 == 0)
        longest = second.req()  # goes first
        engine.add(first.req(), longest, PLAIN.req())
        for passes in range(60):
            short[:] = [first_shortage <= passes < first_shortage + 3]
            engine.step()
        assert longest.retraction_count
        for request in (first, second, PLAIN):
            assert engine.tokens(request.rid) == request.tokens()


@given(
    st.lists(st.tuples(prompts, params, st.integers(0, 12)), min_size=2, max_size=7),
    st.sampled_from([None, 16]),
    st.booleans(),
    st.sampled_from([16, 64]),
)
@settings(max_examples=50, deadline=None)
def test_members_of_a_batch_do_not_disturb_each_other(
    traffic: list[tuple[list[int], Any, int]], chunk: int | None, mixed: bool, pages: int
) -> None:
    engine = sampling_engine(
        pages=pages, chunked_prefill_size=chunk, mixed=mixed, conservativeness=0.02
    )
    requests = [
        wanted(prompt, rid=f"r{i}", **given_params)
        for i, (prompt, given_params, _) in enumerate(traffic)
    ]
    passes = 0
    while passes <= 12 or engine.scheduler.has_work():
        for request, (_, _, arrival) in zip(requests, traffic, strict=True):
            if arrival == passes:
                engine.add(request.req())
        engine.step()
        passes += 1
        assert passes < 2000
    for request in requests:
        assert engine.tokens(request.rid) == request.tokens()


def test_a_batch_without_edits_holds_none() -> None:
    engine = sampling_engine()
    batch = engine.scheduler._batch_of([PLAIN.req()])
    assert edits_of(batch) is None
    changed = {"repetition_penalty": 1.1}, {"logit_bias": {1: 1.0}}, {"min_tokens": 1}
    for params_ in changed:
        batch = engine.scheduler._batch_of([PLAIN.req(), wanted([1], **params_).req()])
        edits = edits_of(batch)
        assert edits is not None
        # Counts exist for the row that asked, and for no other.
        assert edits.penalties is None or edits.penalties.in_prompt.shape == (1, VOCAB)
        batch.output_ids = torch.zeros(2, dtype=torch.int64)
        batch.filter_batch(keep_indices=[0])
        assert batch.to_forward_batch().sampling.edits is None


def test_min_tokens_cost_nothing_once_they_are_there() -> None:
    engine = sampling_engine()
    seen: list[bool] = []
    draw = engine.runner.draw
    engine.runner.draw = lambda batch, histories: (  # type: ignore[method-assign]
        seen.append(batch.sampling.edits is not None) or draw(batch, histories)  # type: ignore[func-returns-value]
    )
    engine.add(wanted([1], min_tokens=4, max_new_tokens=9, ignore_eos=True).req(), PLAIN.req())
    engine.drain()
    assert seen[:9] == [True] * 4 + [False] * 5


def edits_of(batch: ScheduleBatch) -> Any:
    for req in batch.reqs:
        req.init_next_round_input(batch.tree_cache)
    batch.prepare_for_extend()
    return batch.to_forward_batch().sampling.edits


def test_extreme_penalties_draw_tokens_all_the_same() -> None:
    for extreme, less in ((1e-300, 1e-20), (1e300, 1e20)):
        for temperature in (0.0, 1.0):
            asked = {"temperature": temperature, "ignore_eos": True}
            engine = sampling_engine()
            engine.add(wanted([1, 2, 3], repetition_penalty=extreme, **asked).req())
            engine.drain()
            expected = wanted([1, 2, 3], repetition_penalty=less, **asked).tokens()
            assert engine.tokens("r") == expected


def test_no_end_is_drawn_before_min_tokens() -> None:
    asked = {"max_new_tokens": 20, "logit_bias": {EOS: 50.0, 7: 49.0}}
    for least in (0, 1, 5):
        request = wanted([1, 2], min_tokens=least, stop_token_ids=frozenset({7}), **asked)
        engine = sampling_engine()
        engine.add(request.req())
        engine.drain()
        drawn = engine.tokens("r")
        assert len(drawn) == least + 1
        assert drawn[-1] == EOS
        assert not {EOS, 7} & set(drawn[:-1])


def expected_prompt_logprobs(prompt: list[int], count: int) -> list[Any]:
    expected: list[Any] = [(prompt[0], None, ())]
    for end in range(1, len(prompt)):
        logprobs = torch.log_softmax(logits_after(prompt[:end]), -1)
        top = logprobs.topk(count)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        expected.append((prompt[end], float(logprobs[prompt[end]]), tuple(pairs)))
    return expected


def assert_same_logprobs(got: Any, expected: list[Any]) -> None:
    assert got is not None
    assert [token.token for token in got] == [token for token, _, _ in expected]
    for token, (_, logprob, top) in zip(got, expected, strict=True):
        assert token.logprob == pytest.approx(logprob, abs=1e-5)
        assert [i for i, _ in token.top] == [i for i, _ in top]
        assert [v for _, v in token.top] == pytest.approx([v for _, v in top], abs=1e-5)


@given(prompts, st.sampled_from([None, 16]), st.integers(0, 20), st.booleans())
@settings(max_examples=60, deadline=None)
def test_prompt_logprobs_are_whole_in_any_chunks_and_after_a_cached_prefix(
    prompt: list[int], chunk: int | None, count: int, decodes: bool
) -> None:
    role = None if decodes else FakePrefillRole()
    engine = sampling_engine(chunked_prefill_size=chunk, page_size=4, role=role)
    asked = {"prompt_logprobs": count, "max_new_tokens": 3, "ignore_eos": True}
    others = wanted([9] * 20, rid="x", prompt_logprobs=3, max_new_tokens=1)
    engine.add(wanted(prompt, rid="a", **asked).req(), others.req())
    engine.add(wanted(prompt, rid="b", **asked).req())
    for _ in range(20):
        engine.step()
    for rid in ("a", "b"):
        first, *rest = engine.outputs[rid]
        assert_same_logprobs(first.prompt, expected_prompt_logprobs(prompt, count))
        assert all(output.prompt is None for output in rest)
        assert first.token == wanted(prompt, **asked).tokens()[0]
    assert_same_logprobs(engine.outputs["x"][0].prompt, expected_prompt_logprobs([9] * 20, 3))


def test_a_prompt_that_is_judged_matches_nothing_and_is_cached_for_others() -> None:
    engine = sampling_engine(page_size=4)
    prompt = list(range(1, 20))
    cached = []
    for rid, count in (("a", 2), ("b", 2), ("c", None)):
        req = wanted(prompt, rid=rid, prompt_logprobs=count).req()
        engine.add(req)
        engine.drain()
        cached.append(req.cached_tokens)
    assert cached == [0, 0, 16]
    # KV that comes by transfer needs no computing, so the decode side may use what it has.
    assert len(engine.scheduler.lock_prefix(wanted(prompt, prompt_logprobs=2).req())) == 4


def test_a_replay_with_tokens_does_not_judge_the_prompt_again() -> None:
    engine = sampling_engine()
    request = wanted([1, 2, 3], prompt_logprobs=1, ignore_eos=True)
    engine.add(request.req(request.tokens()[:2]))
    engine.drain()
    assert engine.tokens("r") == request.tokens()[2:]
    assert all(output.prompt is None for output in engine.outputs["r"])


def test_alternatives_go_to_those_who_ask_as_many_as_they_ask() -> None:
    engine = sampling_engine()
    prompt = [1, 2, 3]
    for rid, count in (("none", 0), ("two", 2), ("all", 20)):
        engine.add(wanted(prompt, rid=rid, top_logprobs=count, ignore_eos=True).req())
    engine.drain()
    for rid, count in (("none", 0), ("two", 2), ("all", 20)):
        assert all(len(output.top) == count for output in engine.outputs[rid])
        assert all((output.logprob is not None) == (count > 0) for output in engine.outputs[rid])
    history = list(prompt)
    for output in engine.outputs["all"]:
        logprobs = torch.log_softmax(logits_after(history), -1)
        assert [i for i, _ in output.top] == logprobs.topk(20).indices.tolist()
        assert output.logprob == pytest.approx(float(logprobs[output.token]), abs=1e-5)
        history.append(output.token)


@pytest.mark.parametrize(
    "bad",
    [
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": float("inf")},
        {"repetition_penalty": float("nan")},
        {"presence_penalty": 2.1},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": -2.1},
        {"frequency_penalty": float("inf")},
        {"logit_bias": {1: 100.5}},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": dict.fromkeys(range(1025), 1.0)},
        {"min_tokens": 13},
        {"min_tokens": -1},
        {"top_logprobs": 21},
        {"top_logprobs": -1},
        {"prompt_logprobs": 21},
        {"prompt_logprobs": -1},
    ],
)
def test_bad_values_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(bad))):
        wanted([1], **bad)


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    engine = sampling_engine()
    for bad in ({"logit_bias": {VOCAB: 1.0}}, {"stop_token_ids": frozenset({VOCAB})}):
        with pytest.raises(InvalidRequestError, match=f"token id {VOCAB}"):
            engine.add(wanted([1], **bad).req())
    every = frozenset(range(VOCAB))
    with pytest.raises(InvalidRequestError, match="every token ends"):
        engine.add(wanted([1], stop_token_ids=every, min_tokens=1).req())


def test_name_spaces_share_no_prefix() -> None:
    engine = sampling_engine(page_size=4)
    prompt = list(range(1, 20))
    cached = []
    for salt in ("", "a", "b", "a", ""):
        req = make_req(f"r{len(cached)}", prompt)
        req.extra_key = salt
        engine.add(req)
        engine.drain()
        cached.append(req.cached_tokens)
    assert cached == [0, 0, 0, 16, 16]


def test_wanted_is_what_the_engine_draws() -> None:
    """The reference has all edits, or the tests above prove little."""
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("temperature", 1.0, {"ignore_eos": True}),
        ("seed", 5, {"ignore_eos": True, "temperature": 1.0}),
        ("min_p", 0.4, {"ignore_eos": True, "temperature": 1.0}),
        ("repetition_penalty", 1.4, {"ignore_eos": True}),
        ("presence_penalty", 2.0, {"ignore_eos": True}),
        ("frequency_penalty", -2.0, {"ignore_eos": True}),
        ("logit_bias", {3: 6.0}, {"ignore_eos": True}),
        ("min_tokens", 12, {}),
        ("stop_token_ids", frozenset(range(1, VOCAB)), {}),
    ]
    for name, value, more in cases:
        changed = wanted([1, 2, 3], **{name: value}, **more)
        assert changed.tokens() != wanted([1, 2, 3], **more).tokens(), name
