"""What measurements have found, kept beside the kernels: a worker that starts again need not repeat
them.

Choices hold for one kind of GPU and one set of libraries. A file that cannot be read or written
costs a start its measurements again, nothing else.
"""

import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

_directories: list[Path] = []


def keep_choices_in(directory: str) -> None:
    """Where choices are kept from now on; empty: nowhere."""
    _directories[:] = [Path(directory).expanduser()] if directory else []


class RememberedChoices:
    """Name by question, for one `setting`: what the answers depend on beside the question."""

    def __init__(self, setting: str) -> None:
        self._setting = setting
        self._file = _directories[0] / "choices.json" if _directories else None
        self._known = self._read().get(setting, {})
        self._new = False

    def get(self, question: str) -> str:
        """Empty where nothing is known."""
        return self._known.get(question, "")

    def put(self, question: str, answer: str) -> None:
        self._known[question] = answer
        self._new = True

    def save(self) -> None:
        """Beside those of other settings. Of several engines at once the last one's stay."""
        if self._file is None or not self._new:
            return
        try:
            everything = self._read()
            everything[self._setting] = everything.get(self._setting, {}) | self._known
            self._file.parent.mkdir(parents=True, exist_ok=True)
            scratch = self._file.with_suffix(f".{id(self)}.tmp")
            scratch.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")
            scratch.replace(self._file)
        except OSError as error:
            logger.warning("measured choices are not kept: %s", error)

    def _read(self) -> dict[str, dict[str, str]]:
        if self._file is None:
            return {}
        try:
            found = json.loads(self._file.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning("measured choices in %s are not used: %s", self._file, error)
            return {}
        return {
            setting: {str(question): str(answer) for question, answer in choices.items()}
            for setting, choices in (found.items() if isinstance(found, dict) else ())
            if isinstance(choices, dict)
        }
