"""The notebooks' steps on a tiny model."""

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import torch

from qlora_helpers import (
    SPLITS,
    HeadlineClassifier,
    LabelTrainer,
    LossPanel,
    RunConfig,
    Workspace,
    attach_lora,
    draw_subset,
    find_workspace,
    label_probabilities,
    load_adapter,
    load_base_model,
    load_rows,
    load_tokenizer,
    lora_of,
    open_workspace,
    publish_training,
)
from qlora_helpers.config import PROFILES
from qlora_helpers.fast.plan import BatchPlan

SETTINGS = {
    "train_size": 46,  # six steps an epoch, each in two micro-batches
    "validation_size": 8,
    "test_size": 12,
    "num_epochs": 2,
    "effective_batch_size": 8,
    "learning_rate": 0.01,
    "lora_dropout": 0.3,
    "lora_r": 4,
    "max_length": 48,
}
PLAN = BatchPlan(4, 2, 10**9, None, "as the test says")


def tiny_config(tiny: str, **settings) -> RunConfig:
    choices = {"profile": "cpu", "base_model": tiny} | SETTINGS | settings
    return RunConfig(**PROFILES["cpu"] | choices)


def set_up(config: RunConfig) -> None:
    workspace = find_workspace()
    workspace.write("config.json", config.to_json())
    workspace.publish("01_setup", vars(config), ["config.json"])


def draw() -> Workspace:
    workspace, config = open_workspace()
    for split, frame in draw_subset(load_rows(config), config).items():
        workspace.write(f"subset/{split}.parquet", frame.to_parquet())
    workspace.publish("02_data_subset", vars(config), ["subset"], inputs=("01_setup",))
    return workspace


def label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As in 03: the sum of the rows' cross-entropies over the label tokens."""
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def trainer_for(
    workspace: Workspace, config: RunConfig, plan: BatchPlan = PLAN, **options
) -> LabelTrainer:
    subset = {split: pd.read_parquet(workspace / "subset" / f"{split}.parquet") for split in SPLITS}
    model = attach_lora(load_base_model(config), lora_of(config), config.seed)
    tokenizer = load_tokenizer(config)
    return LabelTrainer(model, tokenizer, subset, config, plan, loss=label_loss, **options)


def fit(workspace: Workspace, trainer: LabelTrainer, panel: LossPanel | None = None) -> dict:
    """Train and publish, as 03 does, and return the history."""
    config = trainer.config
    if workspace.is_current("03_qlora_training", vars(config)):
        print("This workspace holds the finished training with these settings.")
    else:
        history = trainer.fit(workspace.checkpoints(), panel and panel.live)
        publish_training(workspace, trainer.model, config, history)
    return workspace.read_json("03_qlora_training", "training.json")


def step_losses(trainer: LabelTrainer) -> list[float]:
    """Train, and return the loss of each step, not rounded as in the log."""
    compute, losses = trainer.compute_loss, Counter()

    def compute_loss(*args, **kwargs):
        part = compute(*args, **kwargs)
        losses[trainer.state.global_step] += part.item()
        return part

    trainer.compute_loss = compute_loss
    trainer.train()
    return list(losses.values())


def stop_at(trainer: LabelTrainer, step: int) -> None:
    """Interrupt `trainer` in the second micro-batch after `step` steps."""
    compute, batches = trainer.compute_loss, 0

    def compute_loss(model, *args, **kwargs):
        nonlocal batches
        if model.training and trainer.state.global_step == step:
            batches += 1
            if batches == 2:
                raise KeyboardInterrupt
        return compute(model, *args, **kwargs)

    trainer.compute_loss = compute_loss


def train(**options) -> dict:
    workspace, config = open_workspace("02_data_subset")
    trainer = trainer_for(workspace, config, **{"checkpoint_steps": 2} | options)
    return fit(workspace, trainer)


def evaluate() -> None:
    """Write what 04 does; the temperature is a fixed one."""
    inputs = ("02_data_subset", "03_qlora_training")
    workspace, config = open_workspace(*inputs)
    test = pd.read_parquet(workspace / "subset" / "test.parquet")
    model = load_adapter(load_base_model(config), workspace / "adapter")
    probabilities = label_probabilities(model, load_tokenizer(config), test.text, config)
    predictions = pd.DataFrame(probabilities).add_prefix("P").to_parquet()
    workspace.write("predictions.parquet", predictions)
    workspace.write("adapter/calibration.json", json.dumps({"temperature": 1.25}))
    files = ["predictions.parquet", "adapter/calibration.json"]
    workspace.publish("04_evaluation", vars(config), files, inputs=inputs)


def infer() -> tuple[float, list]:
    """Return the temperature, and the probabilities of a headline."""
    classifier = HeadlineClassifier.from_workspace()
    headline = "Striker signs record contract"
    return classifier.temperature, classifier.probabilities([headline]).tolist()


def run_all(config: RunConfig) -> None:
    set_up(config)
    draw()
    train()
    evaluate()


def result(folder: Path) -> dict:
    """Return all that a run ends with, but for the times."""
    history = json.loads((folder / "training.json").read_text())
    for part in ("train", "validation"):
        for entry in history[part]:
            del entry["seconds"]
    del history["seconds"], history["rows_per_second"], history["step_rows_per_second"]
    names = [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "predictions.parquet",
        "subset/train.parquet",
    ]
    return {"history": history} | {name: (folder / name).read_bytes() for name in names}
