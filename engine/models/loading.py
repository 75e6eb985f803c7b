"""Filling a decoder's parameters: from a directory's safetensors, or with random numbers."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import InvalidModelError
from engine.parallel.shards import Shards

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DUMMY_SEED = 0
_DUMMY_STD = 0.02


def load_safetensors(
    destinations: dict[str, torch.Tensor], directory: str | Path, shards: Shards | None = None
) -> None:
    """Copies every tensor of the checkpoint into its destination, one at a time; with `shards`,
    the rank's part of it, and only that is read.

    Tensors are read straight to the destination's device and converted to its dtype. Raises
    InvalidModelError, naming the file or tensor, for a directory without weights, a missing shard,
    an unreadable file, and a tensor that is missing, unknown, or of the wrong shape.
    """
    missing = set(destinations)
    for path in weight_files(directory):
        missing -= _load_file(path, destinations, shards)
    if missing:
        names = sorted(missing)
        raise InvalidModelError(
            f"the weights in {directory} lack {len(names)} tensors that config.json asks for: "
            f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        )


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files of a model directory. InvalidModelError where one is missing."""
    directory = Path(directory)
    index_path = directory / _INDEX
    if not index_path.is_file():
        single = directory / _SINGLE
        if single.is_file():
            return [single]
        others = sorted(path.name for path in directory.glob("*.bin"))
        hint = f"; {', '.join(others[:3])} cannot be read, convert them" if others else ""
        raise InvalidModelError(
            f"{directory} holds no weights: neither {_SINGLE} nor {_INDEX} is there{hint}"
        )
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidModelError(f"{index_path} is no index of safetensors: {error!r}") from error
    paths = [directory / name for name in names]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise InvalidModelError(
            f"{index_path} lists shards that are not there: {', '.join(absent[:4])}"
        )
    return paths


def fill_random(destinations: dict[str, torch.Tensor]) -> None:
    """Random weights from a fixed seed: normal with a small spread for matrices, norms near 1.

    For benchmarks: activations stay finite and are never zero, since multiplying zeros draws less
    power and runs faster than real work. The draw depends on the device.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for name in sorted(destinations):
        tensor = destinations[name]
        generator = generators.get(tensor.device)
        if generator is None:
            generator = torch.Generator(tensor.device).manual_seed(_DUMMY_SEED)
            generators[tensor.device] = generator
        tensor.normal_(mean=0.0, std=_DUMMY_STD, generator=generator)
        if name.endswith("norm.weight"):
            tensor.add_(1.0)


def _load_file(
    path: Path, destinations: dict[str, torch.Tensor], shards: Shards | None
) -> set[str]:
    device = next(iter(destinations.values())).device
    loaded = set()
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                destination = destinations.get(name)
                if destination is None:
                    _check_superfluous(name, path, destinations)
                    continue
                part = None if shards is None else shards.part(name)
                if part is None:
                    tensor = file.get_tensor(name)
                else:
                    tensor = part.read(file.get_slice(name), f"{name} of {path}")
                _copy(name, path, tensor, destination)
                loaded.add(name)
    except (SafetensorError, OSError) as error:
        raise InvalidModelError(f"{path} cannot be read: {error}") from error
    return loaded


def _copy(name: str, path: Path, source: torch.Tensor, destination: torch.Tensor) -> None:
    if source.shape != destination.shape:
        raise InvalidModelError(
            f"{path}: tensor {name} has shape {list(source.shape)}, "
            f"but config.json asks for {list(destination.shape)}"
        )
    if not source.is_floating_point() or source.dtype.itemsize < 2:
        raise InvalidModelError(
            f"{path}: tensor {name} is {source.dtype}; only float32, float16 and bfloat16 are read"
        )
    destination.copy_(source)


def _check_superfluous(name: str, path: Path, destinations: dict[str, torch.Tensor]) -> None:
    """Tied output projections and tables of rotary frequencies repeat what is known."""
    tied = name == "lm_head.weight" and "lm_head.weight" not in destinations
    if not tied and not name.endswith("rotary_emb.inv_freq"):
        raise InvalidModelError(
            f"{path}: tensor {name} has no place in the model that config.json describes"
        )
