"""`baton chat`: a conversation in the terminal, over the HTTP door's chat completions."""

import contextlib
import json
import sys
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from baton.client_access import ClientAccess
from baton.config import Scalar, fill
from baton.errors import Unavailable

PROMPT = "> "
HELP = "/reset forgets the conversation; Ctrl-C stops an answer; Ctrl-D or /exit leaves"
LEAVE = ("/exit", "/quit", "/bye")
"""As other chats in terminals call it."""
DATA, DONE = "data:", "[DONE]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig:
    """A conversation from the command line."""

    url: str = "http://127.0.0.1:8000"
    """The router's HTTP door."""

    model: str = ""
    """Model to talk to; empty: the one served."""

    system: str = ""
    """What the model is told before the conversation; empty: nothing."""

    max_tokens: int = 512
    """Most tokens of one answer."""

    temperature: float = 0.7
    """0 is greedy."""

    top_p: float = 1.0
    """Smallest set of most likely tokens whose probability reaches this."""

    request_timeout_s: float = 600.0
    """Longest silence of the router within an answer. Seconds."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, not {self.url}")
        if not self.request_timeout_s > 0:
            raise ValueError(f"request_timeout_s must be above 0, not {self.request_timeout_s}")


class ChatError(Exception):
    """The router refused a turn, or was lost; the conversation goes on without that turn."""


class Conversation:
    """The messages so far, and the door that continues them."""

    def __init__(self, config: ChatConfig, access: ClientAccess) -> None:
        # Imported here, so that other commands start without it.
        import httpx

        self._config = config
        self._errors = httpx.HTTPError
        context = access.ssl_context(config.url)
        self._client = httpx.Client(
            base_url=config.url.rstrip("/").removesuffix("/v1"),
            timeout=config.request_timeout_s,
            headers=access.http_headers(),
            verify=True if context is None else context,
        )
        self._model = config.model
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system's message."""
        system = self._config.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def model(self) -> str:
        """The model that answers.

        Raises:
            Unavailable: the router is out of reach, or serves nothing yet.
        """
        if not self._model:
            try:
                response = self._client.get("/v1/models")
                response.raise_for_status()
                self._model = str(response.json()["data"][0]["id"])
            except (self._errors, LookupError, TypeError, ValueError) as error:
                raise Unavailable(f"{self._config.url}: no model is served: {error}") from error
        return self._model

    def say(self, text: str) -> Generator[str, None, None]:
        """The answer to one message, piece by piece.

        An answer that is left early stays in the conversation as far as it came, since that is
        what the user has seen. A turn that fails is forgotten.

        Raises:
            ChatError: the router refused the turn or was lost.
        """
        self.messages.append({"role": "user", "content": text})
        answer: list[str] = []
        try:
            for piece in self._stream():
                answer.append(piece)
                yield piece
        except (ChatError, self._errors, KeyError, ValueError) as error:
            self.messages.pop()
            raise ChatError(str(error) or type(error).__name__) from error
        except BaseException:
            self._answered(answer)
            raise
        self._answered(answer)

    def close(self) -> None:
        self._client.close()

    def _answered(self, pieces: list[str]) -> None:
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _stream(self) -> Generator[str, None, None]:
        config = self._config
        body = {
            "model": self.model(),
            "messages": self.messages,
            "max_tokens": config.max_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "stream": True,
        }
        # Leaving the block early closes the connection, which ends the request on every worker.
        with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise ChatError(_message(response.text) or f"HTTP {response.status_code}")
            for line in response.iter_lines():
                if not line.startswith(DATA):
                    continue
                data = line[len(DATA) :].strip()
                if data == DONE:
                    return
                event = json.loads(data)
                if "error" in event:
                    raise ChatError(str(event["error"].get("message")))
                for choice in event["choices"]:
                    if choice["delta"].get("content"):
                        yield choice["delta"]["content"]
        raise ChatError("the answer was cut off")


def run_chat(given: dict[str, Scalar]) -> int:
    """Talks until Ctrl-D.

    Raises:
        SettingsError: a setting cannot be used.
        Unavailable: the router is out of reach.
    """
    config, access = fill(ChatConfig, given), fill(ClientAccess, given)
    with contextlib.closing(Conversation(config, access)) as conversation:
        print(f"{conversation.model()}: {HELP}", file=sys.stderr)
        while (text := _read_line()) is not None:
            if text == "/reset":
                conversation.reset()
                print("forgotten", file=sys.stderr)
            elif text in LEAVE:
                return 0
            elif text == "/help":
                print(HELP, file=sys.stderr)
            elif text.startswith("/"):
                print(f"no such command: {text.split()[0]}; {HELP}", file=sys.stderr)
            elif text:
                _answer(conversation, text)
    return 0


def _answer(conversation: Conversation, text: str) -> None:
    with contextlib.closing(conversation.say(text)) as pieces:
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
            print(flush=True)
        except KeyboardInterrupt:
            print(flush=True)
            print("stopped", file=sys.stderr)
        except ChatError as error:
            print(flush=True)
            print(f"baton: {' '.join(str(error).split())}", file=sys.stderr)


def _read_line() -> str | None:
    """One line from the user; empty after Ctrl-C, None after Ctrl-D."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            # Gives input() editing and a history.
            import readline  # noqa: F401
    try:
        return input(PROMPT if sys.stdin.isatty() else "").strip()
    except KeyboardInterrupt:
        print()
        return ""
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None


def _message(text: str) -> str:
    """The message of OpenAI's error object, where the text is one."""
    try:
        body: Any = json.loads(text)
        return str(body["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return text[:300]
