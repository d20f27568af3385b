"""The training of a run without a notebook, in one process or several: what 03's cells do."""

import contextlib
import json
import os

import pandas as pd
import torch
from accelerate import PartialState
from peft import LoraConfig

from qlora_helpers.adapter import save_adapter
from qlora_helpers.config import RunConfig
from qlora_helpers.data import SPLITS
from qlora_helpers.model import attach_lora, load_base_model, load_tokenizer
from qlora_helpers.run.workspace import Workspace
from qlora_helpers.training import LabelTrainer, plan_batches

_NOTEBOOK = "03_qlora_training"


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
        _train(Workspace(folder), state)
    state.destroy_process_group()


def _train(workspace: Workspace, state: PartialState) -> None:
    config = RunConfig.from_json(workspace.open("02_data_subset"))
    config.check_environment()
    if workspace.is_current(_NOTEBOOK, vars(config)):
        print("The finished training with these settings is here: nothing to do.")
        return
    subset = {split: pd.read_parquet(workspace / f"subset/{split}.parquet") for split in SPLITS}
    model, tokenizer = load_base_model(config), load_tokenizer(config)
    model = attach_lora(model, lora_of(config), seed=config.seed)
    plan = plan_batches(model, tokenizer, subset["train"].text.tolist(), config)
    print(f"{state.num_processes} processes; in each, {plan.reason}.")
    history = LabelTrainer(model, tokenizer, subset, config, plan).fit(workspace.checkpoints())
    if state.is_main_process:
        files = ["adapter", "training.json"]
        with workspace.hold(_NOTEBOOK):
            workspace.set_aside(_NOTEBOOK, files)
            save_adapter(model, config, workspace / "adapter")
            workspace.write("training.json", json.dumps(history, indent=1))
            workspace.publish(_NOTEBOOK, vars(config), files, inputs=("02_data_subset",))
        workspace.checkpoints().finish()
        print(f"The adapter is in {workspace}/adapter. Next: notebooks/04_evaluation.ipynb.")
