"""`baton ps --watch`: the workers, live."""

import time
from collections.abc import Collection
from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from baton.client import Client
from baton.errors import RequestError
from baton.messages import ServerInfo, Worker
from baton.tables import WHY_WIDTH, fitting, source, why

BAR_CELLS = 24
PAGE_STATES = (
    ("in_use", "green"),
    ("held", "yellow"),
    ("cached", "cyan"),
    ("free", "bright_black"),
)
STATE_STYLES = {"ready": "green", "draining": "yellow", "lost": "red", "incompatible": "red"}
COUNTS = ("running", "waiting", "in use", "held", "cached", "free", "total")
COLUMNS = (
    *("worker", "role", "state", "running", "waiting", "pages"),
    *("in use", "held", "cached", "free", "total", "transports", "why"),
)
LEAST_TOLD = ("transports", "role", "held", "cached", "free", "in use", "total", "pages")
"""Columns that a narrow terminal misses least, those first; the bar, "pages", shows what the counts
before it say."""
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
                view = _look(client, console, timeout_s=timeout_s)
                if console.is_terminal:
                    live.update(view, refresh=True)
                else:
                    console.print(view)
                time.sleep(interval_s)
    except KeyboardInterrupt:
        # The only way to leave, hence no failure.
        return


def _look(client: Client, console: Console, *, timeout_s: float) -> RenderableType:
    now = f"{datetime.now():%H:%M:%S}"
    try:
        info = client.server_info(timeout=timeout_s)
    except RequestError as error:
        return Text(f"{now}  {' '.join(str(error).split())}", style="red")
    return Group(fitting(console, *live_tables(info, now=now)), _legend())


def live_tables(info: ServerInfo, *, now: str) -> list[Table]:
    """Each worker's state, load and pages at one moment, told more and more narrowly."""
    cuts = range(len(LEAST_TOLD) + 1)
    return [_live_table(info, now=now, without=LEAST_TOLD[:cut]) for cut in cuts]


def _live_table(info: ServerInfo, *, now: str, without: Collection[str]) -> Table:
    title = f"baton {info.version}  {source(info)}  {now}  Ctrl-C leaves"
    table = Table(title=title, title_justify="left")
    left_out = {*without, *(() if any(map(why, info.workers)) else ("why",))}
    workers = sorted(info.workers, key=lambda w: (w.role != "prefill", w.role, w.id))
    rows = [_told_of(worker) for worker in workers]
    headings = [heading for heading in COLUMNS if heading not in left_out]
    for heading in headings:
        if heading in COUNTS:
            table.add_column(heading, justify="right")
        elif heading == "why":
            table.add_column(heading, max_width=WHY_WIDTH)
        else:
            table.add_column(heading, no_wrap=True)
    for row in rows:
        table.add_row(*(row[heading] for heading in headings))
    table.caption = info.registry.problem or (None if info.workers else "no worker is known")
    return table


def _told_of(worker: Worker) -> dict[str, str | Text]:
    counts = {name.replace("_", " "): f"{worker.pages[name]}" for name, _ in PAGE_STATES}
    return {
        "worker": worker.id,
        "role": worker.role,
        "state": Text(worker.state, style=STATE_STYLES.get(worker.state, "")),
        "running": f"{worker.running}",
        "waiting": f"{worker.waiting}",
        "pages": page_bar(worker),
        **counts,
        "total": f"{worker.pages['total']}",
        "transports": " ".join(worker.transports),
        "why": why(worker),
    }


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
