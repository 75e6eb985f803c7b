"""Kernels that start before the one ahead of them has ended (programmatic dependent launch).

Between two of the 350 kernels of a captured decode step lies about a microsecond in which the GPU
drains and fills again. From Hopper on a kernel may be resident before that, and do what does not
depend on its predecessor: find its place, ask for its weights.
"""

from functools import cache
from typing import Any

import torch

_FIRST_CAPABILITY = 9


@cache
def dependent_launch(device: torch.device) -> dict[str, Any]:
    """What a Triton kernel with a PDL parameter is launched with on `device`."""
    can = torch.cuda.get_device_capability(device)[0] >= _FIRST_CAPABILITY
    return {"PDL": can, "launch_pdl": can}
