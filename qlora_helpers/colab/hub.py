"""Files of a hub repository: downloaded, taken from the cache, or a message that says why not."""

import errno
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import filter_repo_objects

from qlora_helpers.colab.machine import on_kaggle
from qlora_helpers.errors import QLoraError, reason

ANSWER_SECONDS = 8  # for the list of a repository's files
TOKENIZER_FILES = ("*.json", "*.txt", "*.model")  # of a base model, and its settings
# and its weights, not the same weights in other formats
CHECKPOINT_FILES = (*TOKENIZER_FILES, "model.safetensors", "model-*.safetensors")
MOST_LAYERS = 256  # of a base model: twice those of the largest
DATASET_FILES = ("data/train-*.parquet", "data/test-*.parquet")  # of AG News


def fetch(
    name: str, kind: str, patterns: Sequence[str], error: type[QLoraError], otherwise: str
) -> Path:
    """Return the folder with the files of the hub's `name` that match `patterns`.

    They are those of the newest commit, or the cached ones if the hub does not give the newest. The
    hub has 8 seconds to answer. A download ends after five retries without a byte, each of 10
    seconds (HF_HUB_DOWNLOAD_TIMEOUT). `kind` is "model" or "dataset". Raises `error` if the files
    can be had neither way; its message ends with `otherwise`, which says what to do instead.
    """
    # Xet is reported to freeze on Colab (huggingface_hub#4085); plain HTTP has a time-out
    constants.HF_HUB_DISABLE_XET = True
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_hide_password)  # once: a filter that is there is not added again
    try:
        list_files(name, kind, patterns)  # snapshot_download has no time-out for its first answer
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=list(patterns)))
    except Exception as failure:  # of a dozen kinds: names, conditions, connections, disks
        if folder := cached(name, kind, patterns):
            return folder
        message = f"{name} cannot be loaded from the hub: {explain(name, kind, failure)}"
        raise error(f"{message} {otherwise}") from None  # its text may hold a password


def check_checkpoint(folder: Path) -> None:
    """Raise ValueError for files that would hang the libraries, or ask for what is not done here.

    Links are followed: the hub's cache consists of them.
    """
    for path in folder.iterdir():
        if not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path.name} is not an ordinary file")
        if path.suffix in (".json", ".txt", ".model", ".jinja") and path.stat().st_size > 2**28:
            raise ValueError(f"{path.name} is longer than 256 MiB")
    if (folder / "adapter_config.json").exists():
        # Transformers would apply it, and go on to the base model that it names.
        raise ValueError("it holds adapter_config.json, and so is an adapter")
    if not (folder / "config.json").exists():
        raise ValueError("it holds no config.json")
    settings = json.loads((folder / "config.json").read_bytes())
    if not isinstance(settings, dict):
        raise ValueError("its config.json is not a JSON object")
    for part in (settings, settings.get("text_config") or {}):
        for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
            if (part.get(name) or 1) not in range(1, MOST_LAYERS + 1):
                raise ValueError(f"its {name} is {part[name]!r}: it must be 1 to {MOST_LAYERS}")
    quantised = settings.get("quantization_config") or {"load_in_4bit": True}
    method = quantised.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or not quantised.get("load_in_4bit"):
        raise ValueError(
            f"its weights are quantised by {str(method)[:40]}; only plain ones and those in 4 bits "
            "of bitsandbytes can be used here"
        )


def list_files(name: str, kind: str, patterns: Sequence[str]) -> tuple[str, dict[str, int]]:
    """Return the newest commit of the hub's `name`, and the bytes of its files by their names.

    Raises: what huggingface_hub raises, for `explain`; EntryNotFoundError if `patterns` ask for
        weights or rows, and there are none.
    """
    info = HfApi().repo_info(name, repo_type=kind, files_metadata=True, timeout=ANSWER_SECONDS)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    names = list(filter_repo_objects(sizes, allow_patterns=list(patterns)))
    needed = [pattern for pattern in patterns if pattern.endswith((".safetensors", ".parquet"))]
    if needed and not any(filter_repo_objects(sizes, allow_patterns=needed)):
        raise EntryNotFoundError(f"{name} has no file that matches {patterns}")
    return info.sha, {file: sizes[file] for file in names}


def cached(name: str, kind: str, patterns: Sequence[str]) -> Path | None:
    """Return the folder of `name` in the hub's cache, or None if files are known to be missing."""
    options = {"allow_patterns": list(patterns), "local_files_only": True}
    try:
        return Path(snapshot_download(name, repo_type=kind, **options))
    except (OSError, ValueError):
        return None


def _without_password(text: str) -> str:
    """Return `text` without the name and password of any URL in it."""
    return re.sub(r"//[^/\s]*@", "//", text)


def _hide_password(record: logging.LogRecord) -> bool:
    record.msg, record.args = _without_password(record.getMessage()), None
    return True


def explain(name: str, kind: str, error: Exception) -> str:
    """Return what went wrong with the hub's `name`, and the remedy."""
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    token = "the token in HF_TOKEN" if get_token() else "no token"
    endpoint = _without_password(constants.ENDPOINT)
    status = getattr(getattr(error, "response", None), "status_code", None) or 0
    if isinstance(error, GatedRepoError) or status == 403:
        page = f"{endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
        return (
            f"it has conditions, and with {token} the hub answers {status}. Accept them at {page}, "
            "and set HF_TOKEN to a read token of the account that did."
        )
    if status == 401:
        why = f"with {token} the hub answers 401. Check the name; a private {kind} needs a token"
        return f"{why} (HF_TOKEN). Replace or remove a token that has expired."
    if status == 404:
        return f"there is no such {kind} (404). Check the name."
    if status == 429:
        return "this address asked too often (429). Wait a few minutes, or set HF_TOKEN."
    if status >= 500:
        return f"the hub itself is out of order ({status}). Wait a few minutes and try again."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and the hub's cache does not hold it. Unset it."
    if isinstance(error, HFValidationError):
        return "it is neither a folder here nor a name such as account/name. Check the name."
    if isinstance(error, EntryNotFoundError):
        files = "weights as safetensors" if kind == "model" else "Parquet files"
        return f"it holds no {files} that could be used here. Check the name."
    if getattr(error, "filename", None) or getattr(error, "errno", None) == errno.ENOSPC:
        why = f"{constants.HF_HUB_CACHE} cannot be written ({reason(error)})"
        return f"{why}. Make room there, or set HF_HOME to another folder."
    check = "Switch on Settings > Internet" if on_kaggle() else "Check the connection"
    return (
        f"{endpoint} cannot be reached, or stopped answering ({type(error).__name__}). "
        f"{check} and run this cell again: complete files are kept, an unfinished one begins anew. "
        "If it stops once more, try on a new machine (in Colab: Runtime > Disconnect and delete "
        "runtime)."
    )
