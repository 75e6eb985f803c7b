"""Requests that run while something is done to the cluster."""

import threading
from dataclasses import dataclass, field

from tests.kubernetes.releases import PROMPT, Release

TOKENS = 200


@dataclass
class Streams:
    """Some greedy streams through one router, started when made."""

    release: Release
    count: int = 3
    texts: list[str] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begun = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(self.count)]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            assert self._begun.acquire(timeout=60), f"no token within a minute: {self.errors}"

    def check(self, expected: str) -> None:
        """All end well, with the text of an undisturbed run."""
        for thread in self._threads:
            thread.join(timeout=180)
            assert not thread.is_alive(), "a stream does not end"
        assert not self.errors
        assert self.texts == [expected] * self.count

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        text = ""
        try:
            with self.release.client() as client:
                for chunk in client.generate(
                    PROMPT, max_tokens=TOKENS, temperature=0, ignore_eos=True, timeout=170
                ):
                    if not text:
                        self._begun.release()
                    text += chunk.text
            self.texts.append(text)
        except Exception as error:
            self.errors.append(error)
            self._begun.release()
