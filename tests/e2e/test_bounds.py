"""What clients may cost a running cluster, and what is left of them: nothing."""

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import httpx
import pytest

from protos.baton.v1 import kv_pb2, worker_pb2, worker_pb2_grpc
from protos.version import PROTOCOL_VERSION
from tests.checkpoints import random_prompt
from tests.e2e.cluster import Cluster, running_cluster
from tests.e2e.leaving import WAYS, post
from tests.e2e.worker_status import footprints, wait_for, wait_until_free

BOUND_S = 1.0
QUEUE = 64
"""Most requests of the router, and most that wait at a worker."""
CHURN = 300
ABORTED = 0.3
SPARE_FILES = 8
"""A process may keep so many more descriptors than before: connections that are about to close."""
SPARE_THREADS = 4
"""gRPC's own pool grows and shrinks by itself."""
SPARE_BYTES = 48 << 20
"""Memory that allocators keep."""


@pytest.fixture(scope="module")
def cluster(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = (
        "--page-size", "16",
        "--head-timeout-s", str(BOUND_S),
        "--body-timeout-s", str(BOUND_S),
        "--write-timeout-s", str(BOUND_S),
        "--send-buffer-bytes", "4096",
        "--max-buffered-tokens", "200",
        "--max-queued-requests", str(QUEUE),
    )  # fmt: skip
    with running_cluster(llama, tmp_path_factory.mktemp("bounds"), *flags) as running:
        yield running


def _expect_service(cluster: Cluster) -> None:
    answer = cluster.complete(prompt=[5, 6], max_tokens=2, ignore_eos=True, temperature=0)
    assert answer.status_code == 200, answer.text
    cluster.wait_until_balanced()


def test_a_reader_that_stops_is_ended_and_its_pages_are_freed(cluster: Cluster) -> None:
    body = {"prompt": [5], "max_tokens": 1000, "ignore_eos": True, "stream": True, "logprobs": 0}
    before = _outcomes(cluster)
    with contextlib.closing(post(cluster, json.dumps(body).encode(), receive_bytes=4096)):
        _expect_service_while_busy(cluster)
        wait_for(lambda: _outcomes(cluster) > before, "its end")
        wait_until_free(cluster, within_s=1.0)
    _expect_service(cluster)


def _expect_service_while_busy(cluster: Cluster) -> None:
    answer = cluster.complete(prompt=[5, 6], max_tokens=2, ignore_eos=True, temperature=0)
    assert answer.status_code == 200, answer.text


def _outcomes(cluster: Cluster) -> float:
    """Requests that ended because their reader fell behind, or left."""
    lines = httpx.get(f"{cluster.http}/metrics", timeout=5.0).text.splitlines()
    wanted = ("resource_exhausted", "client_gone")
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith("baton_requests_total{") and any(w in line for w in wanted)
    )


def test_silent_slow_and_senseless_clients_disturb_nobody(cluster: Cluster) -> None:
    prompt = random_prompt(60, seed=3)
    body = {"prompt": prompt, "max_tokens": 300, "temperature": 0, "ignore_eos": True}
    undisturbed = cluster.complete(**body, return_token_ids=True).json()["choices"][0]
    before = footprints(cluster)
    worker = cluster.worker("decode")["address"]
    doors = [urlsplit(cluster.http).netloc, cluster.grpc, worker]
    openings = [
        b"",
        b"\x00" * 3000,
        b"POST /v1/completions HTTP/1.1\r\nhost",
        b"GET / HTTP/9\r\n\r\n",
    ]
    visitors = []
    for door in doors * 10:
        host, _, port = door.rpartition(":")
        for opening in openings:
            visitor = socket.create_connection((host, int(port)))
            with contextlib.suppress(ConnectionError):
                visitor.sendall(opening)
            visitors.append(visitor)
    disturbed = cluster.complete(**body, return_token_ids=True).json()["choices"][0]
    assert disturbed["token_ids"] == undisturbed["token_ids"]
    http = [v for v in visitors if v.getpeername()[1] == urlsplit(cluster.http).port]
    for visitor in http:
        visitor.settimeout(10 * BOUND_S)
        with contextlib.suppress(ConnectionError):
            while visitor.recv(65536):
                pass
    for visitor in visitors:
        visitor.close()
    _expect_as_before(cluster, before)
    _expect_service(cluster)


