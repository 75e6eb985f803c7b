"""`baton up` and `baton demo` with scripted children (fake_child.py): `python fake_up.py up [flags
of baton up]`.
"""

import sys
from pathlib import Path

import baton.up
from baton.cli import main
from baton.config import flags_for
from worker.ending import end_process

CHILD = Path(__file__).parent / "fake_child.py"


def scripted_command(command: str, config: object) -> list[str]:
    return [sys.executable, str(CHILD), command, *flags_for(config)]


if __name__ == "__main__":
    baton.up.child_command = scripted_command
    end_process(main(sys.argv[1:]))
