"""Trainings in float16: stopped and resumed as if never stopped, and alike under every plan."""

import json
import math

import pytest
import stages
import torch
from lora_models import save_random
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MistralConfig, PreTrainedTokenizerFast

from qlora_helpers import model as loading
from qlora_helpers import training
from qlora_helpers.config import LABELS, PROFILES, RunConfig
from qlora_helpers.data import load_rows
from qlora_helpers.errors import TrainingStopped
from qlora_helpers.fast.plan import BatchPlan
from qlora_helpers.prompts import build_prompt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Mistral and a tokenizer of the sample's words: nothing is downloaded."""
    texts = load_rows(RunConfig(**(PROFILES["cpu"] | {"profile": "cpu"})))["train"].raw
    texts = [*texts, *[f" {label}" for label in LABELS], build_prompt("")]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<pad>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
    tokens = {"vocab_size": len(vocabulary), "pad_token_id": 1}
    folder = tmp_path_factory.mktemp("model")
    save_random(MistralConfig, folder, torch.float16, **sizes, **tokens)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def float16(monkeypatch):
    for module in (loading, training):
        monkeypatch.setattr(module, "compute_dtype", lambda: (torch.float16, "as on a T4"))


def prepared(folder, checkpoint, monkeypatch):
    monkeypatch.setenv("QLORA_WORKSPACE", str(folder))
    if not (folder / "config.json").exists():
        stages.set_up(stages.tiny_config(checkpoint, learning_rate=0.002))
        stages.draw()
    workspace, config = stages.open_workspace("02_data_subset")
    trainer = stages.trainer_for(workspace, config)
    loss = trainer.compute_loss

    def overflowing(model, inputs, *args, **kwargs):
        value = loss(model, inputs, *args, **kwargs)
        # 65536 times this is no float16: the scaler skips the step, halves its scale and goes on
        return value * 1e6 if model.training and trainer.state.global_step in (2, 7) else value

    trainer.compute_loss = overflowing
    return workspace, trainer


def outcome(folder, trainer):
    history = json.loads((folder / "training.json").read_text())
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    return history, weights, trainer.accelerator.scaler.state_dict()


def test_stopped_at_five_points_it_ends_as_if_never_stopped(checkpoint, tmp_path, monkeypatch):
    workspace, trainer = prepared(tmp_path / "whole", checkpoint, monkeypatch)
    stages.fit(workspace, trainer)
    history, adapter, scaler = outcome(tmp_path / "whole", trainer)
    assert history["skipped_steps"] == 2 and scaler["scale"] == 65536 / 4
    assert all(math.isfinite(entry["loss"]) for entry in history["train"])
    for step in (1, 3, 6, 8, 11):
        folder = tmp_path / f"stopped{step}"
        workspace, trainer = prepared(folder, checkpoint, monkeypatch)
        stages.stop_at(trainer, step)
        with pytest.raises(TrainingStopped, match=f"The checkpoint of step {step} is written"):
            stages.fit(workspace, trainer)
        assert (folder / "checkpoints" / f"checkpoint-{step}" / "scaler.pt").exists()
        del trainer
        workspace, trainer = prepared(folder, checkpoint, monkeypatch)
        stages.fit(workspace, trainer)
        found, weights, state = outcome(folder, trainer)
        assert found["skipped_steps"] == 2 and state == scaler, step
        assert found["best_epoch"] == history["best_epoch"]
        for part, names in (("train", ("step", "learning_rate")), ("validation", ("step",))):
            for entry, expected in zip(found[part], history[part], strict=True):
                assert [entry[name] for name in names] == [expected[name] for name in names]
                loss = pytest.approx(expected["loss"], rel=5e-3, abs=5e-3)
                assert entry["loss"] == loss, (step, part, entry["step"])
        for name, expected in adapter.items():
            assert (weights[name] - expected).norm() <= 0.02 * expected.norm() + 1e-4, (step, name)


def test_no_plan_changes_a_loss_beyond_float16s_error(checkpoint, tmp_path, monkeypatch):
    """Step by step, as far as plans move the losses without dropout."""
    plans = [BatchPlan(8, 1, 10**9, None, ""), BatchPlan(2, 4, 0, None, "")]
    plans.append(BatchPlan(1, 8, 60, None, ""))

    def losses(dropout, plan):
        monkeypatch.setenv("QLORA_WORKSPACE", str(tmp_path / str(dropout)))
        stages.set_up(stages.tiny_config(checkpoint, learning_rate=0.002, lora_dropout=dropout))
        stages.draw()
        trainer = stages.trainer_for(*stages.open_workspace("02_data_subset"), plan)
        return torch.tensor(stages.step_losses(trainer))

    def largest_change(dropout):
        whole, *others = [losses(dropout, plan) for plan in plans]
        assert len(whole) == 12 and whole.isfinite().all()
        return max((other - whole).abs().max().item() for other in others)

    error = largest_change(0.0)
    for dropout in (0.05, 0.5):
        assert largest_change(dropout) <= 4 * error + 5e-3, dropout
