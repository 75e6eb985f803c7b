"""The command line `baton`.

What a user gets wrong ends in one line and status 2, what the machine gets wrong in one line and
status 1; a traceback is a bug. Each command imports what it runs only when it runs, so that
`baton --help` is quick and `baton router` loads no torch.
"""

import asyncio
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Sequence

import click

import baton
from baton.bench.settings import BenchConfig
from baton.chat import ChatConfig, run_chat
from baton.client_access import ClientAccess
from baton.config import (
    ENVIRONMENT_PREFIX,
    Scalar,
    SettingsError,
    fill,
    settings_of,
    unknown_variables,
)
from baton.demo import DEMO_DEFAULTS, DemoConfig, run_demo
from baton.doctor import DoctorConfig, run_doctor
from baton.drain import DrainConfig, run_drain
from baton.errors import RequestError
from baton.health import HealthConfig, run_health
from baton.keys import KeyFile, NewKey, run_add, run_list, run_revoke
from baton.lifetime import live_with_parent
from baton.model_store import find_model
from baton.plan import DECIDED, SECURITY, UpConfig, make_plan
from baton.remote import GenerateConfig, RouterAddress, run_generate, run_ps
from baton.settings_flags import settings_command
from baton.up import run_up
from protos.version import PROTOCOL_VERSION
from router.config import RouterConfig
from worker.config import WorkerConfig

