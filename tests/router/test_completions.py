"""POST /v1/completions in full: several prompts and choices, echo, log probabilities."""

from typing import Any

from protos.baton.v1 import inference_pb2
from tests.router.conftest import Cluster, byte_level_bpe
from tests.router.fakes import DECODE, EOS, PREFILL, Script, expected, until

TOKENIZER = byte_level_bpe()


async def test_several_prompts_and_choices_are_what_each_gives_alone(cluster: Cluster) -> None:
    await cluster.pair()
    body = (
        await cluster.complete(
            prompt=[[1, 2], [3]], n=2, best_of=2, max_tokens=4, seed=2, return_token_ids=True
        )
    ).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    wanted = [expected(p, 4, seed) for p in ([1, 2], [3]) for seed in (2, 3)]
    assert [choice["token_ids"] for choice in body["choices"]] == wanted
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 16
    assert [report["seed"] for report in body["baton"]["choices"]] == [2, 3, 2, 3]


async def test_texts_are_prompts_too(cluster: Cluster) -> None:
    await cluster.pair()
    body = (await cluster.complete(prompt=["a", "so"], max_tokens=3, seed=0)).json()
    for choice, prompt in zip(body["choices"], ("a", "so"), strict=True):
        alone = (await cluster.complete(prompt=prompt, max_tokens=3, seed=0)).json()
        assert choice["text"] == alone["choices"][0]["text"]


async def test_streamed_choices_end_each_with_its_own_report(cluster: Cluster) -> None:
    await cluster.pair()
    *chunks, done = await cluster.events(
        prompt=[1, 2, 3],
        n=3,
        max_tokens=5,
        seed=0,
        return_token_ids=True,
        stream_options={"include_usage": True},
    )
    assert done == "[DONE]"
    usage = chunks.pop()
    ids: dict[int, list[int]] = {0: [], 1: [], 2: []}
    ends = []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        ids[choice["index"]] += choice["token_ids"]
        if choice["finish_reason"]:
            ends.append((choice["index"], chunk["baton"]["seed"]))
    assert ids == {i: expected([1, 2, 3], 5, i) for i in range(3)}
    assert sorted(ends) == [(0, 0), (1, 1), (2, 2)]
    assert usage["usage"]["completion_tokens"] == 15
    assert len(usage["baton"]["choices"]) == 3


async def test_a_choice_that_fails_ends_all_and_frees_their_workers(cluster: Cluster) -> None:
    error = {"code": 4, "message": "full"}
    await cluster.pair(decode=Script(reserve_error=error))  # type: ignore[arg-type]
    answer = await cluster.complete(prompt=[[1], [2], [3]], max_tokens=4)
    assert answer.status_code == 429
    await until(lambda: cluster.router.live == 0)


async def test_choices_that_find_no_place_leave_none_behind(make_cluster: Any) -> None:
    cluster = await make_cluster(max_queued_requests=3)
    await cluster.pair()
    assert (await cluster.complete(n=4, max_tokens=2)).status_code == 429
    assert cluster.router.live == 0
    assert (await cluster.complete(n=3, max_tokens=2)).status_code == 200


async def test_echo_begins_with_the_prompt_and_its_log_probabilities(cluster: Cluster) -> None:
    await cluster.pair()
    prompt = "ax 你"
    ids = TOKENIZER.encode(prompt).ids
    body = {"prompt": prompt, "max_tokens": 3, "seed": 0, "echo": True, "logprobs": 2}
    (choice,) = (await cluster.complete(**body)).json()["choices"]
    assert choice["text"].startswith(prompt)
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == [None] + [-1.0] * (len(ids) - 1) + [-0.5] * 3
    assert logprobs["tokens"][:3] == ["a", "x", " "]
    assert logprobs["tokens"][3:6] == ["bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0"]
    assert logprobs["text_offset"][: len(ids) + 1] == [0, 1, 2, 3, 3, 3, 4]
    assert logprobs["top_logprobs"][0] is None
    assert [len(top) for top in logprobs["top_logprobs"][1:]] == [3] * (len(ids) + 2)
    by_ids = (await cluster.complete(**{**body, "prompt": ids})).json()["choices"][0]
    assert by_ids == choice
    *chunks, _ = await cluster.events(**body)
    streamed = [chunk["choices"][0] for chunk in chunks]
    assert "".join(c["text"] for c in streamed) == choice["text"]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [v for c in streamed for v in c["logprobs"][name]] == logprobs[name]


