"""The notebooks' steps on a tiny model; as a program, kill a run again and again.

python tests/stages.py TINY FOLDER KILLS SEED

It kills a run KILLS times, each at another point, starts it again, and compares its result with
that of a run that was never stopped. It prints one line for each kill.
"""

import gc
import json
import os
import random
import re
import shutil
import signal
import sys
import traceback
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
    "train_size": 44,  # six steps an epoch, each in four micro-batches
    "validation_size": 8,
    "test_size": 12,
    "num_epochs": 2,
    "effective_batch_size": 8,
    "learning_rate": 0.01,
    "lora_dropout": 0.3,
    "lora_r": 4,
    "max_length": 48,
}
PLAN = BatchPlan(2, 4, 10**9, None, "as the test says")


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
        history = workspace.read_json("03_qlora_training", "training.json")
    else:
        history = trainer.fit(workspace.checkpoints(), panel and panel.live)
        publish_training(workspace, trainer.model, config, history)
    workspace.checkpoints().finish()
    return history


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


def start(config: RunConfig, folder: Path, log: Path, change: int = 0, seconds: float = 0) -> int:
    """Fork a process that runs everything in `folder`, and return its id.

    It kills itself at its `change`-th change of a file, or after so many `seconds` of CPU time,
    which count the same on a busy machine.
    """
    if pid := os.fork():
        return pid
    signal.setitimer(signal.ITIMER_PROF, seconds)  # nothing handles SIGPROF: it ends the process
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    os.environ["QLORA_WORKSPACE"] = str(folder)
    changes = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal changes
        if not arguments or not str(arguments[0]).startswith(str(folder)):
            return
        flags = arguments[2] if event == "open" else 0
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            changes += 1
            if changes == change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    code = 1
    try:
        run_all(config)
        print("changes", changes)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(tiny: str, folder: str, kills: str, seed: str) -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a forked process need not look through, and copy, what is imported
    folder, config, chance = Path(folder), tiny_config(tiny), random.Random(int(seed))
    log = folder / "log.txt"

    def run(name: str, **kill) -> tuple[int, str, float]:
        """Return the exit code of a run, what it said, and its seconds of CPU time."""
        _, status, used = os.wait4(start(config, folder / name, log, **kill), 0)
        return os.waitstatus_to_exitcode(status), log.read_text(), used.ru_utime + used.ru_stime

    folder.mkdir(parents=True, exist_ok=True)
    status, said, whole = run("expected")
    assert status == 0, said
    expected, changes = result(folder / "expected"), int(said.split()[-1])
    print(f"A run of {whole:.1f} s changes {changes} files.", flush=True)
    same = 0
    for i in range(int(kills)):
        if i % 2:
            kind, at, number = "change", chance.randint(1, changes), signal.SIGKILL
        else:
            kind, at, number = "seconds", chance.uniform(0.25, 0.95) * whole, signal.SIGPROF
        status, _, _ = run("killed", **{kind: at})
        while status == 0:  # it ended before: it had less to do than the one that was measured
            shutil.rmtree(folder / "killed")
            at = type(at)(0.8 * at)
            status, _, _ = run("killed", **{kind: at})
        checkpoints = sorted(
            path.name for path in (folder / "killed").glob("checkpoints/checkpoint*")
        )
        again, said, _ = run("killed")
        ok = status == -number and again == 0 and result(folder / "killed") == expected
        same += ok
        print(f"{'same' if ok else 'DIFFERENT'}: killed ({status}) at {kind} {at:.4g}", end="; ")
        going_on = re.findall(r"^Going on.*|^.*(?:skipped|nothing to do).*", said, re.M)
        print(f"{checkpoints}; {going_on if ok else said}", flush=True)
        shutil.rmtree(folder / "killed")
    print(f"{same} of {kills} ended as the run that was never stopped.")
    sys.exit(same < int(kills))


if __name__ == "__main__":
    main(*sys.argv[1:])
