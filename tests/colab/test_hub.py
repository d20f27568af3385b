"""Files of the hub, over real sockets: what is fetched, what is cached, and how it fails."""

import io
import json
import logging
import traceback
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from fake_hub import COMMIT, FakeHub
from huggingface_hub import constants, file_download

from qlora_helpers import HeadlineClassifier, model
from qlora_helpers.colab import hub
from qlora_helpers.config import AG_NEWS, PROFILES, RunConfig
from qlora_helpers.data import load_rows
from qlora_helpers.errors import DataError, ModelError
from qlora_helpers.model import load_base_model, load_tokenizer

CONFIG = RunConfig(profile="t4", **PROFILES["t4"])
MODEL = CONFIG.base_model
ADAPTER = "adapters/news"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub that knows nothing, and an empty cache. It answers in time on a busy machine."""
    fake = FakeHub()
    fake.use(monkeypatch, tmp_path)
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 300)
    # the library waits a second between two tries
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    yield fake
    fake.close()


@pytest.fixture(scope="module")
def checkpoint(tiny) -> dict[str, bytes]:
    """The files of a base model, without the chat template, which nothing here reads."""
    return {
        path.name: path.read_bytes() for path in Path(tiny).iterdir() if path.suffix != ".jinja"
    }


@pytest.fixture(scope="module")
def news(tmp_path_factory) -> dict[str, bytes]:
    """AG News' two files, with two rows each."""
    path, files = tmp_path_factory.mktemp("news") / "one.parquet", {"README.md": b"# AG News"}
    for split in ("train", "test"):
        rows = {"text": [f"{split} one", f"{split} two"], "label": [2, 0]}
        pd.DataFrame(rows).to_parquet(path, index=False)
        files[f"data/{split}-00000-of-00001.parquet"] = path.read_bytes()
    return files


def fetch(name: str, kind: str = "model") -> Path:
    patterns = hub.CHECKPOINT_FILES if kind == "model" else hub.DATASET_FILES
    return hub.fetch(name, kind, patterns, ModelError, "Or not.")


def refused(name: str, kind: str = "model") -> str:
    """Return the reason that `fetch` gives."""
    with pytest.raises(ModelError) as raised:
        fetch(name, kind)
    before, after = f"{name} cannot be loaded from the hub: ", " Or not."
    assert str(raised.value).startswith(before) and str(raised.value).endswith(after)
    return str(raised.value).removeprefix(before).removesuffix(after)


def fetched(server: FakeHub) -> set[str]:
    """Return the files whose content was asked for."""
    gets = [request for request in server.requests if request.startswith("GET ")]
    return {get.partition(f"/resolve/{COMMIT}/")[2] for get in gets} - {""}


def test_what_loading_reads_is_fetched_once_and_no_network_is_then_needed(
    server, checkpoint, news, monkeypatch
):
    others = ("pytorch_model.bin", "consolidated.safetensors", "chat_template.jinja", "README.md")
    server.repositories |= {MODEL: checkpoint | dict.fromkeys(others, b"x"), AG_NEWS: news}

    def check():
        rows = {split: table.to_dict("list") for split, table in load_rows(CONFIG).items()}
        assert rows == {
            split: {"raw": [f"{split} one", f"{split} two"], "label": [2, 0]}
            for split in ("train", "test")
        }
        model._fetched.clear()
        assert len(load_tokenizer(CONFIG)) == 4000
        loaded = load_base_model(CONFIG)
        assert (loaded.name_or_path, loaded.config._commit_hash) == (MODEL, COMMIT)

    check()
    # the tokenizer's files, and all
    assert server.requests.count(f"GET api/models/{MODEL}") == 2
    assert fetched(server) == set(checkpoint) | set(news) - {"README.md"}
    for server.status in (200, 503, 429):
        server.requests.clear()
        check()
        assert fetched(server) == set()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    check()
    assert server.requests == []


@pytest.mark.parametrize(
    ("status", "kind", "why"),
    [
        (401, "model", "with no token the hub answers 401. Check the name; a private model needs"),
        (403, "model", "it has conditions, and with no token the hub answers 403. Accept them at"),
        (404, "dataset", "there is no such dataset (404). Check the name."),
        (429, "model", "this address asked too often (429). Wait a few minutes, or set HF_TOKEN."),
        (500, "model", "the hub itself is out of order (500). Wait a few minutes and try again."),
        (503, "dataset", "the hub itself is out of order (503). Wait a few minutes"),
    ],
)
def test_a_hub_that_refuses_is_asked_once(server, status, kind, why):
    server.status = status
    assert refused("some/one", kind).startswith(why)
    assert server.asked("some/one") == [f"GET api/{kind}s/some/one"]


def test_conditions_name_the_page_and_the_token(server, monkeypatch):
    server.status = 403
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    assert refused("some/one", "dataset") == (
        "it has conditions, and with the token in HF_TOKEN the hub answers 403. Accept them at "
        f"{server.url}/datasets/some/one, and set HF_TOKEN to a read token of the account that did."
    )


def unreachable(url: str, kind: str) -> str:
    return (
        f"{url} cannot be reached, or stopped answering ({kind}). Check the connection and run "
        "this cell again: complete files are kept, an unfinished one begins anew. If it stops once "
        "more, try on a new machine (in Colab: Runtime > Disconnect and delete runtime)."
    )


def test_a_hub_that_takes_the_connection_and_never_answers(server, monkeypatch):
    server.status = 0
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.5)
    assert refused("some/one") == unreachable(server.url, "ReadTimeout")
    assert len(server.asked("some/one")) == 1