async def test_echo_without_log_probabilities_asks_for_none(cluster: Cluster) -> None:
    prefill, _ = await cluster.pair()
    choice = (await cluster.complete(prompt="ab", echo=True, max_tokens=2)).json()["choices"][0]
    assert choice["text"].startswith("ab")
    assert choice["logprobs"] is None
    assert not prefill.kinds("prefill")[0].sampling.HasField("prompt_logprobs")


async def test_sampling_fields_reach_the_workers(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair()
    fields = {
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 2,
        "min_tokens": 2,
        "top_k": 7,
        "top_p": 0.5,
        "temperature": 0.75,
    }
    answer = await cluster.complete(
        max_tokens=3,
        logit_bias={"7": -100, "8": 1.5},
        logprobs=4,
        stop_token_ids=[9],
        ignore_eos=True,
        cache_salt="mine",
        priority=-3,
        **fields,
    )
    assert answer.status_code == 200, answer.text
    for request in (prefill.kinds("prefill")[0], decode.kinds("reserve")[0]):
        sampling = request.sampling
        assert {name: getattr(sampling, name) for name in fields} == fields
        assert dict(sampling.logit_bias) == {7: -100.0, 8: 1.5}
        assert (sampling.logprobs, sampling.top_logprobs) == (True, 4)
        assert (list(sampling.stop_token_ids), sampling.ignore_eos) == ([9], True)
        assert (request.cache_salt, request.priority) == ("mine", -3)


async def test_special_tokens_are_shown_where_asked_for(cluster: Cluster) -> None:
    special = TOKENIZER.token_to_id("<eos>")
    tokens = [65, special, 66]
    prefill = await cluster.worker(PREFILL, Script(tokens=tokens))
    await cluster.usable(prefill, await cluster.worker(DECODE, Script(tokens=tokens)))
    hidden = (await cluster.complete(max_tokens=3)).json()["choices"][0]["text"]
    shown = await cluster.complete(max_tokens=3, skip_special_tokens=False)
    assert "<eos>" not in hidden
    assert shown.json()["choices"][0]["text"] == hidden[:1] + "<eos>" + hidden[1:]


async def test_the_fingerprint_names_the_model_and_stays(cluster: Cluster) -> None:
    await cluster.pair()
    first, second = [(await cluster.complete(max_tokens=2)).json() for _ in range(2)]
    chunk = (await cluster.events(prompt=[1], max_tokens=2))[0]
    assert first["system_fingerprint"].startswith("fp_")
    assert first["system_fingerprint"] == second["system_fingerprint"]
    assert chunk["system_fingerprint"] == first["system_fingerprint"]


async def test_a_stop_token_is_named(cluster: Cluster) -> None:
    await cluster.pair(decode=Script(stop_at=2))
    choice = (await cluster.complete(max_tokens=9)).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", EOS)


async def test_grpc_tells_alternatives_and_the_prompts_log_probabilities(cluster: Cluster) -> None:
    await cluster.pair()
    result = await cluster.generate(max_tokens=3, top_logprobs=2, prompt_logprobs=1)
    first = result.responses[0]
    assert [token.id for token in first.prompt_tokens] == [1, 2, 3]
    assert [token.HasField("logprob") for token in first.prompt_tokens] == [False, True, True]
    assert not any(response.prompt_tokens for response in result.responses[1:])
    tokens = [token for response in result.responses for token in response.tokens]
    assert [len(token.top) for token in tokens] == [2, 2, 2]
    assert isinstance(tokens[0].top[0], inference_pb2.TopLogprob)
