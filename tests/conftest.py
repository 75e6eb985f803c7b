"""What every test gets: a clean environment, one thread a process, GPU tests only with a GPU."""

import functools
import gc
import os
import signal
from collections.abc import Generator

import pytest
from hypothesis import settings

# Tests run beside one another and start processes of their own; torch reads these when it loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# As every engine gets it: one whose variables differ from the spawner's cannot be forked from it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Processes that made a NIXL agent crash at exit where rdma-core's libnl meets another one.
os.environ.setdefault("UCX_MODULES", "^ib")
# No test may depend on a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A setting in the developer's shell must not reach the code under test.
for _name in [name for name in os.environ if name.startswith("BATON_")]:
    del os.environ[_name]

# A runner in the background ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("baton", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "baton"))


@functools.cache
def _no_cuda() -> str:
    """Why GPU tests cannot run here; empty where they can."""
    import torch

    return "" if torch.cuda.is_available() else "needs a CUDA device; torch sees none"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed GPU test says so at once, as a later one may hang and take the summary with it. A
    device that it has lost would fail every later test of this process for that alone: the run ends
    there, with its reason."""
    report = yield
    if report.failed and item.get_closest_marker("gpu") is not None and not _no_cuda():
        import torch

        terminal = item.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.write_line(f"\n{item.nodeid} ({report.when}):\n{report.longreprtext}")
        try:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        except RuntimeError as error:
            lost = f"{item.nodeid} has lost the device, later tests cannot run: {error}"
            item.session.shouldstop = lost
    return report


def pytest_configure(config: pytest.Config) -> None:
    # `make test` sets it, so that its processes list the same tests in one order; not for the code
    # under test, whose processes must agree without.
    if not getattr(config.option, "numprocesses", None):
        os.environ.pop("PYTHONHASHSEED", None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected lives to the end, and it is most of what there is: the garbage
    collector need not look through it, neither now (2.6 of 18 s) nor while the tests run."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


LONGEST = ("tests/project/test_style.py", "tests/e2e/")
"""Files that take longest come first: none is left over when all else is done."""


def _is_shorter(item: pytest.Item) -> bool:
    return not item.nodeid.startswith(LONGEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_is_shorter)
    for item in items:
        if item.get_closest_marker("gpu") is not None and _no_cuda():
            item.add_marker(pytest.mark.skip(reason=_no_cuda()))
