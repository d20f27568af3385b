"""Files of a hub repository: looked for in the hub's cache, else asked for, else one message within half a minute."""

import fnmatch
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import logging, tqdm

from qlora_helpers.colab.threads import start
from qlora_helpers.errors import QLoraError

ANSWER_SECONDS = 8  # for the list of files
SILENCE_SECONDS = 15  # without a byte, before a download is given up
_SHARD = r"model-\d{5}-of-(\d{5})\.safetensors"
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "token*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "*.jinja",
)


def fetch(
    name: str,
    kind: str,
    wanted: Callable[[Iterable[str]], list[str]],
    error: type[QLoraError],
    otherwise: str,
    newest: bool = False,
) -> Path:
    """The folder with the files of the hub's `name` ("model" or "dataset": its `kind`) that `wanted` picks from a list of names.
    Nothing is asked where the cache holds them whole, so that a run goes on without a network; for the `newest`, only where the hub does
    not give them. Raises `error`, with what to do in words and `otherwise`, if the hub does not answer within 8 s or a download brings no
    byte for 15."""
    folder = cached(name, kind, wanted)
    if folder and not newest:
        return folder
    silence = _Silence()
    # A thread, since names that do not resolve and trickling answers escape the hub's own time-outs, and its downloads begin again
    # for as long as a byte comes. One that is given up ends with its next byte, or with the process.
    download = start(partial(_download, name, kind, wanted, silence))
    try:
        while not download.done() and silence.seconds() < SILENCE_SECONDS:
            wait([download], 0.1)
    finally:
        silence.given_up = True
    # the hub raises a dozen kinds; the reader needs one message
    reason = (
        download.exception()
        if download.done()
        else TimeoutError(f"nothing came for {SILENCE_SECONDS} s")
    )
    if reason is None:
        return download.result()
    if folder:
        return folder
    raise error(
        f"{name} cannot be loaded from the hub: {explain(name, kind, reason)} {otherwise}"
    ) from reason


def files(name: str, kind: str) -> tuple[str, dict[str, int]]:
    """The newest commit of the hub's `name`, and the bytes of each of its files. One request of 8 s at most, not repeated; raises what
    huggingface_hub raises, for `explain`."""
    info = HfApi().repo_info(name, repo_type=kind, files_metadata=True, timeout=ANSWER_SECONDS)
    return info.sha, {file.rfilename: file.size or 0 for file in info.siblings}


def cached(name: str, kind: str, wanted: Callable[[Iterable[str]], list[str]]) -> Path | None:
    """The newest snapshot of `name` in the hub's cache, if what `wanted` picks there is enough to load."""
    try:
        storage = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)
        folder = (
            storage / "snapshots" / (storage / "refs" / "main").read_text(encoding="utf-8").strip()
        )
        return folder if wanted(file_names(folder)) else None
    except (OSError, ValueError):
        return None


def file_names(folder: Path) -> list[str]:
    """What is in `folder`, relative to it; not a link whose file is gone."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def checkpoint_files(names: Iterable[str]) -> list[str]:
    """The files that loading a checkpoint reads: settings, tokenizer and the weights as safetensors once, in one file or in shards; not the
    same weights in other formats. Empty if the weights are not there whole."""
    names = sorted(names)
    shards = [(name, int(match[1])) for name in names if (match := re.fullmatch(_SHARD, name))]
    weights = [name for name in names if name == "model.safetensors"] or [
        name for name, count in shards if count == len(shards)
    ]
    settings = [
        name
        for name in names
        if "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in _SETTINGS)
    ]
    whole = (
        weights and "config.json" in names and {"tokenizer.json", "tokenizer.model"} & set(names)
    )
    return settings + weights if whole else []


def explain(name: str, kind: str, reason: Exception) -> str:
    """What went wrong with the hub's `name`, and the remedy, in words."""
    while isinstance(reason, LocalEntryNotFoundError) and reason.__cause__:
        reason = reason.__cause__
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    token = "the token in HF_TOKEN" if get_token() else "no token"
    status = getattr(getattr(reason, "response", None), "status_code", None)
    if isinstance(reason, GatedRepoError) or status == 403:
        return (
            f"it has conditions, and with {token} the hub answers {status}. Accept them at {page}, and set HF_TOKEN to a read token of "
            "the account that did."
        )
    match status:
        case 401:
            return (
                f"with {token} the hub answers 401. Check the name; a private {kind} needs a token (HF_TOKEN), and an expired one is "
                "worse than none: make a new one or unset it."
            )
        case 404:
            return f"there is no such {kind} (404). Check the name."
        case 429:
            return "too many requests came from this address (429). Wait a few minutes and run this cell again, or set HF_TOKEN."
        case int(status) if status >= 500:
            return f"the hub itself is out of order ({status}). Wait a few minutes and run this cell again."
    match reason:
        case OfflineModeIsEnabled():
            return f"HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not hold it whole. Unset it, or bring the cache along."
        case HFValidationError():
            return "it is neither a folder here nor a name such as account/name. Check the name."
        case _Unusable():
            return str(reason)
        case OSError(errno=28):
            return f"the disk of {constants.HF_HUB_CACHE} is full. Make room, or set HF_HOME to another disk."
    return (
        f"{constants.ENDPOINT} cannot be reached, or stopped answering ({type(reason).__name__}). Check the connection and run this "
        "cell again: a download goes on where it stopped."
    )


def _download(name: str, kind: str, wanted: Callable, silence: "_Silence") -> Path:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the hub's library tells of each of its attempts
    try:
        commit, sizes = files(name, kind)
        picked = wanted(sizes)
        if not picked:
            raise _Unusable(
                f"it holds no {'weights as safetensors' if kind == 'model' else 'Parquet files'} that could be used here. "
                "Check the name."
            )
        for file in picked:
            silence.broken()
            path = hf_hub_download(
                name, file, repo_type=kind, revision=commit, tqdm_class=silence.bar
            )
        folder = Path(path).parents[file.count("/")]
        ref = (
            folder.parents[1] / "refs" / "main"
        )  # a download by its commit leaves none, and `cached` looks for it
        ref.parent.mkdir(exist_ok=True)
        ref.write_text(commit, encoding="utf-8")
        return folder
    finally:
        logging.set_verbosity(verbosity)


class _Unusable(Exception):
    """A repository that was reached, and does not hold what is wanted."""


class _Silence:
    """How long ago a download last came further than ever before, and its bar, which tells that."""

    def __init__(self):
        self.since, self.given_up = time.monotonic(), False
        silence = self

        class Bar(tqdm):
            done = furthest = 0

            def update(self, n=1):
                if silence.given_up:
                    raise InterruptedError("given up")
                self.done += n or 0
                if self.done > self.furthest:  # not a download that begins from 0 again and again
                    self.furthest = self.done
                    silence.broken()
                return super().update(n)

        self.bar = Bar

    def broken(self):
        self.since = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self.since