FAILED, MISUSED, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status."""
    live_with_parent()
    try:
        status = cli.main(
            args=None if arguments is None else list(arguments),
            prog_name="baton",
            standalone_mode=False,
        )
        return int(status or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return MISUSED
    except click.ClickException as error:
        return _fail(error.format_message(), MISUSED)
    except SettingsError as error:
        return _fail(str(error), MISUSED)
    except RequestError as error:
        return _fail(str(error), FAILED)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # `baton ps | head` closed our output; Python must not try to flush it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _fail(message: str, status: int) -> int:
    print(f"baton: {' '.join(message.split())}", file=sys.stderr)
    return status


def _prefill(given: dict[str, Scalar]) -> int:
    config = _worker_config(given)
    from prefill_service.main import run

    return run(config)


def _decode(given: dict[str, Scalar]) -> int:
    config = _worker_config(given)
    from decode_service.main import run

    return run(config)


def _unified(given: dict[str, Scalar]) -> int:
    config = _worker_config(given)
    from unified_service.main import run

    return run(config)


def _warmup(given: dict[str, Scalar]) -> int:
    config = _worker_config(given)
    from worker.warmup import run

    return run(config)


def _worker_config(given: dict[str, Scalar]) -> WorkerConfig:
    config = fill(WorkerConfig, given)
    if importlib.util.find_spec("torch") is None:
        raise SettingsError(
            "a worker needs torch, which the client and the router do without: "
            "pip install 'baton-serve[worker]'"
        )
    model = find_model(config.model)
    return dataclasses.replace(
        config,
        model=str(model.path),
        served_model_name=config.served_model_name or model.name,
    )


def _router(given: dict[str, Scalar]) -> int:
    config = fill(RouterConfig, given)
    from router.main import run

    try:
        run(config)
    except OSError as error:
        return _fail(str(error), FAILED)
    return 0


def _up(given: dict[str, Scalar]) -> int:
    return asyncio.run(run_up(make_plan(given)))


def _demo(given: dict[str, Scalar]) -> int:
    return asyncio.run(run_demo(fill(DemoConfig, given), DEMO_DEFAULTS | given))


def _bench(given: dict[str, Scalar]) -> int:
    # Imported here: it needs numpy and an HTTP client.
    from baton.bench.command import run_bench

    return run_bench(given)


@click.command("version", help="Prints Baton's version and its protocol's.")
def _version() -> int:
    print(f"baton {baton.__version__} (protocol {PROTOCOL_VERSION})")
    return 0


@click.group(help="Serves large language models with prefill and decode apart.")
def cli() -> None:
    known = {
        setting.variable
        for setting in settings_of(
            *(UpConfig, RouterConfig, WorkerConfig, DemoConfig),
            *(GenerateConfig, ChatConfig, RouterAddress, HealthConfig, BenchConfig, ClientAccess),
            *(DrainConfig, DoctorConfig, NewKey),
        ).values()
    }
    for name in unknown_variables(os.environ, known):
        print(
            f"baton: {name} is set, but no setting is called "
            f"{name.removeprefix(ENVIRONMENT_PREFIX).lower()}",
            file=sys.stderr,
        )


cli.add_command(
    settings_command(
        "prefill",
        _prefill,
        WorkerConfig,
        help="Runs a prefill worker. It computes prompts and hands their KV to decode workers.",
    )
)
cli.add_command(
    settings_command(
        "decode",
        _decode,
        WorkerConfig,
        help="Runs a decode worker. It takes KV from prefill workers and generates.",
    )
)
cli.add_command(
    settings_command(
        "unified",
        _unified,
        WorkerConfig,
        help="Runs a unified worker. It computes prompts and generates, with no KV to move: what "
        "a machine with one GPU needs.",
    )
)
cli.add_command(
    settings_command(
        "warmup",
        _warmup,
        WorkerConfig,
        help="Builds the kernels that a worker of these settings needs, into --kernel-cache, and "
        "ends. For images and volumes, so that workers start without building.",
    )
)
cli.add_command(
    settings_command(
        "router",
        _router,
        RouterConfig,
        help="Runs the router. It holds the gRPC and HTTP doors and the registry of workers.",
    )
)
cli.add_command(
    settings_command(
        "up",
        _up,
        UpConfig,
        RouterConfig,
        WorkerConfig,
        omit=DECIDED,
        help="Starts router and workers on this machine. Ctrl-C drains and stops them.",
    )
)
cli.add_command(
    settings_command(
        "demo",
        _demo,
        DemoConfig,
        UpConfig,
        RouterConfig,
        WorkerConfig,
        omit=DECIDED | SECURITY,
        help="Shows one request's whole journey. Starts everything on free ports, streams one "
        "answer, prints where its time and its KV went, and stops everything.",
    )
)
cli.add_command(
    settings_command(
        "generate",
        run_generate,
        GenerateConfig,
        ClientAccess,
        arguments=[click.Argument(["prompt"])],
        help="Streams the continuation of PROMPT. '-' reads it from standard input.",
    )
)
cli.add_command(
    settings_command(
        "ps",
        run_ps,
        RouterAddress,
        ClientAccess,
        help="Lists a router's workers, once or live: state, load, pages, transports.",
    )
)
cli.add_command(
    settings_command(
        "drain",
        run_drain,
        DrainConfig,
        ClientAccess,
        arguments=[click.Argument(["worker"])],
        help="Takes WORKER out of service: an id, the beginning of one, or an address. It takes "
        "no new requests, finishes or hands over what runs, and ends.",
    )
)
cli.add_command(
    settings_command(
        "doctor",
        run_doctor,
        DoctorConfig,
        ClientAccess,
        help="Measures the way of KV between a router's workers: transport, GB/s beside a plain "
        "copy over the same link, handshake, and where devices sit. Warns of what is far below "
        "its link; running requests are not disturbed.",
    )
)
cli.add_command(
    settings_command(
        "chat",
        run_chat,
        ChatConfig,
        ClientAccess,
        help="A chat in the terminal. Ctrl-C stops an answer, Ctrl-D leaves.",
    )
)
cli.add_command(
    settings_command(
        "bench",
        _bench,
        BenchConfig,
        ClientAccess,
        help="Puts load on a router's gRPC or HTTP door, or on any server with OpenAI's "
        "completions, and reports latencies, throughput and goodput.",
    )
)
cli.add_command(
    settings_command(
        "health",
        run_health,
        HealthConfig,
        ClientAccess,
        help="Asks a router or a worker whether it serves; the exit status says so. For the health "
        "checks of containers.",
    )
)
keys = click.Group("keys", help="Makes, lists and revokes the API keys that a router asks for.")
keys.add_command(
    settings_command(
        "add",
        run_add,
        NewKey,
        arguments=[click.Argument(["tenant"])],
        help="Makes a key of TENANT and prints it; the file keeps its digest alone.",
    )
)
keys.add_command(settings_command("list", run_list, KeyFile, help="Lists a file's keys."))
keys.add_command(
    settings_command(
        "revoke",
        run_revoke,
        KeyFile,
        arguments=[click.Argument(["id"])],
        help="Has the key of that ID refused.",
    )
)
cli.add_command(keys)
cli.add_command(_version)
