"""What the notebooks do with a workspace, on a tiny model; and, as a program, what is left of it when they are killed.

python tests/stages.py TINY FOLDER KILLS SEED    kills a run KILLS times, each at another point, and ends each; prints a line of each
"""

import gc
import io
import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import torch
from peft import LoraConfig

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
    open_workspace,
    save_adapter,
)
from qlora_helpers.config import PROFILES
from qlora_helpers.fast.plan import BatchPlan

SETTINGS = {
    "train_size": 44,
    "validation_size": 8,
    "test_size": 12,
    "num_epochs": 2,
    "effective_batch_size": 8,
    "learning_rate": 0.01,
    "lora_dropout": 0.3,
    "lora_r": 4,
    "max_length": 48,
}  # six steps an epoch, each in four micro-batches
PLAN = BatchPlan(2, 4, 10**9, None, "as the test says")


def tiny_config(tiny: str, **settings) -> RunConfig:
    return RunConfig(
        **(PROFILES["cpu"] | {"profile": "cpu", "base_model": tiny} | SETTINGS | settings)
    )


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


def trainer_for(
    workspace: Workspace, config: RunConfig, plan: BatchPlan = PLAN, **options
) -> LabelTrainer:
    subset = {split: pd.read_parquet(workspace / "subset" / f"{split}.parquet") for split in SPLITS}
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = attach_lora(load_base_model(config), lora, config.seed)
    return LabelTrainer(model, load_tokenizer(config), subset, config, plan, **options)


def fit(workspace: Workspace, trainer: LabelTrainer, panel: LossPanel | None = None) -> dict:
    """The cells of 03 that train and publish."""
    if workspace.is_current("03_qlora_training", vars(trainer.config)):
        print("This workspace holds the finished training with these settings.")
        history = workspace.read_json("03_qlora_training", "training.json")
    else:
        history = trainer.fit(workspace.checkpoints(), panel and panel.live)
        workspace.set_aside("03_qlora_training", ["adapter", "training.json"])
        save_adapter(trainer.model, trainer.config, workspace / "adapter")
        workspace.write("training.json", json.dumps(history, indent=1))
        files = ["adapter", "training.json"]
        workspace.publish(
            "03_qlora_training", vars(trainer.config), files, inputs=("02_data_subset",)
        )
    workspace.checkpoints().finish()
    return history


def step_losses(trainer: LabelTrainer) -> list[float]:
    """Train, and return the loss of each step, not rounded as in the log."""
    loss, found = trainer.compute_loss, Counter()

    def compute_loss(*args, **kwargs):
        part = loss(*args, **kwargs)
        found[trainer.state.global_step] += part.item()
        return part

    trainer.compute_loss = compute_loss
    trainer.train()
    return list(found.values())


def stop_at(trainer: LabelTrainer, step: int) -> None:
    """Interrupt `trainer` in the second micro-batch after `step` steps."""
    loss, seen = trainer.compute_loss, []

    def compute_loss(model, inputs, *args, **kwargs):
        if model.training and trainer.state.global_step == step:
            seen.append(inputs["rows"])
            if len(seen) == 2:
                raise KeyboardInterrupt
        return loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss


def train(**options) -> dict:
    workspace, config = open_workspace("02_data_subset")
    trainer = trainer_for(workspace, config, **{"checkpoint_steps": 2} | options)
    return fit(workspace, trainer)


def evaluate() -> None:
    workspace, config = open_workspace("02_data_subset", "03_qlora_training")
    test = pd.read_parquet(workspace / "subset" / "test.parquet")
    model = load_adapter(load_base_model(config), workspace / "adapter")
    predictions = io.BytesIO()
    pd.DataFrame(label_probabilities(model, load_tokenizer(config), test.text, config)).add_prefix(
        "P"
    ).to_parquet(predictions)
    workspace.write("predictions.parquet", predictions.getvalue())
    workspace.write("adapter/calibration.json", json.dumps({"temperature": 1.25}))
    workspace.publish(
        "04_evaluation",
        vars(config),
        ["predictions.parquet", "adapter/calibration.json"],
        inputs=("02_data_subset", "03_qlora_training"),
    )


def infer() -> tuple[float, list]:
    """The temperature, and the probabilities of a headline."""
    classifier = HeadlineClassifier.from_workspace()
    return classifier.temperature, classifier.probabilities(
        ["Striker signs record contract"]
    ).tolist()


def run_all(config: RunConfig) -> None:
    set_up(config)
    draw()
    train()
    evaluate()


def result(folder: Path) -> dict:
    """All that a run ends with, but for the times."""
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


def _child(config: RunConfig, folder: Path, log: Path, kill_at: int = 0, seconds: float = 0) -> int:
    """A forked process that runs everything. At its `kill_at`-th change of a file it kills itself.
    After so many `seconds` a timer does: of CPU time, which counts the same on a busy machine."""
    if pid := os.fork():
        return pid
    signal.setitimer(signal.ITIMER_PROF, seconds)  # nothing handles SIGPROF: it ends the process
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    os.environ["QLORA_WORKSPACE"] = str(folder)
    changes = 0

    def count(event, arguments):
        nonlocal changes
        named = str(arguments[0]) if arguments else ""
        written = (
            event == "open"
            and isinstance(arguments[2], int)
            and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if named.startswith(str(folder)) and (
            written or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
        ):
            changes += 1
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    try:
        run_all(config)
        print("changes", changes)
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def main(tiny: str, folder: str, kills: str, seed: str) -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a forked process need not look through, and copy, what is imported
    folder, config, chance = Path(folder), tiny_config(tiny), random.Random(int(seed))
    log = folder / "log.txt"

    def run(name, **kill) -> tuple[int, str, float]:
        """Its exit code, what it said, and the seconds that it worked."""
        _, status, used = os.wait4(_child(config, folder / name, log, **kill), 0)
        return os.waitstatus_to_exitcode(status), log.read_text(), used.ru_utime + used.ru_stime

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("warm", "expected"):
        status, said, whole = run(name)
        assert status == 0, said
    expected, changes = result(folder / "expected"), int(said.split()[-1])
    print(f"A run of {whole:.1f} s changes {changes} files.", flush=True)
    failed = 0
    for i in range(int(kills)):
        by_file = i % 2
        at = chance.randint(1, changes) if by_file else chance.uniform(0.25, 0.95) * whole
        kind, number = ("kill_at", signal.SIGKILL) if by_file else ("seconds", signal.SIGPROF)
        status, _, _ = run("killed", **{kind: at})
        while status == 0:  # it was done before: it had less to do than the one that was measured
            shutil.rmtree(folder / "killed")
            at = type(at)(0.8 * at)
            status, _, _ = run("killed", **{kind: at})
        left = sorted(
            p.relative_to(folder / "killed").as_posix()
            for p in (folder / "killed").rglob("*")
            if p.suffix != ".txt"
        )
        newest = [name for name in left if name.startswith("checkpoints/") and name.count("/") == 1]
        again, said, _ = run("killed")
        same = again == 0 and result(folder / "killed") == expected
        failed += not same or status != -number
        going_on = [
            line
            for line in said.splitlines()
            if line.startswith("Going on") or "skipped" in line or "nothing to do" in line
        ]
        print(
            f"{'same' if same else 'DIFFERENT'}: killed ({status}) at "
            + (f"change {at}" if by_file else f"{at:.2f} s")
            + f"; left {newest}; {going_on}"
            + ("" if same else f"\n{said}"),
            flush=True,
        )
        shutil.rmtree(folder / "killed")
    print(f"{int(kills) - failed} of {kills} ended as the run that was never stopped.")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(*sys.argv[1:])
