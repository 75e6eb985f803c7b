"""Settings: default < YAML < environment < flag, and errors that name their source."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.config import (
    SettingsError,
    field_docs,
    fill,
    flags_for,
    given_settings,
    settings_of,
    unknown_variables,
)
from router.config import RouterConfig
from worker.config import WorkerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """An example."""

    model: str
    """What to serve."""

    page_size: int = 64
    """Tokens a page,
    on two lines."""

    lease_s: float = 30.0
    """Seconds."""

    verify: bool = True
    """Check it."""

    transport: Literal["auto", "nixl", "grpc"] = "auto"
    """How it moves."""


SETTINGS = settings_of(Example)


def resolve(
    *,
    flags: dict[str, object] | None = None,
    environment: dict[str, str] | None = None,
    config_file: Path | None = None,
) -> Example:
    values = given_settings(
        SETTINGS, flags=flags or {}, environment=environment or {}, config_file=config_file
    )
    return fill(Example, {"model": "m", **values})


def yaml_file(folder: Path, text: str) -> Path:
    path = folder / "baton.yaml"
    path.write_text(text)
    return path


def test_the_stronger_source_wins(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "page_size: 1\nlease_s: 1\nverify: false\n")
    environment = {"BATON_PAGE_SIZE": "2", "BATON_LEASE_S": "2"}
    assert resolve() == Example(model="m")
    assert resolve(config_file=file) == Example(model="m", page_size=1, lease_s=1.0, verify=False)
    assert resolve(config_file=file, environment=environment).page_size == 2
    assert resolve(config_file=file, environment=environment, flags={"page_size": "3"}) == Example(
        model="m", page_size=3, lease_s=2.0, verify=False
    )


def test_a_flag_that_was_not_given_does_not_win() -> None:
    environment = {"BATON_PAGE_SIZE": "2"}
    assert resolve(environment=environment, flags={"page_size": None}).page_size == 2


def test_keys_may_be_written_with_dashes(tmp_path: Path) -> None:
    assert resolve(config_file=yaml_file(tmp_path, "page-size: 16")).page_size == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("page_sise: 1", "unknown setting 'page_sise'; did you mean 'page_size'?"),
        ("page_size: many", "page_size must be a whole number, not 'many'"),
        ("page_size: 1.5", "page_size must be a whole number, not 1.5"),
        ("page_size: true", "page_size must be a whole number, not True"),
        ("lease_s: .nan", "lease_s must be a finite number"),
        ("verify: 3", "verify must be true or false"),
        ("transport: pigeon", "transport must be one of auto, nixl, grpc, not 'pigeon'"),
        ("model: [a]", "model must be text"),
        ("- a\n- b", "must be a mapping"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        resolve(config_file=yaml_file(tmp_path, text))
    assert message in str(error.value)
    assert "baton.yaml" in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no\.yaml: cannot be read"):
        resolve(config_file=tmp_path / "no.yaml")


def test_a_bad_variable_is_named() -> None:
    with pytest.raises(SettingsError, match="environment variable BATON_LEASE_S: lease_s must be"):
        resolve(environment={"BATON_LEASE_S": "inf"})


def test_a_bad_flag_is_named() -> None:
    with pytest.raises(SettingsError, match="flag --page-size: page_size must be"):
        resolve(flags={"page_size": "x"})


@pytest.mark.parametrize(("word", "value"), [("1", True), ("Yes", True), ("off", False)])
def test_switches_take_the_usual_words(word: str, value: bool) -> None:
    assert resolve(environment={"BATON_VERIFY": word}).verify is value


def test_a_setting_without_a_default_must_be_given() -> None:
    with pytest.raises(SettingsError, match="--model, set BATON_MODEL"):
        fill(Example, {})


def test_what_the_dataclass_refuses_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match="ping_interval_s"):
        fill(RouterConfig, {"ping_interval_s": 9.0})


def test_help_is_the_docstring_with_its_default() -> None:
    assert SETTINGS["page_size"].help == "Tokens a page, on two lines.  [default: 64]"
    assert SETTINGS["model"].help == "What to serve.  [required]"
    assert SETTINGS["verify"].help == "Check it.  [default: on]"


@pytest.mark.parametrize("cls", [WorkerConfig, RouterConfig])
def test_every_setting_is_explained(cls: type) -> None:
    assert set(settings_of(cls)) == set(field_docs(cls))


def test_a_shared_field_is_one_setting() -> None:
    settings = settings_of(RouterConfig, WorkerConfig)
    assert settings["max_queued_requests"].default == RouterConfig().max_queued_requests


def test_unknown_variables_are_found() -> None:
    environment = {"BATON_PAGE_SIZE": "1", "BATON_PAGESIZE": "1", "PATH": ""}
    assert unknown_variables(environment, {"BATON_PAGE_SIZE"}) == ["BATON_PAGESIZE"]


@given(
    page_size=st.integers(-(2**70), 2**70),
    lease_s=st.floats(allow_nan=False, allow_infinity=False),
    verify=st.booleans(),
    model=st.text(),
)
def test_flags_for_a_configuration_give_it_back(
    page_size: int, lease_s: float, verify: bool, model: str
) -> None:
    config = Example(model=model, page_size=page_size, lease_s=lease_s, verify=verify)
    flags: dict[str, object] = {}
    for flag in flags_for(config):
        name, _, value = flag.removeprefix("--").partition("=")
        if name.removeprefix("no-") == "verify":
            flags["verify"] = not name.startswith("no-")
        else:
            flags[name.replace("-", "_")] = value
    assert fill(Example, given_settings(SETTINGS, flags=flags, environment={})) == config
