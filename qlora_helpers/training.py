"""Training: the batch plan for the memory at hand, and the Trainer whose loss is taken at the label alone."""

import gc
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import pandas as pd
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from qlora_helpers.config import RunConfig
from qlora_helpers.errors import ModelError
from qlora_helpers.metrics import scores
from qlora_helpers.modeling import compute_dtype, save_adapter
from qlora_helpers.prompts import encode_prompts, label_token_ids
from qlora_helpers.scoring import label_logits, pad
from qlora_helpers.workspace import Workspace, write_text

NOTEBOOK = "03_qlora_training"

_HEADROOM = 0.92  # of the GPU memory, for what a probe does not see: the optimizer's state and fragmentation


@dataclass(frozen=True)
class BatchPlan:
    """How an effective batch is cut to fit the memory. The losses do not depend on it, beyond rounding."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    peak_gib: float | None
    reason: str


def plan_batches(model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], config: RunConfig) -> BatchPlan:
    """The fastest plan whose forward and backward pass over the longest of `texts` fits this machine, found by trying.
    Raises ModelError if a single row does not fit."""
    effective = config.effective_batch_size
    sizes = [size for size in range(effective, 0, -1) if effective % size == 0]
    if model.device.type == "cpu":
        size = next(size for size in sizes if size <= 8)
        return BatchPlan(size, effective // size, False, None, "on a CPU, more than 8 rows at once bring no speed")
    longest = sorted(encode_prompts(tokenizer, texts, config.max_length), key=len)[-effective:]
    free, total = torch.cuda.mem_get_info()
    limit = _HEADROOM * min(free + torch.cuda.memory_reserved(), total * torch.cuda.get_per_process_memory_fraction())
    # Recomputing activations costs a third of a step, small batches cost less: checkpoint only when 4 rows do not fit.
    tries = [(size, False) for size in sizes if size >= min(4, effective)] + [(size, True) for size in sizes]
    for size, checkpointing in tries:
        peak = _peak_of_one_step(model, tokenizer, longest[-size:], checkpointing)
        if peak is not None and peak <= limit:
            reason = f"the fastest that fits: a step over the {size} longest rows peaks at {peak / 2**30:.1f} of {limit / 2**30:.1f} GiB"
            return BatchPlan(size, effective // size, checkpointing, round(peak / 2**30, 2), reason)
    raise ModelError(f"not even one row of {len(longest[-1])} tokens trains within {limit / 2**30:.1f} GiB of GPU memory: set "
                     "QLORA_MAX_LENGTH lower, or restart the runtime if an earlier model still holds the GPU.")


def _peak_of_one_step(model, tokenizer, encoded, checkpointing) -> int | None:
    """Peak reserved bytes of one forward and backward pass, or None if it runs out of memory."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    was_training = model.training
    model.train()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        inputs = {name: x.to(model.device) for name, x in pad(encoded, tokenizer.pad_token_id).items()}
        label_logits(model, **inputs, label_ids=label_token_ids(tokenizer)).sum().backward()
        return torch.cuda.max_memory_reserved()
    except torch.OutOfMemoryError:
        return None
    finally:
        model.zero_grad(set_to_none=True)
        model.gradient_checkpointing_disable()
        model.train(was_training)
        gc.collect()
        torch.cuda.empty_cache()


