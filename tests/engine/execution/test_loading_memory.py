"""Weights are read into their place: no second copy of them is ever in memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.checkpoints import write_config

SCRIPT = """
import json, sys, threading, time
import torch
from engine.model_config import ModelConfig
from engine.models.decoder import load_decoder

def anonymous_bytes():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous_bytes())
        time.sleep(0.002)

config = ModelConfig.from_directory(sys.argv[1])
before, peak, done = anonymous_bytes(), [0], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
decoder = load_decoder(
    config, model_path=sys.argv[1], device=torch.device("cpu"), dtype=torch.float32
)
done.set()
watcher.join()
print(json.dumps({"peak": peak[0] - before, "kept": anonymous_bytes() - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_loading_needs_hardly_more_memory_than_the_weights(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
    )
    write_config(tmp_path, config, shard_size="60MB", seed=1)
    weights = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    memory = json.loads(done.stdout)
    assert weights > 150e6
    assert memory["kept"] > 0.9 * weights
    assert memory["peak"] < 1.25 * weights
