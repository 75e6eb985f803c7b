"""Where a model comes from, and the random stand-in."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from baton import model_store
from baton.config import SettingsError
from baton.demo import PROMPT
from baton.model_store import default_model, find_model, is_complete
from baton.random_model import write_random_model


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random"
    write_random_model(path)
    return path


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "llama"
    path.mkdir()
    assert find_model(str(path)) == model_store.ModelSource(path=path, name="llama")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(SettingsError, match="is a file"):
        find_model(str(file))


def test_a_hub_id_without_a_network_says_so() -> None:
    with pytest.raises(SettingsError, match="hub is out of reach"):
        find_model("nobody-at-all/no-such-model")


def test_the_default_is_the_embedded_model_or_a_random_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_store, "EMBEDDED_NAME", "none-of-that-name")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = default_model()
    assert source.is_random
    assert "random" in source.name
    assert is_complete(source.path)
    written = (source.path / "model.safetensors").stat().st_mtime_ns
    assert default_model() == source
    assert (source.path / "model.safetensors").stat().st_mtime_ns == written


def test_a_half_written_model_is_not_complete(random_model: Path, tmp_path: Path) -> None:
    assert is_complete(random_model)
    (tmp_path / "config.json").write_text("{}")
    assert not is_complete(tmp_path)


def test_the_random_model_has_the_shapes_of_its_configuration(random_model: Path) -> None:
    config = json.loads((random_model / "config.json").read_text())
    weights = load_file(random_model / "model.safetensors")
    assert weights["lm_head.weight"].shape == (config["vocab_size"], config["hidden_size"])
    key = config["num_key_value_heads"] * config["head_dim"]
    for layer in range(config["num_hidden_layers"]):
        shape = weights[f"model.layers.{layer}.self_attn.k_proj.weight"].shape
        assert shape == (key, config["hidden_size"])


def test_the_random_tokenizer_gives_every_text_back(random_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(random_model / "tokenizer.json"))
    for text in (PROMPT, "Größe ≥ 3 🙂", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_same_seed_writes_the_same_weights(random_model: Path, tmp_path: Path) -> None:
    write_random_model(tmp_path / "again")
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (random_model / "model.safetensors").read_bytes()
