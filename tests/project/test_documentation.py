"""What the documentation names exists: flags, defaults, errors; and the README has its parts."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import baton
from baton.cli import cli
from baton.config import settings_of
from router.config import RouterConfig
from worker.config import WorkerConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
FLAG = re.compile(r"`(?:baton [a-z]+ )?(--[a-z][a-z-]*)")
FOREIGN = {"--build-arg", "--secret", "--pid", "--profile"}
"""Of the container engine's command line."""


def flags() -> set[str]:
    """Every flag of every command of `baton`."""
    known = {"--help"}

    def visit(command: click.Command, context: click.Context) -> None:
        for parameter in command.params:
            known.update([*parameter.opts, *parameter.secondary_opts])
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                below = command.get_command(context, name)
                if below is not None:
                    visit(below, click.Context(below, parent=context))

    visit(cli, click.Context(cli))
    return known


def own_cells(page: str) -> Iterator[str]:
    """The page's text, without the columns of its tables that speak of other projects."""
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        cells = line.split("|")
        yield cells[1] if len(cells) == 5 and "`--" in line else line


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_a_page_names_exists(page: str) -> None:
    named = {flag for text in own_cells(page) for flag in FLAG.findall(text)}
    assert not named - flags() - FOREIGN


def test_defaults_beside_the_flags_of_other_engines_are_ours() -> None:
    page = (ROOT / "docs" / "scheduling.md").read_text(encoding="utf-8")
    table = page[page.index("| `baton` | SGLang | vLLM |") :]
    stated = dict(re.findall(r"^\| `--([a-z-]+)` ([\w.]+) \|", table, re.MULTILINE))
    assert len(stated) > 12
    known = settings_of(WorkerConfig, RouterConfig)
    words = {True: "on", False: "off"}
    for flag, default in stated.items():
        own = known[flag.replace("-", "_")].default
        assert default == (words[own] if isinstance(own, bool) else str(own)), flag


def test_every_error_of_the_client_library_is_explained() -> None:
    text = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    kinds = [kind.__name__ for kind in baton.RequestError.__subclasses__()]
    assert len(kinds) > 10
    assert not [kind for kind in kinds if f"`{kind}`" not in text]


def test_the_readme_has_what_a_reader_decides_by() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for heading in (
        "Two commands",
        "The journey of a request",
        "Beside others, and when not to",
        "Coming from SGLang or vLLM",
    ):
        assert f"\n## {heading}\n" in text
