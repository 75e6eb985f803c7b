"""Stop strings: found across token borders, never shown in part, and the workers hear of it."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.baton.v1 import inference_pb2
from protos.errors import BatonError
from router.stop_strings import MAX_STOP_CHARACTERS, StopMatcher, check_stop
from tests.router.conftest import Cluster, byte_level_bpe
from tests.router.fakes import EOS, FakeWorker, Script, until

TOKENIZER = byte_level_bpe()
SMALL = st.text("ab", min_size=1, max_size=5)


def first_stop(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The rule, read literally: the stop string complete first, and of several the longest."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(pieces: list[str], stop: list[str]) -> tuple[str, str | None]:
    matcher, shown = StopMatcher(stop), ""
    for piece in pieces:
        found = matcher.push(piece)
        shown += found.text
        if found.stop is not None:
            return shown, found.stop
    return shown + matcher.flush(), None


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(SMALL, min_size=1, max_size=4))
def test_what_is_found_does_not_depend_on_how_the_text_was_cut(
    pieces: list[str], stop: list[str]
) -> None:
    assert run(pieces, stop) == first_stop("".join(pieces), stop)


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(SMALL, min_size=1, max_size=4))
def test_nothing_is_shown_that_a_stop_string_takes_back(pieces: list[str], stop: list[str]) -> None:
    whole, _ = first_stop("".join(pieces), stop)
    matcher, shown = StopMatcher(stop), ""
    for piece in pieces:
        found = matcher.push(piece)
        shown += found.text
        assert whole.startswith(shown)
        if found.stop is not None:
            return


def test_only_what_may_be_a_beginning_is_held_back() -> None:
    matcher = StopMatcher(["STOP", "ABC"])
    assert [matcher.push(piece).text for piece in ("x S", "TO", "A", "B!", "ST")] == [
        "x ",
        "",
        "STO",
        "AB!",
        "",
    ]
    assert matcher.flush() == "ST"


def test_a_stop_string_that_does_not_count_is_text() -> None:
    matcher = StopMatcher(["aa"])
    assert matcher.push("aa", may_stop=False).text == "a"
    assert matcher.push("a").stop == "aa"


@pytest.mark.parametrize("stop", [[""], ["a"] * 17, ["x" * (MAX_STOP_CHARACTERS + 1)]])
def test_bad_stop_strings_are_refused(stop: list[str]) -> None:
    with pytest.raises(BatonError) as caught:
        check_stop(stop)
    assert caught.value.param == "stop"


def test_the_cost_is_linear_in_the_text_also_where_all_of_it_nearly_matches() -> None:
    stop = ["a" * (MAX_STOP_CHARACTERS - 1) + chr(ord("b") + i) for i in range(4)]

    def cost_s(characters: int) -> float:
        started = time.perf_counter()
        matcher = StopMatcher(stop)
        for _ in range(characters // 4):
            matcher.push("aaaa")
        return time.perf_counter() - started

    cost_s(4_000)
    assert min(cost_s(32_000) for _ in range(3)) < 14 * min(cost_s(8_000) for _ in range(3))


SAID = "abcdefghijkl and so on, é and on"
IDS = TOKENIZER.encode(SAID).ids
"""Each of the first tokens is one character."""


async def speaking(cluster: Cluster, **script: Any) -> FakeWorker:
    """The decode worker of a pair that says SAID."""
    _, decode = await cluster.pair(prefill=Script(tokens=IDS), decode=Script(tokens=IDS, **script))
    return decode


async def test_an_output_ends_within_tokens_and_the_workers_are_told(cluster: Cluster) -> None:
    decode = await speaking(cluster, token_delay_s=0.01)
    result = await cluster.generate(max_tokens=500, stop=["~~~never~~~", "fgh"])
    assert (result.text, result.ids) == ("abcde", IDS[:8])
    last = result.last
    assert last.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert last.stop_text == "fgh"
    assert not last.HasField("stop_token_id")
    assert last.usage.completion_tokens == 8
    await until(lambda: decode.kinds("abort"), timeout_s=1)


async def test_the_http_door_ends_there_too_whole_and_streamed(cluster: Cluster) -> None:
    await speaking(cluster)
    body = {"prompt": [1], "max_tokens": 500, "return_token_ids": True, "stop": "fgh"}
    choice = (await cluster.complete(**body)).json()["choices"][0]
    assert (choice["text"], choice["token_ids"]) == ("abcde", IDS[:8])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "fgh")
    *chunks, _ = await cluster.events(**body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abcde"
    assert [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]] == IDS[:8]


async def test_a_first_token_may_complete_a_stop_string(cluster: Cluster) -> None:
    decode = await speaking(cluster)
    result = await cluster.generate(max_tokens=9, stop=["a"])
    assert (result.text, result.ids) == ("", IDS[:1])
    await until(lambda: decode.kinds("abort"), timeout_s=1)


async def test_text_held_back_is_released_at_the_end(cluster: Cluster) -> None:
    await speaking(cluster)
    result = await cluster.generate(max_tokens=12, stop=["jkl and on"])
    assert (result.text, result.ids) == ("abcdefghijkl", IDS[:12])
    assert not result.last.HasField("stop_text")


async def test_a_stop_token_releases_held_text_too(cluster: Cluster) -> None:
    await speaking(cluster, stop_at=4)
    result = await cluster.generate(max_tokens=12, stop=["cde"])
    assert (result.text, result.ids[-1]) == ("abcd", EOS)
    assert result.last.stop_token_id == EOS


async def test_the_prompt_is_not_searched(cluster: Cluster) -> None:
    await speaking(cluster)
    answer = await cluster.complete(prompt="xyz", max_tokens=4, echo=True, stop=["yz", "za"])
    assert answer.json()["choices"][0]["text"] == "xyzabcd"


async def test_a_stop_string_before_min_tokens_is_text(cluster: Cluster) -> None:
    await speaking(cluster)
    result = await cluster.generate(max_tokens=20, min_tokens=6, stop=["c", "h"])
    assert (result.text, len(result.ids)) == ("abcdefg", 8)
    exactly = await cluster.generate(max_tokens=20, min_tokens=3, stop=["c"])
    assert (exactly.text, len(exactly.ids)) == ("ab", 3)


async def test_a_replay_goes_on_in_the_middle_of_a_stop_string(cluster: Cluster) -> None:
    await speaking(cluster, fail_before=7)
    result = await cluster.generate(max_tokens=12, stop=["fghi"])
    assert result.last.report.replays == 1
    assert (result.text, result.ids) == ("abcde", IDS[:9])
