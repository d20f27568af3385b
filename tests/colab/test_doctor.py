"""The doctor: on this machine, and on simulated ones."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPConfig, MistralConfig

from qlora_helpers import RunConfig, Workspace
from qlora_helpers.colab import doctor, drive, hub, hub_token, machine
from qlora_helpers.colab.doctor import examine, findings_table, require_ok
from qlora_helpers.colab.estimates import minutes, model_gib
from qlora_helpers.colab.mirror import Mirror
from qlora_helpers.config import AG_NEWS, PROFILES
from qlora_helpers.errors import ConfigError, PreflightError

ROOT = Path(__file__).parents[2]
T4 = RunConfig(profile="t4", **PROFILES["t4"])
MISTRAL = T4.base_model
BASE_FILES = {
    "model.safetensors": 4_130_000_000,
    "config.json": MistralConfig().to_json_string().encode(),
    "tokenizer.json": 3_000_000,
    "tokenizer.model": 500_000,
    "consolidated.safetensors": 4_130_000_000,
    "pytorch_model.bin": 4_000_000_000,
    "mistral.Q4_K_M.gguf": 4 * 10**9,
}
DATA_FILES = {
    "data/train-00000-of-00001.parquet": 18_600_000,
    "data/test-00000-of-00001.parquet": 1_230_000,
    "README.md": 8000,
}


@pytest.fixture
def t4(monkeypatch):
    """A machine that says it has a T4, and enough free host memory and disk."""
    for name, answer in {
        "is_available": True,
        "get_device_name": "Tesla T4",
        "get_device_capability": (7, 5),
        "memory_reserved": 0,
        "mem_get_info": (int(14.6 * 2**30), int(14.74 * 2**30)),
        "get_per_process_memory_fraction": 1.0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=12 * 2**30))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**11))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub that has the profile's model and data; an empty cache, and no token."""
    fake = FakeHub()
    fake.repositories |= {MISTRAL: dict(BASE_FILES), AG_NEWS: dict(DATA_FILES)}
    (tmp_path / "hub").mkdir()
    fake.use(monkeypatch, tmp_path / "hub")
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 300)
    yield fake
    fake.close()


def by_area(config: RunConfig, workspace: Path, **options) -> dict[str, doctor.Finding]:
    return {one.area: one for one in examine(config, Workspace(workspace), **options)}


def verdicts(found: dict[str, doctor.Finding]) -> dict[str, str]:
    return {area: one.verdict for area, one in found.items() if one.verdict != "ok"}


def test_without_a_gpu_and_a_network_the_embedded_model_needs_nothing(
    workspace, config, monkeypatch
):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("it asked the network"))
    for slow in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(slow, "from_pretrained", lambda *a, **k: pytest.fail("it loads"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=12 * 2**30))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**11))
    findings = examine(config, Workspace(workspace))
    require_ok(findings)
    found = {one.area: one.found for one in findings}
    assert re.fullmatch(r"none: runs in float32 on \d+ CPU cores", found.pop("GPU"))
    assert re.match(r"torch [\w.+]+, transformers", found.pop("versions"))
    assert found.pop("workspace").endswith("workspace")
    disks = [area for area in found if area.startswith("disk, ")]
    assert all(found.pop(area).startswith("100.0 GB free, ") for area in disks)
    assert found == {
        "host memory": "12.0 GiB available",
        "hub token": "not needed",
        "base model": "SmolLM2-135M-Instruct: comes with a package, unpacked",
        "data": "sample: 400 headlines that come with the package",
        "minutes": "01: 1, 02: 1, 03: 5, 04: 2, 05: 1 (measured on two CPU cores)",
    }
    assert not workspace.exists()


def test_a_t4_with_the_hub(t4, server, workspace):
    found = by_area(T4, workspace)
    assert verdicts(found) == {}
    assert {
        area: one.found for area, one in found.items() if area not in ("versions", "workspace")
    } == {
        "GPU": "Tesla T4 (capability 7.5) is older than Ampere and has no bfloat16: runs in "
        "float16",
        "GPU memory": "14.6 GiB free; the model takes 3.84 GiB in 4 bits",
        "host memory": "12.0 GiB available",
        "hub token": "none",
        "base model": f"{MISTRAL}: on the hub, 4.13 GB: 4.13 GB to download",
        "data": f"{AG_NEWS}: on the hub, 20 MB: 20 MB to download",
        "disk, downloads and run": "100.0 GB free, 5.25 GB to write",
        "minutes": "01: 1, 02: 2, 03: 18, 04: 21, 05: 4 (a T4's, estimated: its rows a second on "
        "paper, the rest from another GPU)",
    }


