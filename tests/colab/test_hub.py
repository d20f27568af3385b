"""The hub as it fails, over real sockets: a server on this machine, and a reader in a process."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest
from fake_hub import COMMIT, FakeHub, write_cache

import qlora_helpers
from qlora_helpers import HeadlineClassifier
from qlora_helpers.colab.hub import ANSWER_SECONDS, SILENCE_SECONDS, checkpoint_files
from qlora_helpers.config import AG_NEWS, PROFILES
from qlora_helpers.data import parquet_files
from qlora_helpers.errors import ModelError
from qlora_helpers.model import load_tokenizer

MODEL = PROFILES["t4"]["base_model"]
ADAPTER = "adapters/news"
PARQUET = ("data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_READER = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from huggingface_hub import constants
from qlora_helpers import HeadlineClassifier
from qlora_helpers.colab import hub
from qlora_helpers.adapter import find_adapter
from qlora_helpers.config import PROFILES, RunConfig
from qlora_helpers.data import load_rows
from qlora_helpers.errors import ModelError, QLoraError
from qlora_helpers.colab.hub import checkpoint_files, fetch
from qlora_helpers.model import load_base_model, load_tokenizer

config = RunConfig(profile="t4", **PROFILES["t4"])
calls = {
    "rows": lambda: {split: table.to_dict("list") for split, table in load_rows(config).items()},
    "tokenizer": lambda: len(load_tokenizer(config)),
    "model": lambda: (model := load_base_model(config)).name_or_path + " " + model.config._commit_hash,
    "adapters/news": lambda: ((classifier := HeadlineClassifier.from_adapter("adapters/news")).probabilities(["Rain"]).tolist(),
                              classifier.temperature, sorted(file.name for file in find_adapter("adapters/news").iterdir())),
}

def call(name):
    try:
        return calls[name]() if name in calls else str(fetch(name, "model", checkpoint_files, ModelError, "Or not."))
    except QLoraError as error:
        return f"{type(error).__name__}: {error}"

as_started = dict(vars(constants))
for line in sys.stdin:
    names, (hub.ANSWER_SECONDS, hub.SILENCE_SECONDS, timeout), settings = json.loads(line)
    vars(constants).update(as_started, HF_HUB_ETAG_TIMEOUT=timeout, HF_HUB_DOWNLOAD_TIMEOUT=timeout, **settings)
    with ThreadPoolExecutor() as pool:  # at once: they wait more than they work
        print("answers", json.dumps(list(pool.map(call, names))), flush=True)
"""
# the seconds that a reader waits for a list, for a byte, and within the hub's own library
PATIENT = (300, 300, 300)  # what is answered is in time, on a busy machine too
NO_ANSWER, NO_BYTE = (1, 300, 1), (300, 3, 1)  # for a hub that never sends them
HANGING = 400  # seconds after which a reader is killed


class Reader:
    """A process that loads the profile t4's rows, tokenizer and model, or a repository by its name,
    from a hub into a cache of its own."""

    def __init__(self, folder: Path, hub: FakeHub):
        self.cache = folder / "hub"
        self.log = (folder / "stderr").open("w+")
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith("HF_") and "proxy" not in key.lower()
        }
        own = {"HF_HOME": str(folder), "HF_ENDPOINT": hub.url, "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _READER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=Path(qlora_helpers.__file__).parents[1],
            env=clean | own,
        )

    def __call__(self, *names: str, patience: tuple = PATIENT, **settings) -> dict:
        """What each of `names` gave, with `settings` of huggingface_hub for this call alone."""
        self.process.stdin.write(json.dumps([names, patience, settings]) + "\n")
        self.process.stdin.flush()
        guard = threading.Timer(HANGING, self.process.kill)
        guard.start()
        try:
            for line in self.process.stdout:
                if line.startswith("answers "):
                    found = json.loads(line.removeprefix("answers "))
                    answers = dict(zip(names, found, strict=True))
                    print(*(f"{name}: {answer}" for name, answer in answers.items()), sep="\n")
                    return answers
        finally:
            guard.cancel()
        raise AssertionError(f"it gave no answer, or none in {HANGING} s: {self.stderr()}")

    def stderr(self) -> str:
        return Path(self.log.name).read_text()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(300)
        self.process.stdout.close()
        self.log.close()


@pytest.fixture(scope="module")
def server():
    hub = FakeHub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def reader(server, tmp_path_factory):
    reader = Reader(tmp_path_factory.mktemp("hub"), server)
    yield reader
    reader.close()


@pytest.fixture
def hub(server):
    """The server, which knows nothing and answers nothing unusual when a test begins."""
    server.status, server.commit, server.requests = 200, COMMIT, []
    server.repositories.clear()
    return server


@pytest.fixture(scope="module")
def checkpoint(tiny) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(tiny).iterdir()}


