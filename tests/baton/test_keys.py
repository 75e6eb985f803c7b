"""`baton keys`, as an operator uses it."""

from pathlib import Path

import pytest

from baton.cli import main
from router.api_keys import read_keys


def test_a_key_is_shown_once_listed_and_revoked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.yaml"
    file = ["--api-keys-file", str(path)]
    limits = ["--requests-per-minute", "60", "--prefix-group", "open", "--note", "ci"]
    assert main(["keys", "add", "acme", *file, *limits]) == 0
    key = capsys.readouterr().out.strip()
    (kept,) = read_keys(path).values()
    assert kept.opens_with(key)
    assert (kept.tenant, kept.requests_per_minute, kept.prefix_group) == ("acme", 60, "open")
    assert main(["keys", "list", *file]) == 0
    shown = capsys.readouterr().out
    assert kept.id in shown
    assert key not in shown
    assert main(["keys", "revoke", kept.id, *file]) == 0
    (kept,) = read_keys(path).values()
    assert kept.revoked
    assert kept.opens_with(key), "its use is counted as such"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["add", "two words"], "tenant must be a name"),
        (["add", "acme", "--requests-per-minute", "-1"], "must not be negative"),
        (["list"], "does not exist"),
        (["revoke", "00000000"], "does not exist"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["keys", *words, "--api-keys-file", str(tmp_path / "keys.yaml")]) == 2
    assert message in capsys.readouterr().err
