"""`baton generate` and `baton ps`: commands that talk to a running router."""

import sys
from dataclasses import dataclass
from pathlib import Path

from baton.client import Client
from baton.client_access import ClientAccess
from baton.config import Scalar, SettingsError, fill
from baton.options import RequestOptions
from baton.tables import journey_table, narrower_workers_tables, show, workers_table
from baton.watch import watch_workers


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterAddress:
    """Where the router is."""

    router: str = "127.0.0.1:50051"
    """host:port of the router's gRPC server."""

    timeout_s: float = 10.0
    """Longest the call may take. Seconds."""

    watch: bool = False
    """Show the workers live until Ctrl-C."""

    interval_s: float = 1.0
    """Time between two looks with watch. Seconds."""

    def __post_init__(self) -> None:
        for name in ("timeout_s", "interval_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")


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

    min_p: float = 0.0
    """Drop tokens less likely than this times the most likely one; 0: none."""

    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen before; 1: none."""

    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the output holds; -2 to 2."""

    frequency_penalty: float = 0.0
    """Subtracted once for each time the output holds the token; -2 to 2."""

    min_tokens: int = 0
    """End-of-sequence tokens are not drawn before this many tokens."""

    stop: str = ""
    """Text that ends the output and is not part of it; empty: none."""

    json_schema: str = ""
    """A JSON schema that the output is held to; @FILE reads it from a file. Empty: none."""

    regex: str = ""
    """A regular expression that the whole output matches. Empty: none."""

    ebnf: str = ""
    """A grammar whose rule `root` the output belongs to; @FILE reads a file. Empty: none."""

    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

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
    config, access = fill(GenerateConfig, given), fill(ClientAccess, given)
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
        "min_p": config.min_p,
        "repetition_penalty": config.repetition_penalty,
        "presence_penalty": config.presence_penalty,
        "frequency_penalty": config.frequency_penalty,
        "min_tokens": config.min_tokens,
        "stop": [config.stop] if config.stop else [],
        "skip_special_tokens": config.skip_special_tokens,
        "seed": int(config.seed) if config.seed else None,
        "ignore_eos": config.ignore_eos,
    }
    if config.json_schema:
        options["json_schema"] = _text_or_file("json-schema", config.json_schema)
    if config.regex:
        options["regex"] = config.regex
    if config.ebnf:
        options["ebnf"] = _text_or_file("ebnf", config.ebnf)
    with (
        Client(config.router, config=access.connection(config.router)) as client,
        client.generate(prompt, timeout=config.request_timeout_s, **options) as stream,
    ):
        for chunk in stream:
            print(chunk.text, end="", flush=True)
            if chunk.finish_reason is not None:
                print(flush=True)
            if config.report and chunk.report is not None and chunk.usage is not None:
                show(journey_table(chunk.report, chunk.usage), stderr=True)
    return 0


def _text_or_file(flag: str, value: str) -> str:
    """The value itself, or the content of the file that it names with an @."""
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"flag --{flag}: {value[1:]} cannot be read: {error}") from error


def run_ps(given: dict[str, Scalar]) -> int:
    """Prints the router's workers, once or live."""
    config, access = fill(RouterAddress, given), fill(ClientAccess, given)
    with Client(config.router, config=access.connection(config.router)) as client:
        if config.watch:
            watch_workers(client, interval_s=config.interval_s, timeout_s=config.timeout_s)
        else:
            info = client.server_info(timeout=config.timeout_s)
            show(workers_table(info), *narrower_workers_tables(info))
    return 0
