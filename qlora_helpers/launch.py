"""Training without a notebook, in one process or several: what 03's cells do."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel
from transformers import ProgressCallback

from qlora_helpers.adapter import save_adapter
from qlora_helpers.config import RunConfig
from qlora_helpers.data import SPLITS
from qlora_helpers.errors import ConfigError, ModelError, TrainingStopped, WorkspaceError
from qlora_helpers.fast.plan import free_memory
from qlora_helpers.model import attach_lora, load_base_model, load_tokenizer
from qlora_helpers.run.files import remove, write_text, writing
from qlora_helpers.run.workspace import Workspace
from qlora_helpers.training import LabelTrainer, plan_batches

_NOTEBOOK = "03_qlora_training"
_PROGRESS = "progress.json"  # in the workspace: the history so far, and a line that says how far
_SECONDS = 2  # between two looks at it
_ERROR = "python -m qlora_helpers: "  # as `__main__` begins what a reader can put right


def lora_of(config: RunConfig) -> LoraConfig:
    """Return the LoRA layers that `config` asks for, as 03 shows them."""
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def train_run(folder: str | os.PathLike) -> None:
    """Train the adapter of the workspace `folder`, and publish it as 03 does.

    Each of several processes, which `accelerate launch` starts, holds the base model on a GPU of
    its own and takes its share of each effective batch; the first one writes and prints. A training
    that was stopped goes on from its newest checkpoint, with any number of processes. Raises
    WorkspaceError and ConfigError as `open_workspace`, and what `LabelTrainer.fit` does.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    with contextlib.ExitStack() as stack:
        if not state.is_main_process:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            _train(Workspace(folder), state)
        except TrainingStopped:
            if state.is_main_process:  # which alone knows of checkpoints
                raise
            sys.exit(2)
    state.destroy_process_group()


def _train(workspace: Workspace, state: PartialState) -> None:
    config = RunConfig.from_json(workspace.open("02_data_subset"))
    config.check_environment()
    count, rows = state.num_processes, config.effective_batch_size
    if count > rows:  # a process without a row has no loss to scale
        raise ConfigError(
            f"{count} processes cannot share an effective batch of {rows}: set "
            f"QLORA_EFFECTIVE_BATCH_SIZE to at least {count} and run from 01 on, or show this "
            f"machine at most {rows} of its GPUs (CUDA_VISIBLE_DEVICES)."
        )
    if workspace.is_current(_NOTEBOOK, vars(config)):
        print("The finished training with these settings is here: nothing to do.")
        return
    subset = {split: pd.read_parquet(workspace / f"subset/{split}.parquet") for split in SPLITS}
    model, tokenizer = load_base_model(config), load_tokenizer(config)
    model = attach_lora(model, lora_of(config), seed=config.seed)
    plan = plan_batches(model, tokenizer, subset["train"].text.tolist(), config)
    print(f"Processes: {count}; in each, {plan.reason}.")
    trainer = LabelTrainer(model, tokenizer, subset, config, plan)
    if not sys.stderr.isatty():  # its bars would fill a log
        trainer.remove_callback(ProgressCallback)
    history = trainer.fit(workspace.checkpoints(), _reporter(workspace / _PROGRESS))
    if state.is_main_process:
        publish_training(workspace, model, config, history)
        print(f"The adapter is in {workspace}/adapter. Next: notebooks/04_evaluation.ipynb.")


def publish_training(
    workspace: Workspace, model: PeftModel, config: RunConfig, history: dict
) -> None:
    """Write the adapter and its history, and publish them. No other notebook writes in between.

    An earlier training of the workspace is moved to `earlier/`, and the checkpoints of this one are
    removed. Raises WorkspaceError.
    """
    history = history | {"dtype": str(model.dtype).removeprefix("torch.")}
    files = ["adapter", "training.json"]
    with workspace.hold(_NOTEBOOK):
        workspace.set_aside(_NOTEBOOK, files)
        save_adapter(model, config, workspace / "adapter")
        workspace.write("training.json", json.dumps(history, indent=1))
        workspace.publish(_NOTEBOOK, vars(config), files, inputs=("02_data_subset",))
    workspace.checkpoints().finish()


def _reporter(path: Path) -> Callable:
    """Return a function for `LabelTrainer.fit` that writes the history so far to `path`."""
    last = -_SECONDS

    def show(history: Callable[[], dict], status: str) -> None:
        nonlocal last
        if time.monotonic() - last < _SECONDS or not PartialState().is_main_process:
            return
        last = time.monotonic()
        with contextlib.suppress(WorkspaceError):  # it is not worth the training
            write_text(path, json.dumps({"history": history(), "status": status}))

    return show


def gpu_count() -> int:
    """Return the number of GPUs that this machine shows."""
    return torch.cuda.device_count()


def train_in_processes(workspace: Workspace, count: int, show: Callable | None = None) -> None:
    """Train and publish as `train_run` does, in `count` processes, each with a GPU of its own.

    `show` is called as by `LabelTrainer.fit`. What the processes print goes to training.log in the
    workspace. Raises TrainingStopped if this is interrupted, which stops them after a step and a
    checkpoint; ModelError if they fail. All of them have ended then.
    """
    free_memory()
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    program += ["-m", "qlora_helpers", "train", "--workspace", str(workspace.path.absolute())]
    log, progress, stopped = workspace / "training.log", workspace / _PROGRESS, False
    remove(progress)  # of a run that was killed
    with writing(log), open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, *program],
            env={"OMP_NUM_THREADS": "1"} | os.environ,
            stdout=output,
            stderr=output,
            start_new_session=True,  # the stop button stops it by a signal from here alone
        )
    with open(log, errors="replace") as said:
        while process.poll() is None:
            try:
                time.sleep(_SECONDS)
                print(said.read(), end="")
                if show and not stopped and progress.exists():
                    seen = json.loads(progress.read_text())
                    show(lambda seen=seen: seen["history"], seen["status"])
            except KeyboardInterrupt:
                if not stopped:  # a second signal would leave the processes behind
                    process.terminate()
                stopped = True
    remove(progress)
    if process.returncode:
        error = re.search(f"{re.escape(_ERROR)}(.*)", log.read_text(errors="replace"))
        why = f"a process ended without a message ({log} has what it printed): run this notebook "
        why += "again, and it goes on from the newest checkpoint"
        raise (TrainingStopped if stopped else ModelError)(error[1] if error else why)
    remove(log)
