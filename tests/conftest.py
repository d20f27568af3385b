"""Fixtures of all tests: no settings but the cpu profile, the embedded model and a tiny one."""

import gc
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _auth
from lora_models import save_tiny
from peft import LoraConfig
from transformers import LlamaConfig, PreTrainedTokenizerBase

from qlora_helpers.adapter import save_adapter
from qlora_helpers.classifier import HeadlineClassifier
from qlora_helpers.colab import drive, hub_token, machine
from qlora_helpers.config import PROFILES, RunConfig
from qlora_helpers.model import attach_lora, load_base_model, load_tokenizer
from qlora_helpers.run.files import write_text
from qlora_helpers.run.workspace import Workspace

# Fixtures with the embedded model in memory, or with a run that the notebooks made with it.
REAL_MODEL = {"base", "notebook_workspace", "run_folder"}
LONG_SECONDS = 300  # so that no wait ends early on a busy machine
THREADS = torch.get_num_threads()
torch.set_num_threads(1)  # see the fixture `threads`


def settings() -> list[str]:
    return [name for name in os.environ if name.startswith("QLORA_")]


class NotebookRules:
    """Let nbval compare text alone: stderr holds progress bars, and pictures differ by a pixel."""

    def pytest_collectstart(self, collector):
        if hasattr(collector, "skip_compare"):
            collector.skip_compare += ("stderr", "text/html", "image/png")


def pytest_addoption(parser):
    parser.addoption("--pictures", type=Path, help="a folder for screenshots of the panels")


def pytest_configure(config):
    """Set the environment that the notebooks' kernels inherit: profile and workspace."""
    for name in settings():
        del os.environ[name]
    config.notebook_workspace = Path(tempfile.mkdtemp(prefix="qlora_notebooks_"))
    os.environ |= {"QLORA_PROFILE": "cpu", "QLORA_WORKSPACE": str(config.notebook_workspace)}
    config.pluginmanager.register(NotebookRules())


def pytest_unconfigure(config):
    shutil.rmtree(config.notebook_workspace, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before -m chooses among the items
def pytest_collection_modifyitems(items):
    """Mark each cell of a notebook, and each test that asks for a fixture in REAL_MODEL."""
    for item in items:
        if item.path.suffix == ".ipynb" or REAL_MODEL & set(getattr(item, "fixturenames", ())):
            item.add_marker("real_model")


def pytest_collection_finish():
    """Keep imported packages out of garbage collections: each would take half a second, and loading
    a model begins with one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def threads(request):
    """Use one thread for tests with tiny models, where a second one only makes the first wait."""
    torch.set_num_threads(THREADS if request.node.get_closest_marker("real_model") else 1)


@pytest.fixture(scope="session")
def notebook_workspace(request) -> Path:
    """The workspace that nbval's run of the notebooks left, earlier in this session."""
    folder = request.config.notebook_workspace
    if not (folder / "manifests" / "04_evaluation.json").exists():
        pytest.skip("the notebooks did not run in this session: `make test` runs them first")
    return folder


@pytest.fixture(autouse=True)
def cpu_profile(monkeypatch):
    """Set the cpu profile alone, whatever the shell that started the tests holds."""
    for name in settings():
        monkeypatch.delenv(name)
    monkeypatch.setenv("QLORA_PROFILE", "cpu")


@pytest.fixture
def config() -> RunConfig:
    return RunConfig.from_environment()


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """The folder that $QLORA_WORKSPACE names."""
    monkeypatch.setenv("QLORA_WORKSPACE", str(tmp_path / "workspace"))
    return tmp_path / "workspace"


@pytest.fixture
def new_machine(tmp_path, monkeypatch):
    """A function that begins on a new Colab machine, with the same Drive, and returns its /content.

    What a process remembers is forgotten: the modules' variables, and the token.
    """
    memory = {
        drive: ["_without", "_question"],
        hub_token: ["_found"],
        _auth: ["_IS_GOOGLE_COLAB_CHECKED", "_GOOGLE_COLAB_SECRET"],
    }
    monkeypatch.syspath_prepend(Path(__file__).parent / "fake_colab")
    monkeypatch.setattr(drive, "MOUNT_SECONDS", LONG_SECONDS)
    monkeypatch.setenv("FAKE_DRIVE_ANSWER", str(tmp_path / "answer"))
    monkeypatch.setenv("FAKE_DRIVE_FOLDER", str(tmp_path / "drive"))
    (tmp_path / "drive").mkdir(exist_ok=True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(_auth, "is_google_colab", lambda: True)
    before = set(sys.modules)

    def begin() -> Path:
        content = Path(tempfile.mkdtemp(dir=tmp_path, prefix="machine_")) / "content"
        (content / "tmp").mkdir(parents=True)
        monkeypatch.setattr(machine, "CONTENT", content)
        monkeypatch.setattr(tempfile, "tempdir", str(content / "tmp"))
        monkeypatch.chdir(content)
        for module, names in memory.items():
            for name in names:
                monkeypatch.setattr(module, name, None)
        for name in ("HF_TOKEN", "QLORA_WORKSPACE"):
            monkeypatch.setenv(name, "of the machine before")  # so that it is unset at the end
            monkeypatch.delenv(name)
        return content

    yield begin
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "google":
            del sys.modules[name]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's tokenizer, without the model."""
    return load_tokenizer(RunConfig(profile="cpu", **PROFILES["cpu"]))


@pytest.fixture(scope="session")
def base(tokenizer):
    """The embedded model in NF4, and its tokenizer. Tests that change the model copy it first."""
    return load_base_model(RunConfig(profile="cpu", **PROFILES["cpu"])), tokenizer


@pytest.fixture(scope="session")
def tiny(tokenizer, tmp_path_factory) -> str:
    """The folder of a random two-layer Llama that has the embedded model's tokenizer."""
    return save_tiny(LlamaConfig, tokenizer, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tuned(tiny, tmp_path_factory) -> Workspace:
    """The workspace of a finished run: the tiny model, a random adapter, and a temperature."""
    workspace = Workspace(tmp_path_factory.mktemp("tuned"))
    run = RunConfig(profile="cpu", **PROFILES["cpu"] | {"base_model": tiny, "max_length": 64})
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = attach_lora(load_base_model(run), lora, seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(model, run, workspace / "adapter")
    write_text(workspace / "config.json", run.to_json())
    workspace.publish("01_setup", vars(run), ["config.json"])
    workspace.publish("03_qlora_training", vars(run), ["adapter"], inputs=("01_setup",))
    calibration = "adapter/calibration.json"
    write_text(workspace / calibration, json.dumps({"temperature": 1.5}))
    workspace.publish("04_evaluation", vars(run), [calibration], inputs=("03_qlora_training",))
    return workspace


@pytest.fixture(scope="session")
def classifier(tuned) -> HeadlineClassifier:
    return HeadlineClassifier.from_workspace(tuned.path)