def _expect_as_before(cluster: Cluster, before: dict[int, object]) -> None:
    """No process is gone, and none has grown."""

    def grown() -> list[str]:
        now = footprints(cluster)
        assert now.keys() == before.keys()
        return [
            f"{now[pid]} was {was}"
            for pid, was in before.items()
            if now[pid].files > was.files + SPARE_FILES  # type: ignore[attr-defined]
            or now[pid].threads > was.threads + SPARE_THREADS  # type: ignore[attr-defined]
            or now[pid].memory_bytes > was.memory_bytes + SPARE_BYTES  # type: ignore[attr-defined]
        ]

    deadline = time.monotonic() + 15.0
    while left := grown():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_after_many_requests_and_many_aborts_nothing_is_left(cluster: Cluster) -> None:
    dice = random.Random(7)
    _churn(cluster, 30, dice)  # pools, caches and lazy imports reach their size
    wait_until_free(cluster, within_s=5.0)
    before = footprints(cluster)
    refused = _churn(cluster, CHURN, dice)
    assert not refused
    wait_until_free(cluster, within_s=5.0)
    _expect_as_before(cluster, before)
    _expect_service(cluster)


def _churn(cluster: Cluster, count: int, dice: random.Random) -> list[str]:
    """Short requests over both doors, some left at random times; what was refused."""
    ways = list(WAYS)
    plans = [
        (random_prompt(dice.randint(1, 80), seed=n), dice.random(), dice.random() * 0.05, n)
        for n in range(count)
    ]
    refused: list[str] = []

    def work(mine: list[tuple[list[int], float, float, int]]) -> None:
        with httpx.Client(base_url=cluster.http, timeout=30.0) as client:
            for prompt, chance, pause_s, number in mine:
                if chance < ABORTED:
                    way = ways[number % 4]  # those that end at once
                    visitor = WAYS[way](cluster, f"churn-{count}-{number}", prompt, 200)
                    time.sleep(pause_s)
                    visitor.leave()
                    continue
                answer = client.post(
                    "/v1/completions",
                    json={
                        "prompt": prompt,
                        "max_tokens": 1 + number % 6,
                        "stream": number % 2 == 0,
                    },
                )
                if answer.status_code != 200 or (number % 2 == 0 and "[DONE]" not in answer.text):
                    refused.append(answer.text)

    threads = [threading.Thread(target=work, args=(plans[i::8],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return refused


# ---- what a worker is told ----------------------------------------------------------------------

MAX_64 = 2**64 - 1
SANE = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 4, "seed": 1}
NONSENSE: dict[str, dict[str, object]] = {
    "no tokens": {"prompt_ids": []},
    "ids beyond 64 signed bits": {"prompt_ids": [MAX_64]},
    "an id beyond the vocabulary": {"prompt_ids": [320]},
    "a prior id beyond the vocabulary": {"output_so_far": [MAX_64]},
    "no output wanted": {"sampling": {**SANE, "max_tokens": 0}},
    "all output is there": {"output_so_far": [5, 5, 5, 5]},
    "temperature infinite": {"sampling": {**SANE, "temperature": float("inf")}},
    "temperature no number": {"sampling": {**SANE, "temperature": float("nan")}},
    "temperature negative": {"sampling": {**SANE, "temperature": -1.0}},
    "top_p zero": {"sampling": {**SANE, "top_p": 0.0}},
    "top_p no number": {"sampling": {**SANE, "top_p": float("nan")}},
    "top_k of 64 bits": {"sampling": {**SANE, "top_k": MAX_64}},
    "longer than the context": {"prompt_ids": [5] * 5000},
    "min_p no number": {"sampling": {**SANE, "min_p": float("nan")}},
    "repetition penalty negative": {"sampling": {**SANE, "repetition_penalty": -1.0}},
    "presence penalty infinite": {"sampling": {**SANE, "presence_penalty": float("inf")}},
    "frequency penalty no number": {"sampling": {**SANE, "frequency_penalty": float("nan")}},
    "bias of an unknown token": {"sampling": {**SANE, "logit_bias": {MAX_64: 1.0}}},
    "bias no number": {"sampling": {**SANE, "logit_bias": {5: float("nan")}}},
    "top logprobs of 64 bits": {"sampling": {**SANE, "logprobs": True, "top_logprobs": MAX_64}},
    "min_tokens of 64 bits": {"sampling": {**SANE, "min_tokens": MAX_64}},
    "prompt logprobs of 64 bits": {"sampling": {**SANE, "prompt_logprobs": MAX_64}},
}


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_answers_nonsense_with_a_failure_and_lives(cluster: Cluster, role: str) -> None:
    worker = cluster.worker(role)
    messages = []
    for number, (case, change) in enumerate(NONSENSE.items()):
        fields = {"prompt_ids": [5, 6], "sampling": SANE, "attempt": MAX_64 - number, **change}
        messages.append(_request(role, case, fields))
    other = "reserve" if role == "prefill" else "prefill"
    messages.append(_request("decode" if role == "prefill" else "prefill", other, {"attempt": 1}))
    failed = _failures(worker, messages, len(messages))
    assert failed.keys() == {*NONSENSE, other}
    assert not any(answer.retryable for answer in failed.values())
    assert cluster.worker(role)["engine_pids"] == worker["engine_pids"]
    _expect_service(cluster)


def test_a_ticket_for_another_request_ends_the_one_it_came_for(cluster: Cluster) -> None:
    ticket = worker_pb2.TicketForPrefill(
        request_id="one", attempt=1, ticket=kv_pb2.Ticket(request_id="two#1")
    )
    messages = [
        _request("prefill", "one", {"prompt_ids": [5], "sampling": SANE, "attempt": 1}),
        worker_pb2.RouterMessage(ticket=ticket),
    ]
    assert "two#1" in _failures(cluster.worker("prefill"), messages, 1)["one"].error.message
    wait_until_free(cluster, within_s=1.0)
    _expect_service(cluster)


def test_requests_that_wait_for_their_ticket_are_bounded(cluster: Cluster) -> None:
    fields = {"prompt_ids": [5], "sampling": SANE, "attempt": 1}
    messages = [_request("prefill", f"r{n}", fields) for n in range(QUEUE + 6)]
    failed = _failures(cluster.worker("prefill"), messages, 6)
    assert failed.keys() == {f"r{QUEUE + n}" for n in range(6)}
    assert all(answer.retryable for answer in failed.values())
    codes = {answer.error.code for answer in failed.values()}
    assert codes == {worker_pb2.ERROR_CODE_RESOURCE_EXHAUSTED}
    wait_until_free(cluster, within_s=1.0)
    _expect_service(cluster)


def _failures(
    worker: dict[str, Any], messages: list[worker_pb2.RouterMessage], count: int
) -> dict[str, worker_pb2.WorkFailed]:
    """Says these things in a session of our own, and returns the first `count` failures by id."""
    done = threading.Event()

    def said() -> Iterator[worker_pb2.RouterMessage]:
        yield _hello(worker["id"])
        yield from messages
        done.wait(30.0)

    failed: dict[str, worker_pb2.WorkFailed] = {}
    with grpc.insecure_channel(worker["address"]) as channel:
        for message in worker_pb2_grpc.WorkerStub(channel).Session(said(), timeout=20.0):
            if message.WhichOneof("kind") == "failed":
                failed[message.failed.request_id] = message.failed
                if len(failed) == count:
                    break
        done.set()
    return failed


ODD: dict[str, dict[str, object]] = {
    "hardly any temperature": {"temperature": 1e-310},
    "a temperature beyond float32": {"temperature": 1e300},
    "hardly any top_p": {"temperature": 1, "top_p": 1e-310},
    "all tokens and more": {"temperature": 1, "top_k": 2**63 - 1},
    "the largest seed": {"temperature": 1, "seed": MAX_64},
    "the least priority": {"priority": 2**63 - 1},
}


@pytest.mark.parametrize("case", ODD)
def test_odd_values_that_are_allowed_are_served_or_refused_by_name(
    cluster: Cluster, case: str
) -> None:
    engines = [worker["engine_pids"] for worker in cluster.workers()]
    answer = cluster.complete(prompt=[5, 6], max_tokens=3, ignore_eos=True, **ODD[case])
    if answer.status_code == 400:
        assert answer.json()["error"]["param"] in ODD[case]
    else:
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 3
    assert [worker["engine_pids"] for worker in cluster.workers()] == engines
    _expect_service(cluster)


def test_hardly_any_temperature_is_greedy(cluster: Cluster) -> None:
    asked = {"prompt": [5, 6], "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
    answers = [cluster.complete(**asked, temperature=t, seed=1).json() for t in (0, 1e-310, 1e-30)]
    greedy, *others = [answer["choices"][0]["token_ids"] for answer in answers]
    assert others == [greedy, greedy]
    cluster.wait_until_balanced()


def _hello(instance_id: str) -> worker_pb2.RouterMessage:
    return worker_pb2.RouterMessage(
        hello=worker_pb2.SessionHello(
            router_id="test", protocol_version=PROTOCOL_VERSION, instance_id=instance_id
        )
    )


def _request(role: str, case: str, fields: dict[str, object]) -> worker_pb2.RouterMessage:
    if role == "prefill":
        prefill = worker_pb2.PrefillRequest(
            request_id=case,
            decode_instance="nobody",
            **fields,  # type: ignore[arg-type]
        )
        return worker_pb2.RouterMessage(prefill=prefill)
    reserve = worker_pb2.ReserveRequest(
        request_id=case,
        prefill_instance="nobody",
        **fields,  # type: ignore[arg-type]
    )
    return worker_pb2.RouterMessage(reserve=reserve)


def test_a_router_cannot_end_the_requests_of_another(cluster: Cluster) -> None:
    worker = cluster.worker("prefill")
    owner, stranger = (grpc.insecure_channel(worker["address"]) for _ in range(2))
    request = _request("prefill", "mine", {"prompt_ids": [5], "sampling": SANE, "attempt": 1})
    abort = worker_pb2.AbortWork(request_id="mine", attempt=1)
    done = threading.Event()

    def said(*messages: worker_pb2.RouterMessage) -> Iterator[worker_pb2.RouterMessage]:
        yield _hello(worker["id"])
        yield from messages
        done.wait(30.0)

    with owner, stranger:
        held = worker_pb2_grpc.WorkerStub(owner).Session(said(request))
        next(held)
        status = worker_pb2_grpc.WorkerStub(owner)
        ask = worker_pb2.GetStatusRequest()
        wait_for(lambda: status.GetStatus(ask).waiting == 1, "the request")
        other = worker_pb2_grpc.WorkerStub(stranger).Session(
            said(
                worker_pb2.RouterMessage(abort=abort),
                worker_pb2.RouterMessage(ping=worker_pb2.Ping(nonce=9)),
            )
        )
        for message in other:
            if message.WhichOneof("kind") == "pong":
                break
        assert status.GetStatus(ask).waiting == 1
        done.set()
        held.cancel()
        wait_for(lambda: status.GetStatus(ask).waiting == 0, "its end with its session", within_s=1)
    _expect_service(cluster)


def test_a_burst_is_bounded_and_what_was_taken_is_served(cluster: Cluster) -> None:
    answers: list[httpx.Response] = []

    body = {"prompt": [5], "max_tokens": 60, "ignore_eos": True}
    # No connection twice: on a busy machine the door may end an idle one just as it is used again.
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
    with httpx.Client(base_url=cluster.http, timeout=60.0, limits=limits) as client:

        def ask() -> None:
            answers.append(client.post("/v1/completions", json=body))

        threads = [threading.Thread(target=ask) for _ in range(120)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 120
    assert {answer.status_code for answer in answers} <= {200, 429}
    assert sum(answer.status_code == 200 for answer in answers) >= QUEUE
    assert all(a.headers["retry-after"] for a in answers if a.status_code == 429)
    _expect_service(cluster)
