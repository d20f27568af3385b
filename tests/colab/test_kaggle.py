"""A Kaggle machine, simulated: its image holds google.colab too, and /content."""

from pathlib import Path

import pytest
import torch

from qlora_helpers import RunConfig, find_workspace
from qlora_helpers.colab import doctor, hub, machine
from qlora_helpers.colab.doctor import examine
from qlora_helpers.colab.hub_token import use_token
from qlora_helpers.config import AG_NEWS, PROFILES

HUB_CONFIG = RunConfig(**PROFILES["cpu"] | {"profile": "cpu", "data": AG_NEWS})


@pytest.fixture
def working(new_machine, monkeypatch, tmp_path) -> Path:
    """Kaggle's folder for outputs, where its notebooks run."""
    new_machine()
    working = tmp_path / "kaggle" / "working"
    working.mkdir(parents=True)
    monkeypatch.setattr(machine, "KAGGLE", working)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "fake_kaggle")
    monkeypatch.chdir(working)
    return working


def test_nothing_asks_for_drive_and_the_run_is_among_the_outputs(working, capsys):
    assert (machine.machine_name(), machine.on_colab()) == ("Kaggle", False)
    run = find_workspace(True)
    from google.colab import drive

    assert (run.path, run.mirror, drive.asked) == (working / "runs" / "cpu", None, [])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("behaviour", "source", "note"),
    [
        ("is hf_1", "Kaggle's secret HF_TOKEN", ""),
        ("missing", None, "Kaggle has no secret HF_TOKEN for this notebook."),
    ],
)
def test_the_token_of_kaggles_secrets(working, monkeypatch, behaviour, source, note):
    monkeypatch.setenv("FAKE_SECRET", behaviour)
    token = use_token(HUB_CONFIG)
    assert (token.source, token.note, token.warning) == (source, note, False)


def test_the_doctor_knows_a_batch_run_a_p100_and_internet_that_is_off(working, monkeypatch):
    monkeypatch.delenv("QLORA_PROFILE")
    config = RunConfig.from_environment()

    def found() -> dict:
        return {one.area: one for one in examine(config, find_workspace())}

    here = found()
    assert here["GPU"].verdict == "stop"  # a GPU has not been switched on
    assert here["GPU"].remedy.startswith("Choose Settings > Accelerator > GPU T4 x2")
    assert "panels" not in here and here["workspace"].verdict == "ok"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert "the pictures beside them stand" in found()["panels"].found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 0))
    monkeypatch.setattr(doctor, "free_gpu_bytes", lambda: 15 * 2**30)
    gpu = found()["GPU"]
    assert gpu.verdict == "stop" and gpu.remedy.startswith("It is too old. Choose")
    off = ConnectionError("no internet")
    assert "Switch on Settings > Internet and run this cell again" in hub.explain(
        "a/b", "model", off
    )