def test_two_gpus_share_the_work(t4, server, workspace, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert by_area(T4, workspace)["GPU"].found.endswith("runs in float16, on 2 GPUs at once")


def test_a_gpu_that_is_older_than_a_t4_is_a_warning(t4, server, workspace, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    assert verdicts(by_area(T4, workspace)) == {"GPU": "warning"}


def test_too_little_memory(t4, server, workspace, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (4 * 2**30, 14 * 2**30))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * 2**30))
    found = by_area(T4, workspace)
    assert verdicts(found) == {"GPU memory": "stop", "host memory": "warning"}
    assert found["GPU memory"].remedy.startswith("5.5 GiB are needed: Runtime > Restart session")


@pytest.fixture
def a_colab(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "fake_colab")
    monkeypatch.setattr(machine, "CONTENT", tmp_path / "content")
    monkeypatch.setattr(drive, "_without", "credential propagation was unsuccessful")
    monkeypatch.setattr(hub_token, "_found", None)
    (tmp_path / "content").mkdir()
    monkeypatch.chdir(tmp_path / "content")
    monkeypatch.delenv("QLORA_PROFILE")
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "google":
            del sys.modules[name]


def test_colab_without_a_gpu_says_how_to_choose_one(a_colab, workspace):
    findings = examine(RunConfig.from_environment(), Workspace(workspace), "default")
    with pytest.raises(PreflightError) as raised:
        require_ok(findings)
    assert re.fullmatch(
        "this run cannot go on here, and nothing was written.\n"
        r"- GPU: none: runs in float32 on \d+ CPU cores. In Colab: Runtime > Change runtime "
        r"type > T4 GPU, then Runtime > Run all. To run the small model on the CPU, choose PROFILE "
        r"cpu in the form \(or set QLORA_PROFILE=cpu\) and run all again.",
        str(raised.value),
    )


@pytest.mark.parametrize("by", ["form", "variable"])
def test_colab_goes_on_without_a_gpu_if_asked(a_colab, workspace, monkeypatch, by):
    if by == "variable":
        monkeypatch.setenv("QLORA_PROFILE", "cpu")
    config = RunConfig.from_form(profile="cpu")
    found = by_area(config, workspace, profile="cpu" if by == "form" else "default")
    assert found["GPU"].verdict == "ok"
    assert found["workspace"].verdict == "warning"
    assert "(credential propagation was unsuccessful)" in found["workspace"].found
    assert "machines of their own and will not find it" in found["workspace"].remedy


def test_a_secret_that_does_not_come_is_a_warning(a_colab, t4, server, workspace, monkeypatch):
    monkeypatch.setenv("FAKE_SECRET", "late")
    token = by_area(T4, workspace)["hub token"]
    assert token.verdict == "warning"
    assert token.found.startswith(
        "Colab's secret HF_TOKEN did not come (Requesting secret HF_TOKEN"
    )
    assert token.remedy.startswith("If the base model asks for a token: the key in Colab's left")


@pytest.mark.parametrize("status", [401, 404, 503, 0])
def test_a_hub_that_refuses_stops_in_the_words_of_loading(
    t4, server, workspace, monkeypatch, status
):
    server.status = status
    if status == 0:
        monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.5)
    with pytest.raises(ValueError) as raised:
        hub.fetch(MISTRAL, "model", hub.CHECKPOINT_FILES, ValueError, "")
    words = str(raised.value).partition("from the hub: ")[2].rstrip(". ")
    found = by_area(T4, workspace)
    assert verdicts(found) == {"base model": "stop", "data": "stop"}
    assert found["base model"].found == f"{MISTRAL}: cannot be loaded from the hub: {words}"
    assert found["base model"].remedy == (
        "Without the hub: name a folder in QLORA_BASE_MODEL, or set QLORA_PROFILE=cpu."
    )
    with pytest.raises(PreflightError, match=f"- data: {AG_NEWS}: cannot be .*set QLORA_DATA to"):
        require_ok(list(found.values()))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_hidden_layers": 100_000}, "its num_hidden_layers is 100000: it must be"),
        ({"quantization_config": {"quant_method": "awq"}}, "its weights are quantised by awq"),
        ({"sliding_window": 64}, "reaches back 64 tokens"),
    ],
)
def test_a_model_that_could_not_be_loaded_stops(t4, server, workspace, settings, said):
    odd = MistralConfig().to_dict() | settings
    server.repositories[MISTRAL]["config.json"] = json.dumps(odd).encode()
    found = by_area(T4, workspace)
    assert verdicts(found) == {"base model": "stop"} and said in found["base model"].found


