"""Turns settings dataclasses into the flags of a command."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import click

from baton.config import Scalar, Setting, given_settings, settings_of

METAVARS = {str: "TEXT", int: "INTEGER", float: "NUMBER"}
CONFIG_HELP = "YAML file with settings by their names; environment and flags win over it."

Run = Callable[[dict[str, Scalar]], int]
"""A command's work: takes what the user set, returns the exit status."""


def settings_command(
    name: str,
    run: Run,
    *classes: type,
    help: str,
    omit: Collection[str] = (),
    arguments: Sequence[click.Argument] = (),
) -> click.Command:
    """A command whose flags are the fields of dataclasses.

    Args:
        name: the command's word.
        run: called with what was set by flags, environment and file; positional arguments are
            among it, by name.
        classes: dataclasses of settings (`baton.config.settings_of`).
        help: text of `--help`; each field's own text comes from its docstring.
        omit: fields that are no flags.
        arguments: positional arguments.
    """
    settings = settings_of(*classes, omit=omit)

    def callback(config_file: str | None, **values: object) -> int:
        positional = {
            argument.name or "": values.pop(argument.name or "") for argument in arguments
        }
        given = given_settings(
            settings,
            flags=values,
            environment=os.environ,
            config_file=Path(config_file) if config_file else None,
        )
        given.update({key: str(value) for key, value in positional.items() if value is not None})
        return run(given)

    config = click.Option(["--config", "config_file"], metavar="FILE", help=CONFIG_HELP)
    return click.Command(
        name,
        params=[*arguments, config, *flag_options(settings)],
        callback=callback,
        help=help,
        context_settings={"max_content_width": 100},
    )


def flag_options(settings: Mapping[str, Setting]) -> list[click.Option]:
    """One flag a setting. Values stay text here: one parser serves flags, environment and file."""
    return [_option(setting) for setting in settings.values()]


def _option(setting: Setting) -> click.Option:
    if setting.kind is bool:
        flags = f"{setting.flag}/--no-{setting.flag[2:]}"
        return click.Option([flags, setting.name], default=None, help=setting.help)
    metavar = "|".join(setting.choices) if setting.choices else METAVARS[setting.kind]
    names = [name for name in (setting.flag, setting.short_flag, setting.name) if name]
    return click.Option(names, metavar=metavar, help=setting.help)
