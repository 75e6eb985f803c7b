"""The command line: one line for a mistake, help for every setting, quick to load."""

import subprocess
import sys
from pathlib import Path

import pytest

from baton.cli import cli, main
from baton.tables import byte_size
from protos.version import PROTOCOL_VERSION
from tests.baton.scripted import ScriptedInference

ROOT = Path(__file__).resolve().parents[2]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up", "--page-size", "x"], "flag --page-size: page_size must be a whole number"),
        (["up", "--transport", "pigeon"], "transport must be one of auto, cuda_ipc, nixl, grpc"),
        (["up", "--prefill", "0"], "prefill and decode serve together"),
        (["up", "--pagesize", "1"], "No such option '--pagesize'"),
        (["up", "--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["up", "--model", "./nowhere"], "there is no directory ./nowhere"),
        (["prefill"], "model is needed: give --model"),
        (["decode", "--model", "/nowhere/at/all"], "there is no directory"),
        (["router", "--http-port", "70000"], "http_port must be between 0 and 65535"),
        (["generate", "--seed", "x", "hello"], "seed must be a whole number"),
        (["generate"], "Missing argument 'PROMPT'"),
        (["dance"], "No such command 'dance'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in one_line(capsys)


def test_a_bad_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATON_PAGE_SIZE", "big")
    assert main(["up"]) == 2
    assert "environment variable BATON_PAGE_SIZE" in one_line(capsys)


def test_a_variable_that_nothing_reads_is_pointed_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATON_PAGESIZE", "16")
    assert main(["version"]) == 0
    assert "BATON_PAGESIZE is set, but no setting is called pagesize" in capsys.readouterr().err


def test_an_absent_router_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ps", "--router", "127.0.0.1:1", "--timeout-s", "5"]) == 1
    assert "baton: " in one_line(capsys)


def test_ps_lists_the_workers(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ps", "--router", address]) == 0
    shown = capsys.readouterr().out
    assert "prefill-a" in shown
    assert "decode-b" in shown


def test_generate_streams_the_text(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--router", address, "--report", "Hi"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hi\n"
    assert "4.0 KiB (4,096 bytes)" in captured.err


def test_generate_sends_every_sampling_option(address: str, inference: ScriptedInference) -> None:
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.25,
        "seed": 3,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "max_tokens": 9,
        "min_tokens": 2,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    flags += ["--stop", "end", "--no-skip-special-tokens", "--ignore-eos"]
    assert main(["generate", "--router", address, *flags, "Hi"]) == 0
    sampling = inference.requests[0].sampling
    assert {name: getattr(sampling, name) for name in given} == given
    assert list(sampling.stop) == ["end"]
    assert sampling.ignore_eos
    assert sampling.skip_special_tokens is False


def test_generate_says_why_it_was_refused(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--router", address, "fail:RESOURCE_EXHAUSTED"]) == 1
    assert "as the script says" in one_line(capsys)


def test_the_version_names_the_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"baton 0.1.0 (protocol {PROTOCOL_VERSION})\n"


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_flag_is_explained(command: str) -> None:
    for option in cli.commands[command].params:
        if option.param_type_name == "option":
            assert getattr(option, "help", ""), f"{command} {option.name}"


def test_up_has_the_flags_that_people_expect() -> None:
    flags = {flag for option in cli.commands["up"].params for flag in option.opts}
    assert flags >= {
        *("--model", "--prefill", "--decode", "--http-port", "--grpc-port", "--transport"),
        *("--device", "--dtype", "--page-size", "--chunked-prefill-size", "--max-total-tokens"),
        *("--max-running-requests", "--max-queued-requests", "--landing-slots", "--config"),
    }


def test_the_command_line_loads_no_torch() -> None:
    code = (
        "import sys; from baton.cli import main; main(['version']);"
        "print(sorted({'torch', 'fastapi', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 bytes"), (1023, "1,023 bytes"), (1536, "1.5 KiB (1,536 bytes)")],
)
def test_sizes_are_readable(count: int, shown: str) -> None:
    assert byte_size(count) == shown