@pytest.mark.parametrize("token", ["", "hf_accepted"])
def test_a_gated_model_needs_a_token_whose_owner_accepted(
    t4, server, workspace, monkeypatch, token
):
    server.gated.add(MISTRAL)
    monkeypatch.setenv("HF_TOKEN", token)
    found = by_area(T4, workspace)
    if token:
        assert verdicts(found) == {}
        assert found["hub token"].found == "from HF_TOKEN in the environment"
    else:
        assert verdicts(found) == {"base model": "stop"}
        assert f"Accept them at {server.url}/{MISTRAL}, and set" in found["base model"].found


def test_what_is_cached_is_not_downloaded_again_and_needs_no_hub(t4, server, workspace):
    server.repositories[MISTRAL]["model.safetensors"] = b"w" * 10**6
    server.repositories[MISTRAL] |= {"tokenizer.json": b"{}", "tokenizer.model": b"t"}
    server.repositories[AG_NEWS] = dict.fromkeys(DATA_FILES, b"rows")
    hub.fetch(AG_NEWS, "dataset", hub.DATASET_FILES, ValueError, "")
    hub.fetch(MISTRAL, "model", hub.CHECKPOINT_FILES, ValueError, "")
    found = by_area(T4, workspace)
    assert found["base model"].found == f"{MISTRAL}: on the hub, 1 MB: in the hub's cache"
    server.status = 503
    found = by_area(T4, workspace)
    assert verdicts(found) == {}
    assert found["base model"].found == f"{MISTRAL}: in the hub's cache: no network needed"
    assert found["GPU memory"].found.endswith("takes 3.84 GiB in 4 bits")
    next(Path(constants.HF_HUB_CACHE).rglob("model.safetensors")).unlink()
    assert verdicts(by_area(T4, workspace)) == {"base model": "stop"}


def test_disks_that_are_too_small(t4, server, workspace, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=15 * 10**8))
    mirrored = Workspace(workspace, Mirror(workspace.parent, "run"))
    found = {one.area: one for one in examine(T4, mirrored)}
    assert verdicts(found) == {"disk, downloads and run": "stop", "Google Drive": "warning"}
    disk = found["disk, downloads and run"]
    assert (disk.found, disk.remedy) == (
        "1.5 GB free, 5.25 GB to write",
        "Make room for 7.9 GB.",
    )
    assert found["workspace"].found.endswith(", copied to Google Drive")


def test_downloads_and_the_run_on_two_disks(t4, server):
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == Path(constants.HF_HUB_CACHE).stat().st_dev:
        pytest.skip("there is one disk here")
    found = by_area(T4, other / "no such run")
    assert found["disk, downloads"].found == "100.0 GB free, 4.15 GB to write"
    assert found["disk, run"].found == "100.0 GB free, 1.10 GB to write"


def test_the_minutes_are_those_of_the_readme():
    said = re.findall(
        r"^\| (\d\d)_\w+ \|.*\| (\d+) \| \[!", (ROOT / "README.md").read_text(), flags=re.M
    )
    assert len(said) == 5
    expected = minutes(T4, 4_130_000_000)
    assert all(abs(expected[name] - int(count)) <= 1.5 for name, count in said), expected
    assert minutes(dataclasses.replace(T4, num_epochs=6), 0)["03"] > 1.7 * minutes(T4, 0)["03"]


def test_sizes_of_models():
    assert model_gib(MistralConfig()) == pytest.approx(3.84, abs=0.01)  # as measured
    assert model_gib(CLIPConfig()) is None


def test_the_table_says_its_verdicts_in_words_and_colours():
    stop = doctor.Finding("GPU", "none", "stop", "Choose one.")
    html = findings_table([stop, doctor.Finding("data", "here")]).to_html()
    assert all(word in html for word in (">stop<", ">ok<", "#fbd5d5", "#d9f2d9", "Choose one."))


# The form of notebook 01


def test_an_untouched_form_leaves_the_profiles_defaults(monkeypatch):
    monkeypatch.setenv("QLORA_EPOCHS", "2")
    form = dict.fromkeys(("profile", "base_model", "train_size", "num_epochs"), "default")
    assert RunConfig.from_form(**form) == RunConfig.from_environment()


def test_what_is_typed_wins_over_the_profile_and_the_environment_over_that(monkeypatch, capsys):
    config = RunConfig.from_form(train_size="16", num_epochs=2, learning_rate="5e-4")
    assert (config.train_size, config.num_epochs, config.learning_rate) == (16, 2, 5e-4)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("QLORA_EPOCHS", "3")
    assert RunConfig.from_form(num_epochs="2").num_epochs == 3
    said = "QLORA_NUM_EPOCHS in the environment is 3: it wins over the form's 2.\n"
    assert capsys.readouterr().out == said


def test_a_bad_answer_is_named():
    message = "num_epochs in the form is 'two': it must be a whole number."
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_form(num_epochs="two")
