"""What the unit tests share: an environment without settings, the cpu profile, the embedded model and a tiny one."""

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
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, set_seed

from qlora_helpers.adapter import save_adapter
from qlora_helpers.classifier import HeadlineClassifier
from qlora_helpers.colab import drive, hub_token, machine
from qlora_helpers.config import PROFILES, RunConfig
from qlora_helpers.model import attach_lora, load_base_model, load_tokenizer
from qlora_helpers.run.files import write_text
from qlora_helpers.run.workspace import Workspace

# the embedded model in memory; and runs that the notebooks made with it
REAL_MODEL = {"base", "notebook_workspace", "run_folder"}
LONG = 300  # seconds: what answers does so in time, on a busy machine too
THREADS = torch.get_num_threads()
torch.set_num_threads(1)  # see the fixture `threads`


class NotebookRules:
    """What nbval compares: text alone. Progress bars go to stderr, HTML repeats the text, pictures differ by a pixel."""

    def pytest_collectstart(self, collector):
        if hasattr(collector, "skip_compare"):
            collector.skip_compare += ("stderr", "text/html", "image/png")


def pytest_addoption(parser):
    parser.addoption(
        "--pictures", type=Path, help="a folder for screenshots of the panels in the browser"
    )


def pytest_configure(config):
    """The notebooks' kernels inherit this environment: the cpu profile, in a workspace of this session."""
    for name in [name for name in os.environ if name.startswith("QLORA_")]:
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
    """Collections look only at what tests make: loading a model begins with one, which would else
    take half a second for the packages that are imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def threads(request):
    """One thread for tests with tiny models: tensors this small only wait for a second one, on a
    busy machine for long."""
    torch.set_num_threads(THREADS if request.node.get_closest_marker("real_model") else 1)


@pytest.fixture(scope="session")
def notebook_workspace(request) -> Path:
    """The workspace that nbval's run of the notebooks left, earlier in this session."""
    folder = request.config.notebook_workspace
    if not (folder / "manifests" / "04_evaluation.json").exists():
        pytest.skip(
            "the notebooks did not run in this session: use `make test`, which runs them first"
        )
    return folder


@pytest.fixture(autouse=True)
def cpu_profile(monkeypatch):
    """Only the cpu profile is set, whatever the shell that started the tests holds."""
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
    """A function that begins on a new Colab machine, with the same Drive, and returns its /content."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "fake_colab")
    monkeypatch.setattr(drive, "MOUNT_SECONDS", LONG)
    monkeypatch.setattr(hub_token, "SECRET_SECONDS", LONG)
    monkeypatch.setenv("FAKE_DRIVE_FOLDER", str(tmp_path / "drive"))
    (tmp_path / "drive").mkdir(exist_ok=True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(_auth, "is_google_colab", lambda: True)
    for module, name in (
        (_auth, "_IS_GOOGLE_COLAB_CHECKED"),
        (_auth, "_GOOGLE_COLAB_SECRET"),
        (drive, "_without"),
        (hub_token, "_found"),
    ):
        monkeypatch.setattr(module, name, None)
    for name in ("HF_TOKEN", "QLORA_WORKSPACE"):
        monkeypatch.setenv(name, "of the test before")
    before = set(sys.modules)

    def begin() -> Path:
        content = Path(tempfile.mkdtemp(dir=tmp_path, prefix="machine_")) / "content"
        (content / "tmp").mkdir(parents=True)
        monkeypatch.setattr(machine, "CONTENT", content)
        monkeypatch.setattr(tempfile, "tempdir", str(content / "tmp"))
        monkeypatch.chdir(content)
        drive._without = hub_token._found = _auth._IS_GOOGLE_COLAB_CHECKED = (
            _auth._GOOGLE_COLAB_SECRET
        ) = None
        for name in ("HF_TOKEN", "QLORA_WORKSPACE"):
            os.environ.pop(name, None)
        return content

    yield begin
    for name in [
        name for name in sys.modules if name.partition(".")[0] == "google" and name not in before
    ]:
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
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tuned(tiny, tmp_path_factory) -> Workspace:
    """The workspace of a finished run: the tiny model with a random adapter that is felt, and a temperature."""
    workspace = Workspace(tmp_path_factory.mktemp("tuned"))
    run = RunConfig(profile="cpu", **PROFILES["cpu"] | {"base_model": tiny, "max_length": 64})
    model = attach_lora(
        load_base_model(run),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        seed=1,
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(model, run, workspace / "adapter")
    write_text(workspace / "config.json", run.to_json())
    workspace.publish("01_setup", vars(run), ["config.json"])
    workspace.publish("03_qlora_training", vars(run), ["adapter"], inputs=("01_setup",))
    write_text(workspace / "adapter" / "calibration.json", json.dumps({"temperature": 1.5}))
    workspace.publish(
        "04_evaluation", vars(run), ["adapter/calibration.json"], inputs=("03_qlora_training",)
    )
    return workspace


@pytest.fixture(scope="session")
def classifier(tuned) -> HeadlineClassifier:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("QLORA_WORKSPACE", str(tuned.path))
        return HeadlineClassifier.from_workspace()
