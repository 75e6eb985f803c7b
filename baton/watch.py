"""`baton ps --watch`: the workers, live."""

import time
from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from baton.client import Client
from baton.errors import RequestError
from baton.messages import ServerInfo, Worker
from baton.tables import source, why

BAR_CELLS = 24
PAGE_STATES = (
    ("in_use", "green"),
    ("held", "yellow"),
    ("cached", "cyan"),
    ("free", "bright_black"),
)
STATE_STYLES = {"ready": "green", "draining": "yellow", "lost": "red", "incompatible": "red"}
PIPE_WIDTH = 160


def watch_workers(client: Client, *, interval_s: float, timeout_s: float) -> None:
    """Shows the workers anew every `interval_s` until Ctrl-C; a router that is away is shown, too.

    Into a pipe, one table after another.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    try:
        with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
            while True:
                view = _look(client, timeout_s=timeout_s)
                if console.is_terminal:
                    live.update(view, refresh=True)
                else:
                    console.print(view)
                time.sleep(interval_s)
    except KeyboardInterrupt:
        # The only way to leave, hence no failure.
        return


def _look(client: Client, *, timeout_s: float) -> RenderableType:
    now = f"{datetime.now():%H:%M:%S}"
    try:
        info = client.server_info(timeout=timeout_s)
    except RequestError as error:
        return Text(f"{now}  {' '.join(str(error).split())}", style="red")
    return Group(live_table(info, now=now), _legend())


def live_table(info: ServerInfo, *, now: str) -> Table:
    """Each worker's state, load and pages at one moment."""
    title = f"baton {info.version}  {source(info)}  {now}  Ctrl-C leaves"
    table = Table(title=title, title_justify="left")
    for heading in ("worker", "role", "state"):
        table.add_column(heading, no_wrap=True)
    for heading in ("running", "waiting"):
        table.add_column(heading, justify="right")
    table.add_column("pages", no_wrap=True)
    for name, _ in PAGE_STATES:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("total", justify="right")
    table.add_column("transports")
    unwell = any(why(worker) for worker in info.workers)
    if unwell:
        table.add_column("why")
    for worker in sorted(info.workers, key=lambda w: (w.role != "prefill", w.role, w.id)):
        table.add_row(
            worker.id,
            worker.role,
            Text(worker.state, style=STATE_STYLES.get(worker.state, "")),
            f"{worker.running}",
            f"{worker.waiting}",
            page_bar(worker),
            *(f"{worker.pages[name]}" for name, _ in PAGE_STATES),
            f"{worker.pages['total']}",
            " ".join(worker.transports),
            *([why(worker)] if unwell else []),
        )
    table.caption = info.registry.problem or (None if info.workers else "no worker is known")
    return table


def page_bar(worker: Worker) -> Text:
    """The worker's pages as a bar; a state with any page shows at least one cell."""
    total = worker.pages["total"]
    bar = Text()
    if not total:
        return bar
    used = 0
    for name, style in PAGE_STATES[:-1]:
        count = worker.pages[name]
        cells = min(max(1, round(BAR_CELLS * count / total)), BAR_CELLS - used) if count else 0
        bar.append("█" * cells, style=style)
        used += cells
    bar.append("░" * (BAR_CELLS - used), style=PAGE_STATES[-1][1])
    return bar


def _legend() -> Text:
    legend = Text("pages: ")
    for name, style in PAGE_STATES:
        legend.append(f"■ {name.replace('_', ' ')}  ", style=style)
    return legend
