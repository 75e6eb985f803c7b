"""`baton demo`: the whole path in one command, and what it did in one table."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from baton.aio import AsyncClient
from baton.config import Scalar
from baton.messages import Chunk
from baton.plan import Plan, make_plan
from baton.tables import journey_table, show
from baton.up import Deployment, StartError

DEMO_DEFAULTS: Final[dict[str, Scalar]] = {
    # Free ports, so that the demo runs beside whatever else does.
    "http_port": 0,
    "grpc_port": 0,
    # Small pages and chunks, so that a short prompt fills several of each.
    "page_size": 16,
    "chunked_prefill_size": 128,
    "max_total_tokens": 16384,
}

PROMPT = '''\
"""A small least-recently-used cache."""

from collections import OrderedDict


class LRUCache:
    """Keeps the most recently used items, up to a capacity."""

    def __init__(self, capacity):
        if capacity < 1:
            raise ValueError("capacity must be positive")
        self.capacity = capacity
        self.items = OrderedDict()

    def get(self, key, default=None):
        """Returns the value of a key and marks it as used."""
        if key not in self.items:
            return default
        self.items.move_to_end(key)
        return self.items[key]

    def put(self, key, value):
        """Stores a value; the item unused for longest makes room for it."""
        if key in self.items:
            self.items.move_to_end(key)
        self.items[key] = value
        if len(self.items) > self.capacity:
            self.items.popitem(last=False)

    def __len__(self):
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Settings of the demonstration itself."""

    prompt: str = ""
    """Text to continue. Empty: a piece of Python."""

    max_tokens: int = 96
    """Tokens to produce."""

    temperature: float = 0.0
    """0 is greedy."""

    verbose: bool = False
    """Show the log of every process."""


async def run_demo(config: DemoConfig, given: Mapping[str, Scalar]) -> int:
    """Starts everything, streams one answer, shows its journey, stops everything.

    Returns:
        0; 1 where something failed; 130 after Ctrl-C.
    """
    plan = make_plan(given)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    demo = asyncio.create_task(_run(config, plan))
    stop_asked = asyncio.create_task(stopping.wait())
    await asyncio.wait({demo, stop_asked}, return_when=asyncio.FIRST_COMPLETED)
    stop_asked.cancel()
    if demo.done():
        return demo.result()
    # Leaving the deployment's context on the way out stops its processes.
    demo.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await demo
    return 130


async def _run(config: DemoConfig, plan: Plan) -> int:
    prompt = config.prompt or PROMPT
    if plan.model.is_random:
        _say(f"model: {plan.model.name}, RANDOM weights (the text below is noise)")
    else:
        _say(f"model: {plan.model.name}, {plan.model.path}")
    log = StartLog(verbose=config.verbose)
    try:
        async with Deployment(plan, say=_say, on_line=log) as deployment:
            ready = await deployment.start()
            log.started()
            _say(ready.line())
            last = await _stream(ready.grpc_address, prompt, config)
        _say("stopped; nothing is left running")
    except StartError as error:
        _say(str(error))
        return 1
    if last.report is None or last.usage is None:
        _say("the router sent no report")
        return 1
    print(flush=True)
    show(journey_table(last.report, last.usage))
    return 0


async def _stream(address: str, prompt: str, config: DemoConfig) -> Chunk:
    """Prints the prompt, and its continuation as it comes; the last chunk."""
    last = Chunk(request_id="")
    print(prompt, end="", flush=True)
    async with (
        AsyncClient(address) as client,
        client.generate(
            prompt,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            ignore_eos=True,
            timeout=300.0,
        ) as stream,
    ):
        async for chunk in stream:
            print(chunk.text, end="", flush=True)
            last = chunk
    print(flush=True)
    return last


class StartLog:
    """Shows the processes' lines while they start; afterwards, standard error is for trouble."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose
        self._starting = True

    def started(self) -> None:
        self._starting = False

    def __call__(self, name: str, line: str) -> None:
        if self._verbose or self._starting:
            print(f"[{name}] {line}", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    print(f"baton: {text}", file=sys.stderr, flush=True)
