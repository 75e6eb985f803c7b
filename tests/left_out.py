"""Tests that only a command of their own runs: one skip names them all, and none is silent."""

import pytest


def leave_out(config: pytest.Config, items: list[pytest.Item], *, marker: str, reason: str) -> None:
    """Unless `-m` asks for that marker, the first such test is skipped for all of them."""
    if marker in config.option.markexpr:
        return
    marked = [item for item in items if item.get_closest_marker(marker) is not None]
    if not marked:
        return
    first, rest = marked[0], marked[1:]
    count = f" (stands for {len(marked)} tests)" if rest else ""
    first.add_marker(pytest.mark.skip(reason=reason + count))
    items[:] = [item for item in items if item not in set(rest)]
    config.hook.pytest_deselected(items=rest)
