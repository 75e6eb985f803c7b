"""Bad input gets a clear error, and the next request works."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch

from baton import Client
from baton.errors import InvalidRequest, NotFound, RequestError
from tests.e2e.cluster import Cluster

BODIES: dict[str, tuple[dict[str, Any], int]] = {
    "empty text": ({"prompt": ""}, 400),
    "no tokens": ({"prompt": []}, 400),
    "no prompt": ({"max_tokens": 4}, 400),
    "token id out of range": ({"prompt": [1, 2, 10**9]}, 400),
    "token id beyond 32 bits": ({"prompt": [2**40]}, 400),
    "negative token id": ({"prompt": [-1]}, 400),
    "token id not an integer": ({"prompt": [1.5]}, 400),
    "token id a string": ({"prompt": ["1", 2]}, 400),
    "token id a boolean": ({"prompt": [True]}, 400),
    "longer than the context": ({"prompt": [5] * 5000}, 400),
    "longer than the memory": ({"prompt": [5] * 600, "max_tokens": 4}, 400),
    "longer with its output than the memory": ({"prompt": [5] * 480, "max_tokens": 100}, 400),
    "max_tokens of zero": ({"prompt": [5], "max_tokens": 0}, 400),
    "negative max_tokens": ({"prompt": [5], "max_tokens": -3}, 400),
    "max_tokens beyond the context": ({"prompt": [5], "max_tokens": 10**7}, 400),
    "negative temperature": ({"prompt": [5], "temperature": -0.1}, 400),
    "temperature a string": ({"prompt": [5], "temperature": "hot"}, 400),
    "top_p of zero": ({"prompt": [5], "top_p": 0}, 400),
    "unknown model": ({"prompt": [5], "model": "nobody"}, 404),
    "stream a number": ({"prompt": [5], "stream": 7}, 400),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_bad_body_is_refused_and_the_next_request_works(small_memory: Cluster, case: str) -> None:
    body, status = BODIES[case]
    response = small_memory.complete(**body)
    _expect_error(response, status)
    _expect_service(small_memory)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_temperature_that_is_not_finite_is_refused(small_memory: Cluster, literal: str) -> None:
    response = _post(small_memory, f'{{"prompt": [5], "temperature": {literal}}}')
    _expect_error(response, 400)
    _expect_service(small_memory)


@pytest.mark.parametrize("text", ["{", "[]", "null", '"text"', "\x00", ""])
def test_broken_json_is_refused(small_memory: Cluster, text: str) -> None:
    _expect_error(_post(small_memory, text), 400)
    _expect_service(small_memory)


def test_a_body_over_the_size_limit_is_refused(small_memory: Cluster) -> None:
    response = _post(small_memory, json.dumps({"prompt": "x" * (40 << 20)}))
    _expect_error(response, 413)
    _expect_service(small_memory)


def test_grpc_refuses_the_same(small_memory: Cluster) -> None:
    cases: list[tuple[Any, dict[str, Any], type[RequestError]]] = [
        ([], {}, InvalidRequest),
        ("", {}, InvalidRequest),
        ([10**9], {}, InvalidRequest),
        ([2**63], {}, InvalidRequest),
        ([5] * 5000, {}, InvalidRequest),
        ([5], {"max_tokens": 0}, InvalidRequest),
        ([5], {"temperature": float("nan")}, InvalidRequest),
        ([5], {"temperature": float("inf")}, InvalidRequest),
        ([5], {"temperature": -1.0}, InvalidRequest),
        ([5], {"top_k": -1}, InvalidRequest),
        ([5], {"model": "nobody"}, NotFound),
    ]
    with Client(small_memory.grpc) as client:
        for prompt, options, error in cases:
            with pytest.raises(error):
                client.complete(prompt, **{"max_tokens": 4, **options})
        assert client.complete([5], max_tokens=2, ignore_eos=True).finish_reason == "length"


@pytest.mark.parametrize(
    ("breakage", "names"),
    [
        ("no weights", "safetensors"),
        ("wrong shape", "shape"),
        ("unsupported architecture", "Mamba2ForCausalLM"),
        ("no config", "config.json"),
    ],
)
def test_a_broken_model_directory_is_named_at_start(
    llama: Path, tmp_path: Path, breakage: str, names: str
) -> None:
    model = _broken_copy(llama, tmp_path / "model", breakage)
    done = subprocess.run(
        [sys.executable, "-m", "baton", "up", "--model", str(model), "--device", "cpu",
         "--http-port", "0", "--grpc-port", "0"],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert names in done.stderr
    assert "Traceback" not in done.stderr


def _broken_copy(model: Path, target: Path, breakage: str) -> Path:
    shutil.copytree(model, target)
    config = target / "config.json"
    if breakage == "no weights":
        for file in target.glob("*.safetensors*"):
            file.unlink()
    elif breakage == "no config":
        config.unlink()
    elif breakage == "unsupported architecture":
        config.write_text(config.read_text().replace("LlamaForCausalLM", "Mamba2ForCausalLM"))
    else:
        file = next(iter(target.glob("*.safetensors")))
        weights = safetensors.torch.load_file(file)
        name = next(n for n in weights if n.endswith("down_proj.weight"))
        weights[name] = weights[name][:, :-1].contiguous()
        safetensors.torch.save_file(weights, file)
    return target


def _post(cluster: Cluster, text: str) -> httpx.Response:
    return httpx.post(
        f"{cluster.http}/v1/completions",
        content=text.encode(),
        headers={"content-type": "application/json"},
        timeout=30.0,
    )


def _expect_error(response: httpx.Response, status: int) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def _expect_service(cluster: Cluster) -> None:
    response = cluster.complete(prompt=[5, 6], max_tokens=2, ignore_eos=True, temperature=0)
    assert response.status_code == 200, response.text
    cluster.wait_until_balanced()
