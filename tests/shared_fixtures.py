"""Fixtures of all tests: no settings but the cpu profile, the embedded model and a tiny one."""

import json
import os
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
from qlora_helpers.config import LABELS, PROFILES, RunConfig
from qlora_helpers.data import load_rows
from qlora_helpers.model import attach_lora, load_base_model, load_tokenizer
from qlora_helpers.prompts import build_prompt
from qlora_helpers.run.files import write_text
from qlora_helpers.run.workspace import Workspace

LONG_SECONDS = 300  # so that no wait ends early on a busy machine
THREADS = torch.get_num_threads()
torch.set_num_threads(1)  # see the fixture `threads`


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
    for name in [name for name in os.environ if name.startswith("QLORA_")]:
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
def embedded_tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's tokenizer, without the model."""
    return load_tokenizer(RunConfig(profile="cpu", **PROFILES["cpu"]))


@pytest.fixture(scope="session")
def base(embedded_tokenizer):
    """The embedded model in NF4, and its tokenizer. Tests that change the model copy it first."""
    return load_base_model(RunConfig(profile="cpu", **PROFILES["cpu"])), embedded_tokenizer


@pytest.fixture(scope="session")
def tokenizer(embedded_tokenizer) -> PreTrainedTokenizerBase:
    """A tokenizer of the same kind with few tokens, which is loaded in a hundredth of a second."""
    rows = load_rows(RunConfig(profile="cpu", **PROFILES["cpu"]))["train"]
    texts = [
        f"{build_prompt(raw)} {LABELS[i]}" for raw, i in zip(rows.raw, rows.label, strict=True)
    ]
    return embedded_tokenizer.train_new_from_iterator(texts, vocab_size=4000)


@pytest.fixture(scope="session")
def tiny(tokenizer, tmp_path_factory) -> str:
    """The folder of a random two-layer Llama, with that tokenizer."""
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
