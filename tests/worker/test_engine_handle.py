"""What an engine process is started with."""

import pytest

from worker.engine_handle import EngineHandle, EngineStartError


@pytest.mark.parametrize("wanted", [None, "ACTIVE"])
async def test_waiting_threads_sleep_unless_the_operator_says_otherwise(
    wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if wanted is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", wanted)
    engine = EngineHandle(module="tests.worker.engine_that_tells")
    with pytest.raises(EngineStartError, match=wanted or "PASSIVE"):
        await engine.start(b"{}", on_progress=lambda line: None)
    await engine.stop()
