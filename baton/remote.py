"""`baton generate` and `baton ps`: commands that talk to a running router."""

import sys
from dataclasses import dataclass

from baton.client import Client
from baton.config import Scalar, SettingsError, fill
from baton.messages import RequestOptions
from baton.tables import journey_table, show, workers_table


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterAddress:
    """Where the router is."""

    router: str = "127.0.0.1:50051"
    """host:port of the router's gRPC server."""

    timeout_s: float = 10.0
    """Longest the call may take. Seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """One request from the command line."""

    router: str = "127.0.0.1:50051"
    """host:port of the router's gRPC server."""

    max_tokens: int = 128
    """Most tokens to produce."""

    temperature: float = 0.0
    """0 is greedy."""

    top_p: float = 1.0
    """Smallest set of most likely tokens whose probability reaches this."""

    top_k: int = 0
    """Number of most likely tokens kept; 0: all."""

    seed: str = ""
    """The same seed draws the same tokens; empty: the router draws one."""

    ignore_eos: bool = False
    """Go on past the model's end-of-sequence token."""

    request_timeout_s: float = 600.0
    """Longest the whole answer may take. Seconds."""

    report: bool = False
    """Afterwards, show the request's journey on standard error."""


def run_generate(given: dict[str, Scalar]) -> int:
    """Streams one answer to standard output."""
    config = fill(GenerateConfig, given)
    prompt = str(given["prompt"])
    if prompt == "-":
        prompt = sys.stdin.read()
    if config.seed and not config.seed.isdigit():
        raise SettingsError(f"flag --seed: seed must be a whole number, not {config.seed!r}")
    options: RequestOptions = {
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "seed": int(config.seed) if config.seed else None,
        "ignore_eos": config.ignore_eos,
    }
    with (
        Client(config.router) as client,
        client.generate(prompt, timeout=config.request_timeout_s, **options) as stream,
    ):
        for chunk in stream:
            print(chunk.text, end="", flush=True)
            if chunk.finish_reason is not None:
                print(flush=True)
            if config.report and chunk.report is not None and chunk.usage is not None:
                show(journey_table(chunk.report, chunk.usage), stderr=True)
    return 0


def run_ps(given: dict[str, Scalar]) -> int:
    """Prints the router's workers."""
    config = fill(RouterAddress, given)
    with Client(config.router) as client:
        show(workers_table(client.server_info(timeout=config.timeout_s)))
    return 0
