"""The shell blocks of the documentation, command by command."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")))
FENCE = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True, slots=True)
class Command:
    """One command of a block."""

    page: str
    words: tuple[str, ...]
    """As a shell would split it, without comments and leading assignments."""

    @property
    def name(self) -> str:
        return self.words[0].removeprefix(".venv/bin/")

    @property
    def subcommand(self) -> str:
        return self.words[1] if len(self.words) > 1 else ""

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)[:70]}"


def commands(page: str) -> Iterator[Command]:
    """Every command of the page's shell blocks, in order."""
    for block in FENCE.findall((ROOT / page).read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and ASSIGNMENT.fullmatch(words[0]):
                words.pop(0)
            if words:
                yield Command(page, tuple(words))


ALL = [command for page in PAGES for command in commands(page)]
