"""Whether the base model and the data can be had, and how much of them is to be downloaded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from transformers import PreTrainedConfig

from qlora_helpers.colab import hub
from qlora_helpers.config import AG_NEWS, EMBEDDED_MODEL, SAMPLE, RunConfig
from qlora_helpers.errors import ModelError
from qlora_helpers.model import find_embedded, load_model_config

_OTHER_MODEL = "Without the hub: name a folder in QLORA_BASE_MODEL, or set QLORA_PROFILE=cpu."
_OTHER_DATA = "Without the hub: set QLORA_DATA to a folder of train.csv and test.csv, or to sample."


@dataclass(frozen=True)
class Source:
    """Where a model or data come from, a verdict and its remedy, and the bytes to download."""

    found: str
    verdict: str = "ok"
    remedy: str = ""
    download: int = 0
    folder: Path | None = None  # of a model that holds config.json
    config: PreTrainedConfig | None = None


def reach(config: RunConfig) -> tuple[Source, Source]:
    """Return the sources of the base model and of the data; the hub has 8 seconds for each."""
    return _model(config), _data(config.data)


def _model(config: RunConfig) -> Source:
    name, folder = config.base_model, Path(config.base_model)
    if name == EMBEDDED_MODEL:
        state, remedy = find_embedded()
        return Source(state, "stop" if remedy else "ok", remedy)
    source = Source("a folder on this machine", folder=folder)
    if not folder.is_dir():
        source = _from_hub(name, "model", hub.CHECKPOINT_FILES, _OTHER_MODEL)
    try:
        found = source.folder and load_model_config(source.folder, config)
        return replace(source, config=found)
    except ModelError as error:
        return Source(str(error), "stop", _OTHER_MODEL)


def _data(name: str) -> Source:
    if name == SAMPLE:
        return Source("400 headlines that come with the package")
    if name != AG_NEWS:
        return Source("on this machine")
    return _from_hub(name, "dataset", hub.DATASET_FILES, _OTHER_DATA)


def _from_hub(name: str, kind: str, patterns: Sequence[str], otherwise: str) -> Source:
    download, folder = 0, None
    try:
        commit, sizes = hub.list_files(name, kind, patterns)
        for file, size in sizes.items():
            copy = try_to_load_from_cache(name, file, revision=commit, repo_type=kind)
            download += 0 if isinstance(copy, str) else size
        if "config.json" in sizes:  # a repository with conditions lists its files to everybody
            options = {"revision": commit, "etag_timeout": hub.ANSWER_SECONDS}
            folder = Path(hf_hub_download(name, "config.json", **options)).parent
    except Exception as error:  # of a dozen kinds: names, conditions, connections, proxies
        if folder := hub.cached(name, kind, patterns):
            return Source("in the hub's cache: no network needed", folder=folder)
        why = hub.explain(name, kind, error).rstrip(".")
        return Source(f"cannot be loaded from the hub: {why}", "stop", otherwise)
    what = f"{_size(download)} to download" if download else "in the hub's cache"
    found = f"on the hub, {_size(sum(sizes.values()))}: {what}"
    return Source(found, download=download, folder=folder)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
