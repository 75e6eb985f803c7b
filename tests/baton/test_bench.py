"""`baton bench` against scripted servers."""

import asyncio
import http.server
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.bench.doors import ServedModel, ask, start_clock
from baton.bench.drive import drive_closed, drive_open, lag_probe
from baton.bench.plan import PlannedRequest
from baton.bench.sample import Sample
from baton.cli import main
from tests.baton.scripted import ScriptedInference


class CompletionsHandler(http.server.BaseHTTPRequestHandler):
    """An OpenAI-like server that is not Baton: one event a token, usage at the end.

    A prompt of nine tokens, or that begins with token 1, is refused; one that begins with 2 is cut
    off, with 3 answered too briefly.
    """

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": "other", "owned_by": "someone"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)  # type: ignore[attr-defined]
        first = body["prompt"][0]
        if first == 1 or len(body["prompt"]) == 9:
            self._send(429, json.dumps({"error": {"message": "too many", "type": "rate_limit"}}))
            return
        count = body["max_tokens"] - (first == 3)
        events = [{"choices": [{"text": "x", "finish_reason": None}]} for _ in range(count)]
        events.append({"choices": [{"text": "", "finish_reason": "length"}]})
        events.append({"choices": [], "usage": {"completion_tokens": count}})  # type: ignore[dict-item]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        if first != 2:
            lines.append("data: [DONE]\n\n")
        self._send(200, "".join(lines), kind="text/event-stream")

    def _send(self, status: int, text: str, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def other_server() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), CompletionsHandler)
    server.bodies = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


SMALL = ("--input-length", "4", "--output-length", "4")


