"""Whether the base model and the data can be had: here already, or from the hub, and how much of them is to be downloaded."""

import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from transformers import AutoConfig, PreTrainedConfig

from qlora_helpers.colab.hub import cached, checkpoint_files
from qlora_helpers.colab.threads import start
from qlora_helpers.config import AG_NEWS, EMBEDDED_MODEL, PROFILES, SAMPLE, RunConfig
from qlora_helpers.data import parquet_files
from qlora_helpers.model import find_embedded

HUB_SECONDS = 10.0
_ELSE = {
    "model": "to go without the hub, name a folder in QLORA_BASE_MODEL, or set QLORA_PROFILE=cpu, which needs no network",
    "dataset": "to go without the hub, set QLORA_DATA to a folder with train.csv and test.csv, or to sample, which is bundled",
}
_WANTED = {"model": checkpoint_files, "dataset": parquet_files}
_OPEN = PROFILES["t4"]["base_model"]
MISTRALS = {
    _OPEN,
    "mistralai/Mistral-7B-v0.1",
}  # whose config is Transformers' own default: not fetched


@dataclass(frozen=True)
class Source:
    """What was found of a model or of data, a verdict, the remedy, bytes to download, and a model's config where it can be read. After
    a stop there is nothing to download: nothing will be."""

    found: str
    verdict: str = "ok"
    remedy: str = ""
    download: int = 0
    config: PreTrainedConfig | None = None


def reach(config: RunConfig) -> tuple[Source, Source]:
    """The base model and the data of `config`, within ten seconds."""
    asked = [
        (start(partial(look, name)), kind, name)
        for look, kind, name in (
            (_model, "model", config.base_model),
            (_data, "dataset", config.data),
        )
    ]
    until = time.monotonic() + HUB_SECONDS
    found = []
    for future, kind, name in asked:
        try:
            found.append(future.result(max(0, until - time.monotonic())))
        except TimeoutError:
            found.append(_not_reached(kind, name, f"no answer within {HUB_SECONDS:g} s"))
    return tuple(found)


def _model(name: str) -> Source:
    if name == EMBEDDED_MODEL:
        where, remedy = find_embedded()
        return Source(where, "stop" if remedy else "ok", remedy)
    if os.path.isdir(name):
        return Source("a folder on this machine", config=_config(name))
    return _from_hub("model", name)


def _data(name: str) -> Source:
    if name == SAMPLE:
        return Source("400 headlines that come with the package")
    if name != AG_NEWS:
        return Source("on this machine")
    return _from_hub("dataset", name)


def _config(source: str | Path) -> PreTrainedConfig | None:
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):  # loading will say what is wrong with it
        return None


def _from_hub(kind: str, name: str) -> Source:
    api = HfApi()
    try:
        info = api.repo_info(name, repo_type=kind, files_metadata=True, timeout=HUB_SECONDS + 1)
        if info.gated:
            api.auth_check(name, repo_type=kind)
    except HFValidationError:
        return Source(
            "neither a folder here nor a name on the hub",
            "stop",
            "Check QLORA_BASE_MODEL or the form.",
        )
    except GatedRepoError:
        return _cached(kind, name) or Source(
            "on the hub, but it asks for a token whose owner has accepted its conditions",
            "stop",
            f"Accept them at https://huggingface.co/{name} and give that account's read token as Colab's secret HF_TOKEN (elsewhere the "
            f"environment variable); or choose {_OPEN}, which needs none.",
        )
    except RepositoryNotFoundError:
        return _cached(kind, name) or Source(
            f"the hub has no such {kind}, or it is private",
            "stop",
            "Check the name; a private one needs a token (HF_TOKEN) of an account that may read it.",
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            return _cached(kind, name) or Source(
                "the hub refuses the token",
                "stop",
                "Make a new one, to read, at "
                "https://huggingface.co/settings/tokens; or remove HF_TOKEN where none is needed.",
            )
        return _not_reached(kind, name, f"it answers {status}")
    except Exception as error:  # of a dozen kinds: offline, names, proxies, certificates
        return _not_reached(kind, name, type(error).__name__)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    used = _WANTED[kind](sizes)
    if not used:
        return Source(
            f"it holds no {'weights as safetensors' if kind == 'model' else 'Parquet files'}",
            "stop",
            "Choose another one.",
        )
    left = sum(
        sizes[file]
        for file in used
        if not isinstance(
            try_to_load_from_cache(name, file, revision=info.sha, repo_type=kind), str
        )
    )
    whole = sum(sizes[file] for file in used)
    what = f"{_size(left)} to download" if left else "in the hub cache"
    return Source(
        f"on the hub, {_size(whole)}: {what}",
        download=left,
        config=_hub_config(name, info.sha) if kind == "model" and name not in MISTRALS else None,
    )


def _hub_config(name: str, commit: str) -> PreTrainedConfig | None:
    try:
        return _config(Path(hf_hub_download(name, "config.json", revision=commit)).parent)
    except OSError:  # loading will say what is wrong
        return None


def _not_reached(kind: str, name: str, why: str) -> Source:
    return _cached(kind, name) or Source(
        f"not in the hub cache, and the hub cannot be reached ({why})",
        "stop",
        f"Check the connection and run again; {_ELSE[kind]}.",
    )


def _cached(kind: str, name: str) -> Source | None:
    """What the hub cache holds of it, if that is enough to load it."""
    folder = cached(name, kind, _WANTED[kind])
    return folder and Source(
        "in the hub cache: no network needed", config=_config(folder) if kind == "model" else None
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
