"""Tables for people: a request's journey, a router's workers."""

from collections.abc import Collection, Sequence

from rich.console import Console, JustifyMethod
from rich.table import Table

from baton.messages import Report, ServerInfo, Usage, Worker
from protos.baton.v1 import worker_pb2
from router.api_keys import LIMITS, ApiKey

TTFT_PARTS = ("admission", "reserve", "queue", "prefill", "network")
HANDOVER_PARTS = ("transfer_tail", "verify", "join", "first_decode_step", "handover_network")
COUNTS = ("running", "waiting", "free", "cached", "held", "in use", "pages")
WORKER_COLUMNS = (
    *("worker", "role", "state", "address", "pid", "engine", "transports"),
    *COUNTS,
    "why",
)
LEAST_TOLD = (
    "engine",
    "pid",
    "transports",
    "role",
    "address",
    "held",
    "cached",
    "free",
    "in use",
    "pages",
)
"""Columns of workers, those first that a narrow terminal misses least; a worker's id begins with
its role."""
WHY_WIDTH = 24
"""A longer reason is wrapped."""
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def journey_table(report: Report, usage: Usage) -> Table:
    """Where a request's time went, what moved its KV, and who served it."""
    table = Table(title="one request, end to end", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    for total, parts in (("ttft", TTFT_PARTS), ("handover", HANDOVER_PARTS)):
        table.add_row(f"{total} (ms)", f"{report.phases_ms.get(total, 0.0):.2f}", style="bold")
        for part in parts:
            label = part.removeprefix("handover_").replace("_", " ")
            table.add_row(f"  {label}", f"{report.phases_ms.get(part, 0.0):.2f}")
        table.add_section()
    table.add_row("KV moved", byte_size(report.kv_bytes), style="bold")
    table.add_row("transport", report.transport, style="bold")
    table.add_row("prefill worker", report.prefill_worker)
    table.add_row("decode worker", report.decode_worker)
    table.add_section()
    table.add_row("prompt tokens", str(usage.prompt_tokens))
    table.add_row("  of a cached prefix", str(usage.cached_tokens))
    table.add_row("completion tokens", str(usage.completion_tokens))
    return table


def keys_table(keys: Sequence[ApiKey]) -> Table:
    """A file's keys, one a row."""
    table = Table()
    for heading in ("id", "tenant", "note", "state", "prefix group", "rights", "limits"):
        table.add_column(heading)
    for key in keys:
        limits = [f"{name} {getattr(key, name)}" for name in LIMITS if getattr(key, name)]
        table.add_row(
            key.id,
            key.tenant,
            key.note,
            "revoked" if key.revoked else "valid",
            key.prefix_group,
            "operator" if key.operator else "",
            ", ".join(limits),
        )
    return table


def workers_table(info: ServerInfo, *, without: Collection[str] = ()) -> Table:
    """A router's workers, one a row; `without`: columns to leave out."""
    table = Table(title=f"baton {info.version}, protocol {info.protocol_version}, {source(info)}")
    rows = [_told_of(worker) for worker in info.workers]
    left_out = {*without, *(() if any(map(why, info.workers)) else ("why",))}
    headings = [heading for heading in WORKER_COLUMNS if heading not in left_out]
    for heading in headings:
        justify: JustifyMethod = "right" if heading in COUNTS else "left"
        widest = WHY_WIDTH if heading == "why" else None
        table.add_column(heading, justify=justify, max_width=widest)
    for row in rows:
        table.add_row(*(row[heading] for heading in headings))
    table.caption = info.registry.problem or None
    return table


def _told_of(worker: Worker) -> dict[str, str]:
    pages = worker.pages
    return {
        "worker": worker.id,
        "role": worker.role,
        "state": worker.state,
        "address": worker.address,
        "pid": str(worker.pid),
        "engine": " ".join(map(str, worker.engine_pids)),
        "transports": " ".join(worker.transports),
        "running": str(worker.running),
        "waiting": str(worker.waiting),
        "free": str(pages["free"]),
        "cached": str(pages["cached"]),
        "held": str(pages["held"]),
        "in use": str(pages["in_use"]),
        "pages": str(pages["total"]),
        "why": why(worker),
    }


def narrower_workers_tables(info: ServerInfo) -> list[Table]:
    """The same for terminals that are not wide enough: what tells least is left out first."""
    return [workers_table(info, without=LEAST_TOLD[: n + 1]) for n in range(len(LEAST_TOLD))]


def doctor_table(reports: Sequence[worker_pb2.ProbeReport]) -> Table:
    """The way of KV between each two workers, as it was measured."""
    table = Table(title="KV links")
    for heading in ("from", "to", "transport", "devices"):
        table.add_column(heading)
    for heading in ("probe", "GB/s", "plain copy", "network", "connect ms", "round trip ms"):
        table.add_column(heading, justify="right")
    for report in reports:
        devices = f"{report.prefill_device} → {report.decode_device}"
        rates = (report.copy_gigabytes_per_s, report.network_gigabytes_per_s)
        table.add_row(
            report.prefill_instance,
            report.decode_instance,
            report.transport or "none",
            devices if report.decode_device else report.prefill_device,
            f"{report.bytes / 2**20:.1f} MiB",
            f"{report.gigabytes_per_s:.2f}",
            *(f"{rate:.2f}" if rate else "" for rate in rates),
            f"{report.connect_ms:.1f}",
            f"{report.round_trip_ms:.2f}",
        )
    return table


def source(info: ServerInfo) -> str:
    """Which router tells this, and where it has the list of workers from."""
    registry = info.registry
    if registry.up:
        return f"{info.router_id}, registry {registry.kind}"
    age = f"{registry.last_sync_age_s:.0f} s ago"
    return f"{info.router_id}, registry {registry.kind} DOWN, last seen {age}"


def why(worker: Worker) -> str:
    """Why a worker gets no requests, and since when nobody heard it."""
    if worker.state == "lost":
        return f"{worker.reason} (silent for {worker.silent_s:.0f} s)"
    return worker.reason


def byte_size(count: int) -> str:
    """1536 → '1.5 KiB (1,536 bytes)'."""
    size = float(count)
    unit = 0
    while size >= 1024 and unit < len(UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{count:,} bytes" if unit == 0 else f"{size:.1f} {UNITS[unit]} ({count:,} bytes)"


def show(table: Table, *narrower: Table, stderr: bool = False) -> None:
    """Prints a table; into a pipe or file, wide enough that no cell is cut. On a terminal that is
    not wide enough for it, the first of `narrower` that fits."""
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console = Console(stderr=stderr, width=200)
    console.print(fitting(console, table, *narrower))


def fitting(console: Console, *tables: Table) -> Table:
    """The first table that fits without a cell being cut, else the last."""
    unbounded = console.options.update(max_width=1000)
    for table in tables:
        if console.measure(table, options=unbounded).maximum <= console.width:
            return table
    return tables[-1]