def test_a_closed_loop_over_grpc_reports_every_figure(
    address: str,
    inference: ScriptedInference,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target, drawing = tmp_path / "run.json", tmp_path / "run.svg"
    flags = ["--concurrency", "2", "--requests", "9", "--warmup", "1", "--slo-ttft-ms", "5000"]
    files = ["--json", str(target), "--plot", str(drawing)]
    assert main(["bench", "--url", f"grpc://{address}", *flags, *SMALL, *files]) == 0
    captured = capsys.readouterr()
    for label in ("TTFT", "ITL", "TPOT", "handover", "goodput", "output tokens/s"):
        assert label in captured.out
    assert "9/9" in captured.err
    document = json.loads(target.read_text())
    figures = document["figures"]
    assert (figures["sent"], figures["succeeded"], figures["good"]) == (9, 9, 9)
    assert figures["itl_ms"]["count"] == 27
    assert figures["phases_ms"]["ttft"]["p50"] == 3.0
    assert figures["transports"] == {"grpc": 9}
    assert document["settings"]["model"] == "echo"
    assert [request["completion_tokens"] for request in document["requests"]] == [4] * 9
    assert drawing.read_text().startswith("<?xml")
    assert len(inference.requests) == 10
    assert all(request.sampling.ignore_eos for request in inference.requests)
    assert all(max(request.token_ids.ids) < 256 for request in inference.requests)


def test_the_same_seed_sends_the_same_prompts(address: str, inference: ScriptedInference) -> None:
    flags = ["--rate", "200", "--requests", "5", *SMALL]
    for seed in ("7", "7", "8"):
        assert main(["bench", "--url", f"grpc://{address}", "--seed", seed, *flags]) == 0
    sent = [tuple(request.token_ids.ids) for request in inference.requests]
    # Five requests in 25 ms may overtake one another on the way.
    assert sorted(sent[:5]) == sorted(sent[5:10])
    assert not set(sent[:5]) & set(sent[10:])


def test_failed_requests_are_counted_by_kind_and_the_rest_goes_on(
    other_server: http.server.ThreadingHTTPServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "run.json"
    url = f"http://127.0.0.1:{other_server.server_port}/v1"
    flags = ["--concurrency", "3", "--requests", "60", "--vocab-size", "5", "--json", str(target)]
    assert main(["bench", "--url", url, *flags, *SMALL]) == 0
    sent = [body["prompt"][0] for body in other_server.bodies]  # type: ignore[attr-defined]
    expected = {"HTTP 429": 1, "CutStream": 2, "ShortAnswer": 3}
    figures = json.loads(target.read_text())["figures"]
    assert figures["errors"] == {kind: sent.count(first) for kind, first in expected.items()}
    assert min(figures["errors"].values()) > 0
    assert figures["sent"] == len(sent) == 60
    assert figures["succeeded"] == sent.count(0) + sent.count(4)
    captured = capsys.readouterr()
    assert "HTTP 429" in captured.out
    assert "too many" in captured.err


def test_a_server_that_is_not_baton_gets_openais_fields_only(
    other_server: http.server.ThreadingHTTPServer,
) -> None:
    url = f"http://127.0.0.1:{other_server.server_port}"
    flags = ["--rate", "500", "--requests", "2", "--vocab-size", "1", *SMALL]
    assert main(["bench", "--url", url, *flags]) == 0
    bodies: list[dict[str, Any]] = other_server.bodies  # type: ignore[attr-defined]
    assert all("return_token_ids" not in body for body in bodies)
    assert bodies[0]["stream_options"] == {"include_usage": True}


def test_nothing_but_failures_is_status_1(
    other_server: http.server.ThreadingHTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{other_server.server_port}"
    flags = ["--concurrency", "1", "--requests", "2", "--vocab-size", "1", "--output-length", "4"]
    assert main(["bench", "--url", url, *flags, "--input-length", "9"]) == 1
    captured = capsys.readouterr()
    assert "HTTP 429" in captured.out
    assert "too many" in captured.err


def test_a_model_that_is_not_served_is_named(
    other_server: http.server.ThreadingHTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{other_server.server_port}"
    assert main(["bench", "--url", url, "--rate", "1", "--model", "absent"]) == 1
    assert "does not serve absent but other" in capsys.readouterr().err


def test_an_unknown_vocabulary_is_asked_for(
    other_server: http.server.ThreadingHTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{other_server.server_port}"
    assert main(["bench", "--url", url, "--rate", "1"]) == 2
    assert "give --vocab-size" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["grpc://127.0.0.1:1", "http://127.0.0.1:1"])
def test_an_absent_server_is_one_line_and_status_1(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--url", url, "--rate", "1"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_plot_without_matplotlib_names_the_extra_before_anything_is_sent(
    address: str,
    inference: ScriptedInference,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = ["--url", f"grpc://{address}", "--rate", "1", "--plot", "x.png"]
    assert main(["bench", *flags]) == 2
    assert "baton-serve[bench]" in capsys.readouterr().err
    assert not inference.requests


def planned(index: int, at_s: float) -> PlannedRequest:
    return PlannedRequest(index=index, at_s=at_s, prompt=[1], output_length=1)


async def test_an_open_loop_sends_on_time_however_slow_the_answers_are() -> None:
    clock = start_clock()
    sent: list[float] = []

    async def slow(request: PlannedRequest, at: float | None) -> Sample:
        sent.append(clock())
        await asyncio.sleep(0.3)
        return Sample(index=request.index, planned_s=0, sent_s=0, input_length=1, output_length=1)

    requests = [planned(index, 0.05 * index) for index in range(6)]
    ended: list[Sample] = []
    samples = await drive_open(requests, slow, clock=clock, on_end=ended.append)
    assert len(ended) == 6
    assert [sample.index for sample in samples] == list(range(6))
    assert all(at - request.at_s >= 0 for at, request in zip(sent, requests, strict=True))
    assert sent[-1] < 0.3, "requests wait for no answer"


async def test_a_closed_loop_never_has_more_than_asked_for_under_way() -> None:
    clock = start_clock()
    under_way, most = 0, 0

    async def count(request: PlannedRequest, at: float | None) -> Sample:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1
        return Sample(index=request.index, planned_s=0, sent_s=0, input_length=1, output_length=1)

    requests = iter([planned(index, 0.0) for index in range(20)])
    samples = await drive_closed(
        requests, count, concurrency=4, bound_s=60.0, clock=clock, on_end=lambda _: None
    )
    assert [sample.index for sample in samples] == list(range(20))
    assert most == 4


class SilentDoor:
    """Never answers."""

    async def model(self, name: str) -> ServedModel:
        return ServedModel(name="m", vocab_size=1)

    async def send(self, request: PlannedRequest, sample: Sample, clock: Any) -> None:
        await asyncio.sleep(60)

    async def __aenter__(self) -> "SilentDoor":
        return self

    async def __aexit__(self, *error: object) -> None: ...


async def test_a_silent_door_is_a_timeout_in_the_sample() -> None:
    sample = await ask(
        SilentDoor(), planned(0, 0.0), clock=start_clock(), timeout_s=0.05, planned_s=None
    )
    assert sample.error == "TimeoutError"
    assert 0.05 <= sample.ended_s < 5.0


async def test_a_blocked_event_loop_is_seen_as_lag() -> None:
    async with lag_probe() as lags:
        await asyncio.sleep(0.05)
        time.sleep(0.2)  # noqa: ASYNC251 - blocking is the point
        await asyncio.sleep(0.05)
    assert max(lags) > 100
