"""The scheduler under anything that may happen to it (scheduling.md section 8)."""

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.engine.scheduler.machine.cases import Example, RoleName
from tests.engine.scheduler.machine.draws import examples
from tests.engine.scheduler.machine.world import World

EXAMPLES = int(os.environ.get("MACHINE_EXAMPLES", "2000"))
SHARES: dict[RoleName, float] = {"unified": 0.45, "prefill": 0.2, "decode": 0.35}


@pytest.mark.parametrize("role", SHARES)
@pytest.mark.timeout(300 + EXAMPLES)
def test_any_traffic_is_exact_and_balanced(role: RoleName) -> None:
    @given(examples(role))
    @settings(
        max_examples=max(1, round(SHARES[role] * EXAMPLES)),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
    )
    def run(example: Example) -> None:
        World(example).run()

    run()