@pytest.fixture(scope="module")
def news(tmp_path_factory) -> dict[str, bytes]:
    """AG News' two files, with two rows each."""
    folder, files = (
        tmp_path_factory.mktemp("news"),
        {"README.md": b"# AG News", ".gitattributes": b""},
    )
    for name in PARQUET:
        pd.DataFrame(
            {"text": [f"{name[5:7]} one", f"{name[5:7]} two"], "label": [2, 0]}
        ).to_parquet(folder / "one.parquet", index=False)
        files[name] = (folder / "one.parquet").read_bytes()
    return files


ROWS = {
    "train": {"raw": ["tr one", "tr two"], "label": [2, 0]},
    "test": {"raw": ["te one", "te two"], "label": [2, 0]},
}
OUT = {
    "rows": (
        "DataError",
        AG_NEWS,
        "Or set QLORA_DATA to a folder with train.csv and test.csv, or QLORA_DATA=sample",
    ),
    "tokenizer": (
        "ModelError",
        MODEL,
        "Or set QLORA_BASE_MODEL to a folder with a checkpoint, or QLORA_PROFILE=cpu",
    ),
    "model": (
        "ModelError",
        MODEL,
        "Or set QLORA_BASE_MODEL to a folder with a checkpoint, or QLORA_PROFILE=cpu",
    ),
    ADAPTER: (
        "ModelError",
        ADAPTER,
        "An adapter holds qlora_config.json, adapter_config.json and adapter_model.safetensors, as",
    ),
}


def check(answers: dict, *remedies: str) -> None:
    """Each answer is one error that names the thing, what to do, and the way out."""
    for name, answer in answers.items():
        kind, thing, way_out = OUT[name]
        assert isinstance(answer, str) and answer.startswith(
            f"{kind}: {thing} cannot be loaded from the hub: "
        ), answer
        for part in (*remedies, way_out):
            assert part in answer, answer


def quiet(reader: Reader) -> bool:
    """No traceback, and nothing of the hub library's own attempts."""
    return not any(
        word in reader.stderr()
        for word in ("Traceback", "Retrying", "thrown while", "Trying to resume", "retry")
    )


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "with no token the hub answers 401. Check the name; a private"),
        (403, "it has conditions, and with no token the hub answers 403. Accept them at http"),
        (404, "(404). Check the name."),
        (429, "(429). Wait a few minutes and run this cell again, or set HF_TOKEN"),
        (500, "the hub itself is out of order (500). Wait a few minutes"),
        (503, "the hub itself is out of order (503). Wait a few minutes"),
    ],
)
def test_a_hub_that_refuses_is_asked_once(hub, reader, status, remedy):
    hub.status = status
    check(reader("rows", "tokenizer", "model"), remedy)
    assert sorted(hub.asked(MODEL, AG_NEWS)) == [f"GET api/datasets/{AG_NEWS}"] + 2 * [
        f"GET api/models/{MODEL}"
    ]
    assert quiet(reader)


def test_a_reader_is_told_within_half_a_minute():
    assert ANSWER_SECONDS < SILENCE_SECONDS < 30


def test_a_hub_that_takes_the_connection_and_never_answers(hub, reader):
    hub.status = 0
    check(
        reader(*OUT, patience=NO_ANSWER),
        "cannot be reached, or stopped answering (ReadTimeout). Check the connection",
    )
    assert len(hub.asked(MODEL, AG_NEWS, ADAPTER)) == 4
    assert quiet(reader)


def test_downloads_that_end_half_way(hub, reader, checkpoint):
    """A server that dies for good, one that begins the file again and again, one that falls silent; and a list that trickles."""
    names = ["dies/x", "restarts/x", "stalls/x", "trickles/x"]
    hub.repositories |= dict.fromkeys(names, checkpoint)
    for name, answer in reader(*names, patience=NO_BYTE).items():
        assert answer.startswith(
            f"ModelError: {name} cannot be loaded from the hub: {hub.url} cannot be reached, or stopped"
        ), answer
        assert answer.endswith(
            "Check the connection and run this cell again: a download goes on where it stopped. Or not."
        )
    assert quiet(reader)


def test_what_is_there_is_fetched_once_and_loads(hub, reader, checkpoint, news):
    """Only what loading reads; then nothing more is asked, and nothing is missed when the hub is gone."""
    others = {
        "pytorch_model.bin": b"x" * 99,
        "consolidated.safetensors": b"y" * 99,
        "onnx/config.json": b"{}",
    }
    hub.repositories |= {MODEL: checkpoint | others, AG_NEWS: news}
    expected = {"rows": ROWS, "tokenizer": 49152, "model": f"{MODEL} {COMMIT}"}
    for name in expected:
        assert reader(name)[name] == expected[name]
    fetched = {
        request.partition(f"{COMMIT}/")[2]
        for request in hub.asked(MODEL, AG_NEWS)
        if request.startswith("GET ")
    } - {""}
    assert fetched == set(checkpoint_files(checkpoint)) | set(PARQUET)
    hub.requests.clear()
    assert reader(*expected) == expected
    assert hub.asked(MODEL, AG_NEWS) == []


