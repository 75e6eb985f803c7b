"""`baton chat` against a scripted server that speaks OpenAI's chat completions."""

import http.server
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.cli import main

ROOT = Path(__file__).resolve().parents[2]


class ChatHandler(http.server.BaseHTTPRequestHandler):
    """Says the number of messages it got, in two pieces; 'refuse', 'cut' and 'endless' do so."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._head(200, "application/json")
        self.wfile.write(b'{"data": [{"id": "parrot"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)  # type: ignore[attr-defined]
        said = body["messages"][-1]["content"]
        if said == "refuse":
            self._head(429, "application/json")
            self.wfile.write(b'{"error": {"message": "come back later"}}')
            return
        self._head(200, "text/event-stream")
        self._event({"role": "assistant", "content": ""})
        self._event({"content": f"{len(body['messages'])} "})
        try:
            while said == "endless":
                self._event({"content": "la "})
        except OSError:
            self.server.gone.set()  # type: ignore[attr-defined]
            return
        if said == "cut":
            return
        self._event({"content": "messages"})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, delta: dict[str, str]) -> None:
        data = json.dumps({"choices": [{"index": 0, "delta": delta}]})
        self.wfile.write(f"data: {data}\n\n".encode())

    def _head(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")
        self.end_headers()


class ChatServer(http.server.ThreadingHTTPServer):
    bodies: list[dict[str, object]]
    gone: threading.Event


@pytest.fixture
def server() -> Iterator[ChatServer]:
    server = ChatServer(("127.0.0.1", 0), ChatHandler)
    server.bodies, server.gone = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def talk(server: ChatServer, monkeypatch: pytest.MonkeyPatch, said: str, *flags: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    return main(["chat", "--url", f"http://127.0.0.1:{server.server_port}", *flags])


def test_the_conversation_is_kept_and_reset(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(server, monkeypatch, "a\n\nb\n/reset\nc\n", "--system", "be brief") == 0
    assert capsys.readouterr().out == "2 messages\n4 messages\n2 messages\n"
    assert server.bodies[1]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "2 messages"},
        {"role": "user", "content": "b"},
    ]
    assert server.bodies[2]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "c"},
    ]


@pytest.mark.parametrize("word", ["/exit", "/quit", "/bye"])
def test_a_word_leaves_and_help_is_told(
    server: ChatServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    word: str,
) -> None:
    assert talk(server, monkeypatch, f"/help\n{word}\nnot said\n") == 0
    assert not server.bodies
    assert "/reset forgets" in capsys.readouterr().err.splitlines()[1]


@pytest.mark.parametrize(
    ("said", "message"), [("refuse", "come back later"), ("cut", "the answer was cut off")]
)
def test_a_turn_that_fails_is_told_and_forgotten(
    server: ChatServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    said: str,
    message: str,
) -> None:
    assert talk(server, monkeypatch, f"{said}\nb\n") == 0
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out.endswith("1 messages\n")
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "b"}]


def test_an_unknown_command_is_no_message(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(server, monkeypatch, "/dance\n") == 0
    assert "no such command: /dance" in capsys.readouterr().err
    assert not server.bodies


def test_an_absent_server_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:1"]) == 1
    assert "no model is served" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_the_talk_goes_on(server: ChatServer) -> None:
    command = [sys.executable, "-m", "baton", "chat"]
    with subprocess.Popen(
        [*command, "--url", f"http://127.0.0.1:{server.server_port}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write("endless\n")
        process.stdin.flush()
        assert process.stdout.read(10) == "1 la la la"
        process.send_signal(signal.SIGINT)
        while "stopped" not in process.stderr.readline():
            pass
        assert server.gone.wait(10.0), "the server notices that nobody listens"
        process.stdin.write("b\n")
        process.stdin.close()
        assert process.stdout.read().endswith("3 messages\n")
        assert process.wait(timeout=10) == 0
