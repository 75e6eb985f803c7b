"""A worker's front is quick to start and small, for it shares its machine with engines."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("role", ["prefill_service", "decode_service", "unified_service"])
def test_a_front_loads_no_torch(role: str) -> None:
    code = f"import sys; import {role}.main; print({{'torch', 'numpy'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