@pytest.mark.parametrize(
    ("name", "kind"), [("dies/one", "RemoteProtocolError"), ("stalls/one", "ReadTimeout")]
)
def test_a_download_that_ends_half_way(server, monkeypatch, name, kind):
    if kind == "ReadTimeout":
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    server.repositories[name] = {"model.safetensors": b"x" * 1000}
    assert refused(name) == unreachable(server.url, kind)
    # once, and five times more from where it stopped
    assert len([one for one in server.asked(name) if "GET" in one and "/resolve/" in one]) == 6
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    blobs = [path for path in Path(constants.HF_HUB_CACHE).rglob("blobs/*") if path.stat().st_size]
    assert not blobs  # the next try begins the file anew


def test_a_tokenizer_needs_no_weights_and_weights_need_more_than_a_tokenizer(
    server, checkpoint, monkeypatch
):
    monkeypatch.setattr(model, "_fetched", {})
    server.repositories[MODEL] = checkpoint
    load_tokenizer(CONFIG)
    assert fetched(server) == {name for name in checkpoint if not name.endswith(".safetensors")}
    server.status = 503
    load_tokenizer(CONFIG)
    with pytest.raises(ModelError, match="the hub itself is out of order .503."):
        load_base_model(CONFIG)
    server.status = 200
    load_base_model(CONFIG)


def test_a_part_of_a_repository_is_not_enough_without_the_hub(server, checkpoint):
    server.repositories["some/one"] = checkpoint
    folder = fetch("some/one")
    assert {path.name for path in folder.iterdir()} == set(checkpoint)
    (folder / "model.safetensors").unlink()
    server.status = 503
    assert refused("some/one").startswith("the hub itself is out of order (503)")
    server.status = 200
    assert fetch("some/one") == folder and (folder / "model.safetensors").exists()


def test_a_hub_that_is_not_there(server, monkeypatch):
    server.close()
    assert refused("some/one") == unreachable(server.url, "ConnectError")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    why = "HF_HUB_OFFLINE is set, and the hub's cache does not hold it. Unset it."
    assert refused("some/one") == why


def unwritable(why: str) -> str:
    cache = constants.HF_HUB_CACHE
    return f"{cache} cannot be written ({why}). Make room there, or set HF_HOME to another folder."


def test_a_full_disk(server, monkeypatch):
    server.repositories["some/one"] = {"model.safetensors": b"x"}
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: (_ for _ in ()).throw(full))
    assert refused("some/one") == unwritable("No space left on device")


def test_an_unwritable_cache(server, monkeypatch, tmp_path):
    server.repositories["some/one"] = {"model.safetensors": b"x"}
    (tmp_path / "a file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "a file" / "cache"))
    assert refused("some/one") == unwritable("Not a directory")


@pytest.mark.parametrize(
    ("name", "status"), [("some/one", 403), ("some/one", 503), ("some/one", 0), ("dies/one", 200)]
)
def test_a_password_for_the_hub_is_not_printed(server, monkeypatch, capfd, name, status):
    """Nor logged by the library, which says where it tries a download again."""
    template, log = constants.HUGGINGFACE_CO_URL_TEMPLATE, io.StringIO()
    for setting, url in ("ENDPOINT", server.url), ("HUGGINGFACE_CO_URL_TEMPLATE", template):
        monkeypatch.setattr(constants, setting, url.replace("//", "//me:secret@"))
    (handler,) = logging.getLogger("huggingface_hub").handlers
    monkeypatch.setattr(handler, "stream", log)
    server.repositories["dies/one"] = {"model.safetensors": b"x" * 1000}
    server.status = status
    if status == 0:
        server.close()
    with pytest.raises(ModelError) as raised:
        fetch(name)
    said = "".join([*traceback.format_exception(raised.value), *capfd.readouterr()])
    assert f"{name} cannot be loaded" in said and "secret" not in said + log.getvalue()
    assert (f"{server.url}/dies/one/resolve" in log.getvalue()) == (status == 200)


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "no such name"])
def test_a_name_that_is_neither_a_folder_nor_on_the_hub(server, name):
    why = "it is neither a folder here nor a name such as account/name. Check the name."
    assert refused(name) == why
    assert server.requests == []


def test_a_repository_without_what_is_needed(server):
    server.repositories["some/one"] = {"config.json": b"{}", "pytorch_model.bin": b""}
    why = "it holds no {} that could be used here. Check the name."
    assert refused("some/one") == why.format("weights as safetensors")
    assert refused("some/one", "dataset") == why.format("Parquet files")


def test_an_adapter_is_the_newest_that_can_be_had(server, tuned):
    """Its settings and weights alone; what the cache holds if the hub does not answer."""
    with pytest.raises(ModelError, match="no such model.*An adapter holds qlora_config.json"):
        HeadlineClassifier.from_adapter(ADAPTER)
    files = {path.name: path.read_bytes() for path in (tuned / "adapter").iterdir()}
    alone = HeadlineClassifier.from_adapter(tuned / "adapter")

    def check():
        one = HeadlineClassifier.from_adapter(ADAPTER)
        assert one.temperature == alone.temperature
        assert one.probabilities(["Rain"]).tolist() == alone.probabilities(["Rain"]).tolist()

    for server.commit, alone.temperature in ((COMMIT, 1.5), (COMMIT[::-1], 3.0)):
        calibration = json.dumps({"temperature": alone.temperature}).encode()
        server.repositories[ADAPTER] = files | {"calibration.json": calibration, "x.py": b"1 / 0"}
        check()
    server.status = 503
    check()
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.py"))


def test_the_errors_of_rows_and_models_say_what_else_can_be_done(server):
    server.status = 404
    with pytest.raises(DataError, match="Check the name. Or set QLORA_DATA to a folder"):
        load_rows(CONFIG)
    with pytest.raises(ModelError, match="Check the name. Or set QLORA_BASE_MODEL to a folder"):
        load_tokenizer(CONFIG)
