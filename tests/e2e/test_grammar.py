"""Constrained outputs through real processes: every door, the handover, a death in the middle."""

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from baton import Client, InvalidRequest
from tests.e2e.cluster import Cluster, running_cluster
from tests.e2e.deaths import has_work, kill, ready
from tests.e2e.worker_status import get_status, wait_for

TINY = Path(__file__).resolve().parents[2] / "models" / "baton-tiny"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["list", "dict", "set"]},
        "sizes": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}
LISP = 'root ::= "(" [a-z]{1,6} (" " (root | [0-9]{1,3})){0,2} ")"'
MESSAGES: list[Any] = [{"role": "user", "content": "Describe a list in Python as JSON."}]
ENDLESS = {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{k}}}"} for k in range(5, 25)]}
"""Keeps the library busy for minutes."""
TIMEOUT_S = 3.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = (
        "--prefill", "1",
        "--decode", "2",
        "--restart",
        "--page-size", "16",
        "--chunked-prefill-size", "32",
        "--max-total-tokens", "8192",
        "--grammar-timeout-s", str(TIMEOUT_S),
    )  # fmt: skip
    with running_cluster(TINY, tmp_path_factory.mktemp("grammar"), *flags) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="x", max_retries=0) as made:
        yield made


def test_response_format_holds_a_chat_to_its_schema(
    cluster: Cluster, client: openai.OpenAI
) -> None:
    model = client.models.list().data[0].id
    for seed in range(3):
        answer = client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True},
            },
            seed=seed,
            temperature=1.0,
            max_completion_tokens=200,
        )
        content = answer.choices[0].message.content
        assert content is not None
        assert answer.choices[0].finish_reason == "stop", content
        jsonschema.validate(json.loads(content), SCHEMA)
    cluster.wait_until_balanced()


def test_a_stream_of_any_json_object(cluster: Cluster, client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    pieces = client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        response_format={"type": "json_object"},
        temperature=0.8,
        seed=5,
        max_completion_tokens=400,
        stream=True,
    )
    chunks = list(pieces)
    content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert content.startswith("{")
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    if ends[-1] == "stop":
        assert isinstance(json.loads(content), dict)
    cluster.wait_until_balanced()


def test_completions_take_regular_expressions_and_ebnf(
    cluster: Cluster, client: openai.OpenAI
) -> None:
    model = client.models.list().data[0].id
    answer = client.completions.create(
        model=model,
        prompt="The date is ",
        n=3,
        seed=1,
        extra_body={"regex": r"\d{4}-(0[1-9]|1[0-2])-[0-3]\d"},
    )
    for choice in answer.choices:
        assert re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])-[0-3]\d", choice.text)
        assert choice.finish_reason == "stop"
    answer = client.completions.create(
        model=model, prompt=["(car x)", "Lisp:"], max_tokens=64, seed=2, extra_body={"ebnf": LISP}
    )
    for choice in answer.choices:
        assert re.fullmatch(r"[a-z0-9 ()]+", choice.text)
        assert choice.text.count("(") == choice.text.count(")") > 0
    cluster.wait_until_balanced()


