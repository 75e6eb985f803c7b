"""Settings, one mechanism for every command: default < YAML file < BATON_* < flag.

A command names the frozen dataclasses it needs. Their fields become flags, environment variables
and YAML keys of the same name; the docstring under a field is its help text, so what `--help` says
and what the code reads cannot drift apart. A field that two dataclasses share (`model`, `host`) is
one setting that fills both.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import textwrap
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

ENVIRONMENT_PREFIX = "BATON_"
TRUE_WORDS = frozenset({"1", "true", "yes", "on"})
FALSE_WORDS = frozenset({"0", "false", "no", "off"})

SHORT_FLAGS = {"tensor_parallel_size": "--tp"}
"""Settings whose flags have a second name."""

Scalar = str | int | float | bool
T = TypeVar("T")


class SettingsError(Exception):
    """A setting that cannot be used. The message names the setting and where it came from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One field of a settings dataclass, as flags, environment and YAML see it."""

    name: str
    """The field's name; also the YAML key."""

    kind: type[str] | type[int] | type[float] | type[bool]
    """What its value must be."""

    choices: tuple[str, ...] = ()
    """The allowed words of a Literal; empty: any value."""

    default: Scalar | None = None
    """None: it must be given."""

    doc: str = ""
    """The docstring under the field."""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def short_flag(self) -> str:
        """Another way to write the flag, where the field has a well-known short name; or empty."""
        return SHORT_FLAGS.get(self.name, "")

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def help(self) -> str:
        """What the setting means, with its default."""
        if self.default is None:
            return f"{self.doc}  [required]"
        if self.kind is bool:
            shown = "on" if self.default else "off"
        elif self.default == "":
            shown = "empty"
        else:
            shown = f"{self.default}"
        return f"{self.doc}  [default: {shown}]"

    def parse(self, value: object, *, source: str) -> Scalar:
        """The value in the field's type.

        Args:
            value: text (flag, environment) or what YAML made of it.
            source: where it came from, for the error.

        Raises:
            SettingsError: it is of another type, not finite, or none of the choices.
        """
        if self.choices:
            if str(value) not in self.choices:
                raise self._refuse(value, source, "one of " + ", ".join(self.choices))
            return str(value)
        if self.kind is bool:
            return self._parse_bool(value, source)
        if self.kind is int:
            return self._parse_int(value, source)
        if self.kind is float:
            return self._parse_float(value, source)
        if isinstance(value, (dict, list)) or value is None:
            raise self._refuse(value, source, "text")
        return str(value)

    def _parse_bool(self, value: object, source: str) -> bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip().lower() in TRUE_WORDS:
            return True
        if isinstance(value, str) and value.strip().lower() in FALSE_WORDS:
            return False
        raise self._refuse(value, source, "true or false")

    def _parse_int(self, value: object, source: str) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str):
            try:
                return int(value.strip())
            except ValueError:
                pass
        raise self._refuse(value, source, "a whole number")

    def _parse_float(self, value: object, source: str) -> float:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if math.isfinite(number):
                return number
        raise self._refuse(value, source, "a finite number")

    def _refuse(self, value: object, source: str, wanted: str) -> SettingsError:
        return SettingsError(f"{source}: {self.name} must be {wanted}, not {value!r}")


def settings_of(*classes: type, omit: Collection[str] = ()) -> dict[str, Setting]:
    """The settings that fill these dataclasses, by name; of a shared field the first class counts.

    Args:
        classes: dataclasses whose fields are str, int, float, bool or a Literal of words.
        omit: fields that the caller decides itself.
    """
    settings: dict[str, Setting] = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        docs = field_docs(cls)
        for field in dataclasses.fields(cls):
            if field.name in omit or field.name in settings:
                continue
            kind, choices = _kind_of(hints[field.name], where=f"{cls.__name__}.{field.name}")
            settings[field.name] = Setting(
                name=field.name,
                kind=kind,
                choices=choices,
                default=None if field.default is dataclasses.MISSING else field.default,
                doc=docs.get(field.name, ""),
            )
    return settings


def given_settings(
    settings: Mapping[str, Setting],
    *,
    flags: Mapping[str, object],
    environment: Mapping[str, str],
    config_file: Path | None = None,
) -> dict[str, Scalar]:
    """What the user set, by name, the strongest source winning; defaults are left out.

    Args:
        settings: what may be set.
        flags: values of flags; None means not given.
        environment: the process environment.
        config_file: a YAML mapping of names to values.

    Raises:
        SettingsError: an unknown key in the file, or a value that does not fit.
    """
    given: dict[str, Scalar] = {}
    if config_file is not None:
        given.update(_read_yaml(config_file, settings))
    for setting in settings.values():
        if setting.variable in environment:
            given[setting.name] = setting.parse(
                environment[setting.variable], source=f"environment variable {setting.variable}"
            )
    for name, value in flags.items():
        if value is not None:
            given[name] = settings[name].parse(value, source=f"flag {settings[name].flag}")
    return given


def fill(cls: type[T], given: Mapping[str, Scalar], **decided: Scalar) -> T:
    """An instance from what was given and what the caller decided; the rest are defaults.

    Raises:
        SettingsError: a field without a default was not given, or the class refuses a value.
    """
    names = {field.name for field in dataclasses.fields(_dataclass(cls))}
    values = {name: value for name, value in given.items() if name in names} | decided
    for setting in settings_of(cls).values():
        if setting.default is None and setting.name not in values:
            raise SettingsError(
                f"{setting.name} is needed: give {setting.flag}, set {setting.variable}, "
                f"or write '{setting.name}:' in the file that --config names"
            )
    try:
        return cls(**values)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def flags_for(config: object, *, omit: Collection[str] = ()) -> list[str]:
    """The flags that give another process this very configuration, all but what is omitted."""
    flags: list[str] = []
    for name, setting in settings_of(type(config), omit=omit).items():
        value = getattr(config, name)
        if setting.kind is bool:
            flags.append(setting.flag if value else "--no-" + setting.flag[2:])
        else:
            flags.append(f"{setting.flag}={value}")
    return flags


def unknown_variables(environment: Mapping[str, str], known: Collection[str]) -> list[str]:
    """BATON_* variables that no command reads: most likely slips of the pen."""
    return sorted(
        name for name in environment if name.startswith(ENVIRONMENT_PREFIX) and name not in known
    )


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstrings under a dataclass's fields, inherited ones too, each on one line."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= _own_field_docs(base)
    return docs


def _own_field_docs(cls: type) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs: dict[str, str] = {}
    for field, below in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            docs[field.target.id] = " ".join(below.value.value.split())
    return docs


def _kind_of(
    hint: Any, *, where: str
) -> tuple[type[str] | type[int] | type[float] | type[bool], tuple[str, ...]]:
    if typing.get_origin(hint) is Literal:
        return str, tuple(str(word) for word in typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        raise TypeError(f"{where}: a setting has one type; use an empty value for 'not set'")
    for kind in (bool, int, float, str):
        if hint is kind:
            return kind, ()
    raise TypeError(f"{where}: settings are str, int, float, bool or a Literal, not {hint}")


def _dataclass(cls: type) -> Any:
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is no dataclass")
    return cls


def _read_yaml(path: Path, settings: Mapping[str, Setting]) -> dict[str, Scalar]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise SettingsError(f"{path}: is not valid YAML: {problem}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: must be a mapping of settings to values")
    values: dict[str, Scalar] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in settings:
            raise SettingsError(f"{path}: unknown setting '{key}'{_hint(name, list(settings))}")
        values[name] = settings[name].parse(value, source=str(path))
    return values


def _hint(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
