"""On a CUDA device: what captured decode steps read is written by one kernel as torch would."""

import pytest
import torch

from engine.execution import decode_inputs
from engine.execution.decode_inputs import DecodeInputs
from engine.memory.kv_pool import PageMajorKVPool
from engine.models.rotary_store import triton_installed
from tests.checkpoints import random_prompt
from tests.engine.execution.harness import Harness

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not triton_installed(), reason="triton is not installed"),
]


@pytest.mark.parametrize("page_size", [16, 64])
def test_one_kernel_writes_what_captured_steps_read(
    page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda")
    pool = PageMajorKVPool(
        num_pages=600,
        page_size=page_size,
        num_layers=1,
        num_kv_heads=1,
        head_dim=64,
        dtype=torch.bfloat16,
        device=device,
    )
    harness = Harness(pool, max_rows=40)
    lengths = [int(n) for n in torch.randint(1, 200, (37,))]
    rows = [harness.row(random_prompt(n + 1, seed=n)) for n in lengths]
    harness.extend(*((row, n) for row, n in zip(rows, lengths, strict=True)))
    kernel = DecodeInputs(40, 4000, pool)
    assert kernel._on_device
    monkeypatch.setattr(decode_inputs, "triton_installed", lambda: False)
    plain = DecodeInputs(40, 4000, pool)
    for count, size in ((37, 40), (1, 1), (1, 4), (16, 16)):
        batch = harness.decode(*rows[:count])
        tables = [inputs.write(batch, size) for inputs in (kernel, plain)]
        for field in ("indptr", "indices", "last_page_len"):
            assert torch.equal(*(getattr(table, field) for table in tables)), (count, field)
        for field in ("input_ids", "positions", "out_cache_loc"):
            assert torch.equal(*(getattr(one, field)[:size] for one in (kernel, plain))), field
        for row in rows[:count]:
            row.tokens.append(1)