class LabelTrainer(Trainer):
    """The Trainer, with the loss of the label's token alone, seeded length-grouped batches, and scores by epoch.
    The best epoch by validation loss is kept. Its order of rows depends on the seed and the effective batch, never on the
    batch plan."""

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, subset: dict[str, pd.DataFrame],
                 config: RunConfig, plan: BatchPlan, checkpoints: Path):
        self.label_ids = label_token_ids(tokenizer)
        self.pad_token_id = tokenizer.pad_token_id
        self.config, self.plan = config, plan
        encoded = {split: datasets.Dataset.from_dict({
            "input_ids": encode_prompts(tokenizer, subset[split].text.tolist(), config.max_length),
            "labels": subset[split].label.tolist()}) for split in ("train", "validation")}
        dtype, _ = compute_dtype()
        steps = -(-len(encoded["train"]) // config.effective_batch_size) * config.num_epochs
        if plan.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        super().__init__(
            model=model, train_dataset=encoded["train"], eval_dataset=encoded["validation"], data_collator=self._collate,
            compute_metrics=lambda p: scores(p.predictions.argmax(-1).tolist(), p.label_ids.tolist()),
            args=TrainingArguments(
                output_dir=str(checkpoints), seed=config.seed, num_train_epochs=config.num_epochs,
                per_device_train_batch_size=plan.micro_batch_size, gradient_accumulation_steps=plan.gradient_accumulation_steps,
                per_device_eval_batch_size=plan.micro_batch_size, learning_rate=config.learning_rate,
                warmup_steps=config.warmup_ratio, lr_scheduler_type="linear", max_grad_norm=config.max_grad_norm,
                weight_decay=0.0, fp16=dtype == torch.float16, bf16=dtype == torch.bfloat16,
                use_cpu=model.device.type == "cpu", eval_strategy="epoch", eval_on_start=True, save_strategy="epoch",
                save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
                logging_steps=max(1, steps // 30), remove_unused_columns=False, report_to="none",
                dataloader_pin_memory=model.device.type == "cuda"))
        self.model_accepts_loss_kwargs = True  # asks for num_items_in_batch, by which compute_loss divides ...
        self._loss_shifts_labels = False  # ... and which counts one label a row: nothing is shifted here

    def _collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        return pad([row["input_ids"] for row in rows], self.pad_token_id) | {"labels": torch.tensor([row["labels"] for row in rows])}

    def _get_train_sampler(self, train_dataset=None):
        # The Trainer's own draws from the global generator, which dropout also advances: the order of the second epoch
        # would then depend on the micro-batch.
        return LengthGroupedSampler(self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps,
                                    lengths=[len(ids) for ids in self.train_dataset["input_ids"]],
                                    generator=torch.Generator().manual_seed(self.config.seed))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy over the label tokens: summed and divided by the rows of the effective batch, so that no split changes it."""
        logits = label_logits(self.accelerator.unwrap_model(model), inputs["input_ids"], inputs["attention_mask"], self.label_ids)
        loss = torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="sum")
        loss = loss / (len(logits) if num_items_in_batch is None else num_items_in_batch)
        return (loss, logits) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, logits = self.compute_loss(model, inputs, return_outputs=True)
        return loss, logits, inputs["labels"]

    def fit(self, workspace: Workspace) -> dict:
        """Train, write adapter/ (of the best epoch) and training.json to `workspace`, and return the loss history.
        A finished training with this very config and subset is not repeated; one with other settings is kept in earlier/."""
        if workspace.is_current(NOTEBOOK, self.config):
            print("This workspace holds the finished training with these settings: nothing to do.")
            return json.loads((workspace / "training.json").read_text(encoding="utf-8"))
        if earlier := workspace.set_aside(NOTEBOOK, ["adapter", "training.json"]):
            print(f"An earlier training was made with other settings or data. It is kept in {earlier.relative_to(workspace.path)}.")
        shutil.rmtree(self.args.output_dir, ignore_errors=True)
        start = time.perf_counter()
        self.train()
        history = self.history(time.perf_counter() - start)
        save_adapter(self.model, self.config, workspace / "adapter")
        write_text(workspace / "training.json", json.dumps(history, indent=1))
        workspace.publish(NOTEBOOK, self.config, ["adapter", "training.json"], inputs=("02_data_subset",))
        return history

    def history(self, seconds: float) -> dict:
        """`train` (step, epoch, loss, ...) and `validation` (epoch, loss, accuracy, macro_f1) so far, `best_epoch`, speed, plan."""
        log = self.state.log_history
        validation = [{"epoch": e["epoch"]} | {name: e[f"eval_{name}"] for name in ("loss", "accuracy", "macro_f1")}
                      for e in log if "eval_loss" in e]
        return {
            "train": [{k: e[k] for k in ("step", "epoch", "loss", "learning_rate", "grad_norm")} for e in log if "loss" in e],
            "validation": validation,  # its first entry is before training
            "best_epoch": min(validation[1:], key=lambda e: e["loss"])["epoch"],
            "seconds": round(seconds, 1),
            "rows_per_second": round(len(self.train_dataset) * self.config.num_epochs / seconds, 2),
            "plan": vars(self.plan),
        }