def test_the_python_client_and_the_command_line_constrain(cluster: Cluster) -> None:
    with Client(cluster.grpc) as client:
        answer = client.complete(
            "A thing: ", json_schema=SCHEMA, seed=3, max_tokens=200, logprobs=True
        )
        jsonschema.validate(json.loads(answer.text), SCHEMA)
        assert answer.report is not None
        assert answer.report.kv_bytes > 0
        one_of_two = client.complete("Yes or no? ", regex="yes|no", temperature=0)
        assert one_of_two.text in ("yes", "no")
        assert one_of_two.finish_reason == "stop"
        with pytest.raises(InvalidRequest, match="exclude one another"):
            client.complete("x", regex="a", ebnf='root ::= "a"')
    done = subprocess.run(
        [sys.executable, "-m", "baton", "generate", "--router", cluster.grpc,
         "--json-schema", json.dumps({"enum": ["red", "green"]}), "A colour: "],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) in ("red", "green")
    cluster.wait_until_balanced()


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"regex": "(a"}, None, "unclosed group"),
        ({"ebnf": "root ::= x"}, None, "rule `x` is not defined"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema":
          {"type": "array", "uniqueItems": True}}}}, None, "uniqueItems"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "ebnf", "exclude one another"),
        ({"regex": "a" * 300_000}, "regex", "bytes"),
        ({"guided_json": {}}, "guided_json", "Unrecognized"),
    ],
)  # fmt: skip
def test_a_bad_grammar_is_told_at_once(
    cluster: Cluster, body: dict[str, Any], param: str | None, said: str
) -> None:
    started = time.monotonic()
    answer = cluster.complete(prompt=list(range(5, 300)), max_tokens=4, **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["param"] == param
    assert time.monotonic() - started < 8.0
    cluster.wait_until_balanced()


def test_a_harmful_grammar_is_refused_in_time_while_others_are_served(cluster: Cluster) -> None:
    answers: list[Any] = []

    def harm() -> None:
        answers.append(
            cluster.complete(
                prompt="x",
                max_tokens=4,
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": ENDLESS},
                },
            )
        )

    thread = threading.Thread(target=harm)
    thread.start()
    served = 0
    while thread.is_alive():
        answer = cluster.complete(prompt="The date is ", regex=f"[a-z]{{{served % 7 + 1}}}")
        assert answer.status_code == 200, answer.text
        served += 1
    assert answers[0].status_code == 400, answers[0].text
    assert "--grammar-timeout-s" in answers[0].json()["error"]["message"]
    assert served > 2
    cluster.wait_until_balanced()


def test_a_client_may_leave_while_its_grammar_compiles(cluster: Cluster) -> None:
    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{cluster.http}/v1", api_key="x") as client:
            model = (await client.models.list()).data[0].id
            harmful = {**ENDLESS, "description": "another one"}
            task = asyncio.create_task(
                client.completions.create(
                    model=model,
                    prompt="x",
                    extra_body={
                        "response_format": {
                            "type": "json_schema",
                            "json_schema": {"name": "a", "schema": harmful},
                        }
                    },
                )
            )
            await asyncio.sleep(0.5)
            task.cancel()

    asyncio.run(leave())
    cluster.wait_until_balanced()


@pytest.mark.parametrize("after", [1, 9])
def test_decode_may_die_in_the_middle_of_constrained_text(cluster: Cluster, after: int) -> None:
    asked: dict[str, Any] = {"json_schema": SCHEMA, "seed": 77, "temperature": 1.0}
    with Client(cluster.grpc) as client:
        undisturbed = client.complete("An example: ", max_tokens=200, **asked)
        jsonschema.validate(json.loads(undisturbed.text), SCHEMA)
        assert len(undisturbed.token_ids) > 18
        for _ in range(3):
            wait_for(lambda: len(ready(cluster, "decode")) == 2, "two decode workers", within_s=40)
            result = _with_a_death(cluster, client, after, asked)
            assert result[0] == undisturbed.text
            assert result[1] == undisturbed.token_ids
            if result[2]:
                break
        assert result[2] == 1
    cluster.wait_until_balanced()


def _with_a_death(
    cluster: Cluster, client: Client, after: int, asked: dict[str, Any]
) -> tuple[str, list[int], int]:
    """(text, token ids, replays) of a run whose decode worker dies after so many tokens."""
    text, ids, replays = "", [], 0
    dead = False
    with client.generate("An example: ", max_tokens=200, **asked) as stream:
        for chunk in stream:
            text += chunk.text
            ids += [token.id for token in chunk.tokens]
            if len(ids) >= after and not dead:
                dead = True
                workers = ready(cluster, "decode")
                busy = [w for w in workers if has_work(get_status(w["address"]))]
                kill((busy or workers)[0])
            if chunk.report is not None:
                replays = chunk.report.replays
    return text, ids, replays


def test_a_unified_worker_constrains_too(llama: Path, tmp_path: Path) -> None:
    flags = ("--prefill", "0", "--decode", "0", "--unified", "1", "--page-size", "16")
    with running_cluster(llama, tmp_path, *flags) as cluster:
        answer = cluster.complete(
            prompt="x", max_tokens=60, temperature=0, regex="[a-f]{3}(-[a-f]{3}){4}"
        )
        assert re.fullmatch("[a-f]{3}(-[a-f]{3}){4}", answer.json()["choices"][0]["text"])
        assert cluster.complete(prompt="x", regex="(a").status_code == 400
        cluster.wait_until_balanced()
