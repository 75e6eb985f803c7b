"""`baton`, and `python -m baton`: one command, whose process then ends at once."""

from baton.cli import main
from worker.ending import end_process


def run() -> None:
    end_process(main())


if __name__ == "__main__":
    run()