def test_an_adapter_is_the_newest_that_can_be_had(hub, reader, tuned):
    """Its settings and weights and nothing else; what the cache holds only where the hub does not answer."""
    check(reader(ADAPTER), "there is no such model (404). Check the name.")
    hub.repositories[ADAPTER] = {"config.json": b"{}", "model.safetensors": b""}
    check(reader(ADAPTER), "it holds no weights as safetensors that could be used here")
    files = {path.name: path.read_bytes() for path in (tuned / "adapter").iterdir()}
    alone = HeadlineClassifier.from_adapter(tuned / "adapter")
    for commit, temperature in ((COMMIT, 1.5), (COMMIT[::-1], 3.0)):
        hub.commit, alone.temperature = commit, temperature
        hub.repositories[ADAPTER] = files | {
            "calibration.json": json.dumps({"temperature": temperature}).encode(),
            "train.py": b"1 / 0",
        }
        expected = [
            alone.probabilities(["Rain"]).tolist(),
            temperature,
            [
                "adapter_config.json",
                "adapter_model.safetensors",
                "calibration.json",
                "qlora_config.json",
            ],
        ]
        assert reader(ADAPTER)[ADAPTER] == expected
    for hub.status in (503, 0):
        assert reader(ADAPTER, patience=NO_ANSWER)[ADAPTER] == expected
    assert quiet(reader)


def test_a_name_that_does_not_resolve_and_a_cache_that_comes_along(
    reader, checkpoint, news, tmp_path
):
    settings = {"ENDPOINT": "http://no-such-hub.invalid", "HF_HUB_CACHE": str(tmp_path)}
    check(
        reader("rows", "tokenizer", "model", **settings),
        "http://no-such-hub.invalid cannot be reached, or stopped answering (ConnectError)",
    )
    write_cache(tmp_path, "model", MODEL, checkpoint)
    write_cache(tmp_path, "dataset", AG_NEWS, news)
    assert reader("rows", "tokenizer", "model", **settings) == {
        "rows": ROWS,
        "tokenizer": 49152,
        "model": f"{MODEL} {COMMIT}",
    }
    assert quiet(reader)


def test_offline_from_the_cache_or_not_at_all(hub, reader, checkpoint, news, tmp_path):
    settings = {"HF_HUB_OFFLINE": True, "HF_HUB_CACHE": str(tmp_path)}
    check(
        reader("rows", "tokenizer", "model", **settings),
        f"HF_HUB_OFFLINE is set, and {tmp_path} does not hold it whole.",
    )
    half = write_cache(tmp_path, "dataset", AG_NEWS, {PARQUET[0]: news[PARQUET[0]]})
    check(reader("rows", **settings), "does not hold it whole")
    (half / PARQUET[0]).unlink()
    write_cache(tmp_path, "model", MODEL, checkpoint)
    write_cache(tmp_path, "dataset", AG_NEWS, news)
    assert reader("rows", "tokenizer", "model", **settings) == {
        "rows": ROWS,
        "tokenizer": 49152,
        "model": f"{MODEL} {COMMIT}",
    }
    assert hub.asked(MODEL, AG_NEWS) == []
    assert quiet(reader)


def test_a_closed_port(reader, server):
    """The last of this file that needs the server: it is shut down."""
    server.close()
    shutil.rmtree(reader.cache)
    check(
        reader("rows", "tokenizer", "model"),
        f"{server.url} cannot be reached, or stopped answering (ConnectError)",
    )
    assert quiet(reader)


@pytest.mark.parametrize(
    ("names", "picked"),
    [
        (
            [
                "config.json",
                "tokenizer.json",
                "model.safetensors",
                "pytorch_model.bin",
                "consolidated.safetensors",
                "x/model.safetensors",
            ],
            ["config.json", "tokenizer.json", "model.safetensors"],
        ),
        (
            ["config.json", "tokenizer.model", *SHARDS, "model.safetensors.index.json"],
            ["config.json", "model.safetensors.index.json", "tokenizer.model", *SHARDS],
        ),
        (["config.json", "tokenizer.model", SHARDS[0], "model.safetensors.index.json"], []),
        (["config.json", "tokenizer.json", "pytorch_model.bin"], []),
        (["config.json", "model.safetensors"], []),
        (["tokenizer.json", "model.safetensors"], []),
    ],
)
def test_the_files_of_a_checkpoint(names, picked):
    assert checkpoint_files(names) == picked


@pytest.mark.parametrize(
    ("names", "whole"),
    [
        (PARQUET, True),
        (PARQUET[:1], False),
        (["data/test-00000-of-00001.parquet", "data/train-00000-of-00002.parquet"], False),
        (
            [
                "data/test-00000-of-00001.parquet",
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "README.md",
            ],
            True,
        ),
    ],
)
def test_the_files_of_the_news(names, whole):
    assert bool(parquet_files(names)) == whole


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "no such name"])
def test_a_name_that_is_neither_a_folder_nor_on_the_hub(config, name):
    with pytest.raises(
        ModelError,
        match="it is neither a folder here nor a name such as account/name. Check the name",
    ):
        load_tokenizer(dataclasses.replace(config, base_model=name))
