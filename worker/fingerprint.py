"""What tells two checkpoints apart without reading gigabytes at every start."""

import hashlib
import json
from pathlib import Path

SAMPLES = 16
SAMPLE_BYTES = 64 << 10


def model_digest(directory: Path, *, load_format: str) -> str:
    """Hex digest of a checkpoint: its configuration, and of each weight file the size, the header
    (names, shapes, offsets) and samples spread over the data. Weights that differ anywhere in
    practice differ there; hashing all of them would cost minutes at every start.

    `dummy` weights are drawn from a fixed seed, so the configuration says it all.
    """
    digest = hashlib.sha256(load_format.encode())
    config = json.loads((directory / "config.json").read_text())
    digest.update(json.dumps(config, sort_keys=True).encode())
    if load_format != "dummy":
        for file in sorted(directory.glob("*.safetensors")):
            _add_samples(digest, file)
    return digest.hexdigest()


def _add_samples(digest: "hashlib._Hash", file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{file.name}|{size}|".encode())
    with file.open("rb") as data:
        header_bytes = int.from_bytes(data.read(8), "little")
        digest.update(data.read(min(header_bytes, size)))
        body = max(size - header_bytes - 8, 0)
        for sample in range(SAMPLES):
            data.seek(8 + header_bytes + body * sample // SAMPLES)
            digest.update(data.read(SAMPLE_BYTES))
