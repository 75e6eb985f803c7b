"""What a caller may say about a request, and its translation to the wire."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from baton.errors import InvalidRequest
from protos.baton.v1 import inference_pb2


class RequestOptions(TypedDict, total=False):
    """What may be said about a request; what is left out (or None) the server decides."""

    max_tokens: int | None
    """Most tokens to produce; left out: what fits the context and the workers' memory."""

    temperature: float | None
    """0 is greedy; finite, >= 0."""

    top_p: float | None
    """Smallest set of most likely tokens whose probability reaches this; 0 < top_p <= 1."""

    top_k: int | None
    """Number of most likely tokens kept; 0: all."""

    seed: int | None
    """The same seed draws the same tokens; left out: the router draws one and reports it."""

    stop_token_ids: Sequence[int]
    """Tokens that end the output, besides the model's own."""

    ignore_eos: bool | None
    """Go on past the model's end-of-sequence token."""

    logprobs: bool | None
    """Report each produced token's log probability."""

    min_p: float | None
    """Drop tokens less likely than this times the most likely one; 0 <= min_p <= 1."""

    repetition_penalty: float | None
    """Divides positive and multiplies negative logits of tokens seen in prompt or output; > 0,
    1: none."""

    presence_penalty: float | None
    """Subtracted from the logit of each token that the output holds; -2 to 2."""

    frequency_penalty: float | None
    """Subtracted once for each time the output holds the token; -2 to 2."""

    logit_bias: Mapping[int, float]
    """Token id → what is added to its logit, -100 to 100; at most 1,024 entries."""

    top_logprobs: int | None
    """Most likely tokens to report beside each produced one, 0 to 20; above 0 implies logprobs."""

    prompt_logprobs: int | None
    """Also report the prompt's tokens' log probabilities, with this many alternatives (0 to 20);
    left out: do not."""

    min_tokens: int | None
    """End-of-sequence and stop tokens are not drawn before this many tokens."""

    stop: Sequence[str]
    """Texts that end the output wherever they begin or end within tokens; not part of the text."""

    skip_special_tokens: bool | None
    """Leave special tokens out of the text; left out: yes."""

    json_schema: str | Mapping[str, Any]
    """A JSON schema (as text, or as an object) that the output is held to; `{}`: any JSON."""

    regex: str
    """A regular expression that the whole output matches."""

    ebnf: str
    """A grammar whose rule `root` the output belongs to. At most one of the three."""

    cache_salt: str
    """Share cached prefixes only with requests of the same salt."""

    request_id: str
    """Chosen by the caller, to `abort` it by; left out: chosen by the router."""

    model: str
    """Left out: the one served."""

    priority: int | None
    """Smaller is more important; 0 is normal. Counts where the workers run with
    --enable-priority-scheduling."""


def build_request(
    prompt: str | Sequence[int], options: RequestOptions, *, whole: bool = False
) -> inference_pb2.GenerateRequest:
    """The wire form of a request. `whole`: nothing is looked at before the output's end, so that it
    need not come token by token.

    Raises:
        InvalidRequest: a value that the wire cannot carry (a negative token id, say). Everything
            else is the router's to judge.
        TypeError: an option that there is none of; a misspelt one would otherwise change nothing.
    """
    unknown = sorted(options.keys() - RequestOptions.__optional_keys__)
    if unknown:
        raise TypeError(f"there is no option {', '.join(map(repr, unknown))} (see RequestOptions)")
    request_id = options.get("request_id", "")
    try:
        sampling = inference_pb2.SamplingParams(
            temperature=options.get("temperature"),
            top_p=options.get("top_p"),
            top_k=options.get("top_k"),
            seed=options.get("seed"),
            max_tokens=options.get("max_tokens"),
            stop_token_ids=options.get("stop_token_ids", ()),
            ignore_eos=options.get("ignore_eos"),
            logprobs=options.get("logprobs"),
            min_p=options.get("min_p"),
            repetition_penalty=options.get("repetition_penalty"),
            presence_penalty=options.get("presence_penalty"),
            frequency_penalty=options.get("frequency_penalty"),
            logit_bias=options.get("logit_bias", {}),
            top_logprobs=options.get("top_logprobs"),
            prompt_logprobs=options.get("prompt_logprobs"),
            min_tokens=options.get("min_tokens"),
            stop=_stop_texts(options.get("stop", ())),
            skip_special_tokens=options.get("skip_special_tokens"),
            grammar=_grammar(options),
        )
        request = inference_pb2.GenerateRequest(
            request_id=request_id,
            model=options.get("model", ""),
            sampling=sampling,
            priority=options.get("priority"),
            cache_salt=options.get("cache_salt", ""),
            whole=whole,
        )
        if isinstance(prompt, str):
            request.text = prompt
        else:
            # Marks the prompt as token ids even where there are none.
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(prompt)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(str(error), request_id=request_id) from error
    return request


def _grammar(options: RequestOptions) -> inference_pb2.Grammar | None:
    schema = options.get("json_schema")
    if schema is not None and not isinstance(schema, str):
        schema = json.dumps(schema)
    kinds = {"json_schema": schema, "regex": options.get("regex"), "ebnf": options.get("ebnf")}
    given = {kind: text for kind, text in kinds.items() if text is not None}
    if len(given) > 1:
        # On the wire the last one would quietly win.
        raise ValueError(f"{' and '.join(given)} exclude one another: give one of them")
    return inference_pb2.Grammar(**given) if given else None


def _stop_texts(stop: Sequence[str]) -> Sequence[str]:
    if isinstance(stop, str):
        # A sequence of strings to Python: each of its characters would stop the output.
        raise TypeError("stop must be a list of texts, not one text")
    return stop
