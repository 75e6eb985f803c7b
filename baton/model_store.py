"""Where a model comes from: a directory, the Hugging Face hub, or the one that ships with Baton."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from baton.config import SettingsError

EMBEDDED_NAME = "baton-tiny"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""What serving reads of a hub repository; weights in other formats stay there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model directory, ready to be read."""

    path: Path
    """Holds config.json, safetensors and tokenizer.json."""

    name: str
    """Name under which it is served unless --served-model-name says otherwise."""

    is_random: bool = False
    """Its weights mean nothing: a stand-in that exercises the path."""


def find_model(model: str) -> ModelSource:
    """The model that a user named: nothing (the default one), a directory, or a hub id.

    Raises:
        SettingsError: there is no such directory, or the hub is out of reach.
    """
    if not model:
        return default_model()
    path = Path(model).expanduser()
    if path.is_dir():
        return ModelSource(path=path.resolve(), name=path.resolve().name)
    if path.exists():
        raise SettingsError(f"model: {model} is a file; name the directory that holds config.json")
    if not HUB_ID.fullmatch(model) or model.startswith((".", "~")):
        raise SettingsError(f"model: there is no directory {model}")
    return ModelSource(path=_download(model), name=model)


def default_model() -> ModelSource:
    """The embedded model; where a checkout lacks it, a small random one, written on first use."""
    embedded = Path(__file__).resolve().parent.parent / "models" / EMBEDDED_NAME
    if is_complete(embedded):
        return ModelSource(path=embedded, name=EMBEDDED_NAME)
    # Imported here, since only this path needs numpy.
    from baton.random_model import RANDOM_NAME, write_random_model

    path = cache_directory() / RANDOM_NAME
    if not is_complete(path):
        write_random_model(path)
    return ModelSource(path=path, name=RANDOM_NAME, is_random=True)


def is_complete(path: Path) -> bool:
    """Whether a directory has a configuration, a tokenizer and weights."""
    needed = (path / "config.json", path / "tokenizer.json")
    return all(file.is_file() for file in needed) and any(path.glob("*.safetensors"))


def cache_directory() -> Path:
    """Where Baton keeps what it can make again: $XDG_CACHE_HOME/baton or ~/.cache/baton."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "baton"


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, OSError) as error:
        # A refused request (unknown, private or gated model) is an OSError as well.
        if isinstance(error, HfHubHTTPError):
            raise SettingsError(f"model: the Hugging Face hub refused {model}: {error}") from error
        raise SettingsError(
            f"model: {model} is no directory here, and the Hugging Face hub is out of reach "
            "(offline?); download it elsewhere and give --model its directory"
        ) from error
