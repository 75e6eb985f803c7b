"""The client library, its documentation and the commands that use it, against real processes."""

import asyncio
import contextlib
import gc
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import baton
from baton.cli import main
from protos.version import PROTOCOL_VERSION
from tests.baton.certificates import Authority
from tests.e2e.cluster import Cluster, running_cluster

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "baton-tiny"
FENCE = re.compile(r"^```(python[^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ADDRESS = "127.0.0.1:50051"
HTTP = "http://127.0.0.1:8000"
"""As documentation writes them."""


def examples(page: str, kind: str) -> list[str]:
    """The code blocks of one kind on a page."""
    blocks = FENCE.findall((ROOT / page).read_text(encoding="utf-8"))
    return [code for found, code in blocks if found == kind]


def run_example(code: str, address: str, directory: Path, *, http: str = HTTP) -> str:
    """Runs it as a user's script would run; what it printed."""
    here = code.replace(ADDRESS, address).replace(HTTP, http)
    assert here != code
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", here],
        cwd=directory,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(MODEL, tmp_path_factory.mktemp("tiny"), "--page-size", "16") as cluster:
        yield cluster


@pytest.mark.parametrize("page", ["docs/client.md", "docs/http.md", "README.md"])
def test_every_python_example_of_a_page_runs(tiny: Cluster, page: str, tmp_path: Path) -> None:
    codes = examples(page, "python")
    assert codes
    for code in codes:
        assert run_example(code, tiny.grpc, tmp_path, http=tiny.http).strip(), (
            f"says nothing:\n{code}"
        )
    tiny.wait_until_balanced()


Leave = Callable[[baton.Client, str], None]


def by_break(client: baton.Client, address: str) -> None:
    for _ in client.generate("Once", max_tokens=1500, ignore_eos=True):
        break


def by_close(client: baton.Client, address: str) -> None:
    stream = client.generate("Once", max_tokens=1500, ignore_eos=True)
    next(stream)
    stream.close()


def by_exception(client: baton.Client, address: str) -> None:
    with (
        contextlib.suppress(ZeroDivisionError),
        client.generate("Once", max_tokens=1500, ignore_eos=True) as stream,
    ):
        next(stream)
        raise ZeroDivisionError


def by_deadline(client: baton.Client, address: str) -> None:
    with pytest.raises(baton.DeadlineExceeded):
        client.complete("Once", max_tokens=1500, ignore_eos=True, timeout=0.2)


def by_abort(client: baton.Client, address: str) -> None:
    stream = client.generate("Once", max_tokens=1500, ignore_eos=True, request_id="to-abort")
    next(stream)
    assert client.abort("to-abort")
    *_, last = stream
    assert last.finish_reason == "abort"


def by_cancelled_task(client: baton.Client, address: str) -> None:
    async def run() -> None:
        async with baton.AsyncClient(address) as twin:
            started = asyncio.Event()

            async def read() -> None:
                async for _ in twin.generate("Once", max_tokens=1500, ignore_eos=True):
                    started.set()

            task = asyncio.create_task(read())
            await started.wait()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(run())


@pytest.mark.parametrize(
    "leave", [by_break, by_close, by_exception, by_deadline, by_abort, by_cancelled_task]
)
def test_whoever_leaves_gives_the_pages_back(tiny: Cluster, leave: Leave) -> None:
    with baton.Client(tiny.grpc) as client:
        leave(client, tiny.grpc)
        gc.collect()
        began = time.monotonic()
        tiny.wait_until_balanced()
        assert time.monotonic() - began < 2.0, "far less than the answer would have taken"
        assert all(worker.running == 0 for worker in client.server_info().workers)


def test_bench_drives_both_doors_with_the_same_requests(tiny: Cluster, tmp_path: Path) -> None:
    flags = ["--concurrency", "4", "--requests", "8", "--length-scale", "0.05"]
    seen: list[list[tuple[int, int]]] = []
    for name, url in (("grpc", f"grpc://{tiny.grpc}"), ("http", tiny.http)):
        target = tmp_path / f"{name}.json"
        assert main(["bench", "--url", url, "--json", str(target), *flags]) == 0
        document = json.loads(target.read_text())
        figures = document["figures"]
        assert (figures["sent"], figures["failed"]) == (8, 0), figures["error_details"]
        assert figures["phases_ms"]["handover"]["p50"] > 0
        assert figures["handover_ms"]["count"] == 8
        requests = document["requests"]
        assert all(len(r["arrivals_s"]) == r["completion_tokens"] for r in requests)
        seen.append([(r["input_length"], r["completion_tokens"]) for r in requests])
    assert seen[0] == seen[1]
    tiny.wait_until_balanced()


def test_bench_replays_a_trace_and_tells_who_kept_to_the_slo(tiny: Cluster, tmp_path: Path) -> None:
    lengths = [(20, 4), (30, 9), (25, 6), (20, 5), (40, 8)]
    entries = [
        {"timestamp": 1000 + 100 * n, "input_length": i, "output_length": o}
        for n, (i, o) in enumerate(lengths)
    ]
    trace, target = tmp_path / "trace.jsonl", tmp_path / "run.json"
    trace.write_text("\n".join(map(json.dumps, entries)))
    files = ["--trace", str(trace), "--json", str(target)]
    slo = ["--slo-ttft-ms", "60000", "--slo-itl-ms", "0.001"]
    assert main(["bench", "--url", f"grpc://{tiny.grpc}", *files, *slo]) == 0
    document = json.loads(target.read_text())
    figures, requests = document["figures"], document["requests"]
    assert (figures["sent"], figures["succeeded"]) == (5, 5)
    assert figures["good"] == 0, "nobody's tokens come within a microsecond"
    assert [(r["input_length"], r["completion_tokens"]) for r in requests] == lengths
    planned = [request["planned_s"] - requests[0]["planned_s"] for request in requests]
    assert planned == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert all(r["sent_s"] > r["planned_s"] - 0.01 for r in requests)
    tiny.wait_until_balanced()


def test_chat_talks_to_the_real_door(tiny: Cluster) -> None:
    command = [sys.executable, "-m", "baton", "chat", "--temperature", "0", "--max-tokens", "8"]
    done = subprocess.run(
        [*command, "--url", tiny.http],
        input="Hello\nAnd?\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert "baton: " not in done.stderr, done.stderr
    assert done.stdout.strip()
    tiny.wait_until_balanced()


def test_ps_shows_a_request_that_runs(tiny: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        baton.Client(tiny.grpc) as client,
        client.generate("Once", max_tokens=1500, ignore_eos=True) as stream,
    ):
        next(stream)
        assert main(["ps", "--router", tiny.grpc]) == 0
        busy = [worker.running for worker in client.server_info().workers]
        assert busy.count(1) == 1
    assert "decode" in capsys.readouterr().out
    tiny.wait_until_balanced()


def test_everything_works_over_mutual_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    server = authority.sign("server", addresses=("127.0.0.1",))
    clients = Authority(tmp_path, "clients-ca")
    visitor = clients.sign("visitor")
    (tmp_path / "client.pem").write_bytes(visitor.certificate.read_bytes())
    (tmp_path / "client-key.pem").write_bytes(visitor.key.read_bytes())
    flags = ("--tls-cert", str(server.certificate), "--tls-key", str(server.key))
    flags += ("--tls-ca", str(authority.certificate), "--workers-port", "0")
    flags += ("--tls-client-ca", str(clients.certificate))
    with (tmp_path / "up.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "baton", "up", "--model", str(MODEL), "--device", "cpu",
             "--http-port", "0", "--grpc-port", "0", *flags],
            stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, cwd=ROOT,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        found = re.search(r"ready: https://(\S+)/v1  grpcs://(\S+)", ready)
        assert found is not None, (ready, (tmp_path / "up.log").read_text()[-3000:])
        http, grpc = found.groups()
        (example,) = examples("docs/client.md", "python tls")
        assert run_example(example, grpc, tmp_path).strip()
        trusted = ["--tls-root-ca", str(authority.certificate)]
        trusted += ["--tls-client-cert", str(visitor.certificate)]
        trusted += ["--tls-client-key", str(visitor.key)]
        load = ["--concurrency", "1", "--requests", "2", "--input-length", "8"]
        load += ["--output-length", "4"]
        for url in (f"grpcs://{grpc}", f"https://{http}"):
            assert main(["bench", "--url", url, *load, *trusted]) == 0
        with pytest.raises(baton.Unavailable), baton.Client(grpc) as client:
            client.models(timeout=5.0)
    finally:
        process.terminate()
        process.wait(timeout=30)
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def part(directory: Path, command: str, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """One process of a deployment that is started by hand."""
    with (directory / f"{command}.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "baton", command, *flags],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_for_pair(client: baton.Client) -> None:
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        with contextlib.suppress(baton.Unavailable):
            if [w.state for w in client.server_info(timeout=5.0).workers] == ["ready"] * 2:
                client.complete([5], max_tokens=2, timeout=5.0)  # their KV session stands, too
                return
        time.sleep(0.1)
    raise AssertionError("no pair of workers registered")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_router_that_is_restarted_is_found_again(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    router_flags = ("--grpc-port", address.rpartition(":")[2], "--http-port", "0")
    worker_flags = ("--model", str(MODEL), "--device", "cpu", "--router", address)
    with (
        contextlib.ExitStack() as routers,
        part(tmp_path, "prefill", *worker_flags),
        part(tmp_path, "decode", *worker_flags),
        baton.Client(address) as client,
    ):
        router = routers.enter_context(part(tmp_path, "router", *router_flags))
        wait_for_pair(client)
        before = client.complete([5, 6, 7], max_tokens=6, temperature=0, ignore_eos=True)
        stream = client.generate([5, 6, 7], max_tokens=1500, ignore_eos=True)
        next(stream)
        router.kill()
        with pytest.raises(baton.Unavailable):
            for _ in stream:
                pass
        with pytest.raises(baton.Unavailable):
            client.complete([5, 6, 7], max_tokens=6, timeout=0.5)
        routers.enter_context(part(tmp_path, "router", *router_flags))
        # The very next call waits for the connection; only workers may still be on their way.
        assert client.server_info(timeout=30.0).protocol_version == PROTOCOL_VERSION
        wait_for_pair(client)
        after = client.complete([5, 6, 7], max_tokens=6, temperature=0, ignore_eos=True)
        assert after.token_ids == before.token_ids
        deadline = time.monotonic() + 10.0
        while any(w.pages["in_use"] + w.pages["held"] for w in client.server_info().workers):
            assert time.monotonic() < deadline, "pages of the cut stream are still owned"
            time.sleep(0.05)
