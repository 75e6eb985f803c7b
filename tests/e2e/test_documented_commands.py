"""Every command that the documentation writes works as written.

`baton` and `curl` run against a real deployment, with the addresses that a test has and loads that
end in seconds. What other suites run (images, the chart) or needs another machine is named here
with the reason; a command that is neither fails the test.
"""

import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest

from baton.cli import cli
from tests.e2e.cluster import Cluster, running_cluster
from tests.e2e.documented import ALL, ROOT, Command

MODEL = ROOT / "models" / "baton-tiny"
RUN = ("generate", "ps", "bench", "health", "doctor")
"""Subcommands that ask a router; the others' settings are read as the command line does."""

ELSEWHERE = {
    "docker": "make test-compose",
    "helm": "make test-helm and make test-k8s",
    "kubectl": "make test-k8s",
    "pip": "tests/project/test_packaging.py",
    "apt-get": ".ci/run installs the packages",
    "openssl": "run below, all in one directory",
    "git": "clones what the reader has",
    "cd": "has no effect of its own",
    "export": "has no effect of its own",
}
SHORTER = (
    (r"--duration-s \S+", "--duration-s 1"),
    (r"--requests \S+", "--requests 4"),
    (r"--concurrency \S+", "--concurrency 2"),
    (r"\bbench\b", "bench --length-scale 0.05"),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(MODEL, tmp_path_factory.mktemp("documented")) as cluster:
        yield cluster


def here(command: Command, cluster: Cluster) -> list[str]:
    """The command with this cluster's addresses in the place of the documented ones."""
    line = shlex.join(command.words)
    if command.subcommand == "bench":
        for documented, short in SHORTER:
            line = re.sub(documented, short, line)
    line = re.sub(r"\bROUTER:50051\b|127\.0\.0\.1:50051", cluster.grpc, line)
    line = re.sub(r"http://127\.0\.0\.1:8000", cluster.http, line)
    return shlex.split(line)


def is_run(command: Command) -> bool:
    secured = any(
        word.startswith(("grpcs://", "https://", "--tls-", "--api-key")) for word in command.words
    )
    return not secured and (
        command.name == "curl" or (command.name == "baton" and command.subcommand in RUN)
    )


@pytest.mark.parametrize("command", [c for c in ALL if is_run(c)], ids=str)
def test_a_documented_command_works(tiny: Cluster, command: Command, tmp_path: Path) -> None:
    words = here(command, tiny)
    if command.name == "curl":
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        words = ["curl", "--fail-with-body", "--silent", "--show-error", *words[1:]]
    else:
        words = [sys.executable, "-m", "baton", *words[1:]]
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    # Beside other tests a link may be slow enough to be warned of, which is doctor's status 1.
    warns = command.subcommand == "doctor" and "\nwarning: " in done.stdout
    assert done.returncode == (1 if warns else 0), (
        f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    )
    assert done.stdout.strip(), f"says nothing: {shlex.join(words)}"
    tiny.wait_until_balanced()


@pytest.mark.parametrize("command", [c for c in ALL if not is_run(c)], ids=str)
def test_a_documented_command_is_one_that_exists(command: Command) -> None:
    if command.name == "baton":
        read_settings(command.words[1:])
    elif command.name == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert command.subcommand in targets
    elif command.name in ("python", "python3"):
        assert command.subcommand == "-m" or (ROOT / command.subcommand).exists()
    elif command.name == "pre-commit":
        assert (ROOT / ".pre-commit-config.yaml").exists()
    else:
        assert command.name in ELSEWHERE, f"nothing says how {command.name} is tried"
    for word in command.words[1:]:
        if re.fullmatch(r"(?:deploy|helm|docs|bench|tools|tests)/[\w./-]+", word):
            assert (ROOT / word).exists(), f"{word} does not exist"


def test_parts_with_the_documented_certificates_know_each_other(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    for command in ALL:
        if command.name == "openssl":
            subprocess.run(command.words, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    authority = str(tmp_path / "parts-ca.pem")
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority)
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.create_default_context(cafile=authority)
    for context in (server, client):
        context.load_cert_chain(tmp_path / "part.pem", tmp_path / "part-key.pem")
    for name in ("baton-part", "127.0.0.1"):
        here, there = socket.socketpair()
        with ThreadPoolExecutor(1) as pool:
            accepted = pool.submit(server.wrap_socket, here, server_side=True)
            with client.wrap_socket(there, server_hostname=name), accepted.result(10) as peer:
                assert peer.getpeercert()


def read_settings(words: tuple[str, ...]) -> None:
    """Reads a command's flags as the command line would, without running it."""
    subcommand = cli.get_command(click.Context(cli), words[0])
    assert subcommand is not None, f"no such command: {words[0]}"
    if isinstance(subcommand, click.Group):
        inner = subcommand.get_command(click.Context(subcommand), words[1])
        assert inner is not None, f"no such command: {words[:2]}"
        subcommand, words = inner, words[1:]
    subcommand.make_context(words[0], list(words[1:]))
