"""What continuous integration ran: a table of its suites, every skip and why, and one closing line.

Reads what each suite's test runner printed (.ci/log), so every number is the runner's own. The
exit status says whether all suites passed.

Usage: python3 .ci/summary.py SECONDS
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

LOGS = Path(__file__).resolve().parent / "log"
CLOSING = re.compile(r"^=+ (.*\d+ \w+.*) in [\d.]+s.*=+$", flags=re.MULTILINE)
COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|deselected)")
TIME_IS_OVER = 124
"""What `timeout` ends with where it had to end the suite."""
SHOWN = ("passed", "failed", "error", "skipped")


@dataclass
class Suite:
    """One make target and how it went."""

    name: str
    left_out: str = ""
    """Why it did not run; empty: it did."""
    status: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    flaky: list[str] = field(default_factory=list)
    """Tests that failed once and passed when they were tried again."""
    skips: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        if self.left_out:
            return f"left out: {self.left_out}"
        if self.status == 0:
            return "passed"
        if self.status == TIME_IS_OVER:
            return "interrupted: the time was over"
        return "failed" if self.counts else f"failed before its tests (status {self.status})"


def main() -> int:
    suites = [read(name) for name in (LOGS / "order").read_text().split()]
    print(table(suites))
    for suite in suites:
        for line in suite.skips:
            print(f"skipped  {suite.name:14}{line}")
        for line in suite.flaky:
            print(f"flaky    {suite.name:14}{line} failed, and passed when it was tried again")
    print(closing(suites, float(sys.argv[1])))
    return int(any(suite.status for suite in suites))


def read(name: str) -> Suite:
    """A suite from its files: NAME.log, NAME.again.log, NAME.result or NAME.left-out."""
    left_out = LOGS / f"{name}.left-out"
    if left_out.exists():
        return Suite(name, left_out=left_out.read_text().strip())
    status, seconds = (LOGS / f"{name}.result").read_text().split()
    suite = Suite(name, status=int(status), seconds=float(seconds))
    text = (LOGS / f"{name}.log").read_text(errors="replace")
    suite.counts = counted(text)
    suite.skips = re.findall(r"^SKIPPED (.*)$", text, flags=re.MULTILINE)
    again = LOGS / f"{name}.again.log"
    if again.exists():
        second = again.read_text(errors="replace")
        failing = set(failures(second))
        suite.flaky = [test for test in failures(text) if test not in failing]
        later = counted(second)
        suite.counts["passed"] = suite.counts.get("passed", 0) + later.get("passed", 0)
        for kind in ("failed", "error"):
            suite.counts[kind] = later.get(kind, 0)
    if suite.status and not suite.counts.get("failed") and not suite.counts.get("error"):
        # It ended without a verdict: that counts, too.
        suite.counts["error"] = 1
    return suite


def counted(text: str) -> dict[str, int]:
    found = CLOSING.findall(text)
    counts: dict[str, int] = {}
    for number, kind in COUNT.findall(found[-1]) if found else ():
        counts[kind.removesuffix("s")] = int(number)
    return counts


def failures(text: str) -> list[str]:
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", text, flags=re.MULTILINE)


def table(suites: list[Suite]) -> str:
    lines = [f"{'suite':16}{'minutes':>8}" + "".join(f"{kind:>9}" for kind in SHOWN) + "  verdict"]
    for suite in suites:
        numbers = "".join(f"{suite.counts.get(kind, 0):>9}" for kind in SHOWN)
        lines.append(f"{suite.name:16}{suite.seconds / 60:>8.1f}{numbers}  {suite.verdict}")
    return "\n".join(lines)


def closing(suites: list[Suite], seconds: float) -> str:
    """All suites in the form in which the test runner closes."""
    total = {kind: sum(suite.counts.get(kind, 0) for suite in suites) for kind in SHOWN}
    order = ("failed", "passed", "skipped", "error")
    said = ", ".join(f"{total[kind]} {kind}" for kind in order if total[kind] or kind == "passed")
    return f" {said} in {seconds:.2f}s ".center(100, "=")


if __name__ == "__main__":
    sys.exit(main())
