"""Training: the Trainer, with its loss taken at the label alone, and a history that says how it went."""

import dataclasses
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable

import datasets
import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from qlora_helpers.config import RunConfig
from qlora_helpers.errors import ModelError, TrainingStopped
from qlora_helpers.fast.dropout import masks_of
from qlora_helpers.fast.plan import (
    BatchPlan,
    checkpoint_layers,
    decoder_layers,
    free_memory,
    plan_encoded,
)
from qlora_helpers.history import Watch, losses
from qlora_helpers.metrics import scores
from qlora_helpers.model import compute_dtype
from qlora_helpers.prompts import encode_prompts, label_token_ids, label_words
from qlora_helpers.run.checkpoints import Checkpoints
from qlora_helpers.run.resuming import ResumableTrainer
from qlora_helpers.scoring import label_logits, label_probabilities


def _one_gpu(args: TrainingArguments) -> TrainingArguments:
    """Return `args` for one GPU, whatever is visible: the Trainer would multiply the batch by the number of GPUs."""
    args._n_gpu = min(args.n_gpu, 1)
    return args


def plan_batches(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], config: RunConfig
) -> BatchPlan:
    """The largest micro-batch, and then as few checkpointed layers, as let the longest of `texts` train in the free memory.
    On a GPU found by running such a step, on a CPU by what one row keeps. Raises ModelError if a single row does not fit."""
    label_ids = label_token_ids(tokenizer, config.labels)
    return plan_encoded(
        model,
        encode_prompts(tokenizer, texts, config.max_length),
        lambda rows: label_logits(model, rows, label_ids),
        config.effective_batch_size,
    )


class LabelTrainer(ResumableTrainer):
    """The Trainer, with the loss of the label's token alone, seeded length-grouped batches, and scores by epoch.
    The best epoch by validation loss is kept. Its order of rows depends on the seed and the effective batch, never on the
    batch plan. `fit`, not `train`, writes a checkpoint after each epoch, every `checkpoint_minutes` and, if given, every
    `checkpoint_steps`; the result depends on neither."""

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        subset: dict[str, pd.DataFrame],
        config: RunConfig,
        plan: BatchPlan,
        checkpoint_minutes: float = 10.0,
        checkpoint_steps: int | None = None,
    ):
        self.label_words, self.label_ids = (
            label_words(tokenizer, config.labels),
            label_token_ids(tokenizer, config.labels),
        )
        self.config, self.plan, self.texts = config, plan, subset["train"].text.tolist()
        self._peak_before, self._losses = (
            None,
            [],
        )  # losses of the micro-batches since the last optimizer step
        self._tokenizer = tokenizer
        self._probabilities = (
            self.best_probabilities
        ) = []  # of the validation rows, at the last evaluation and at the best one
        rows = datasets.Dataset.from_dict(
            {
                "input_ids": encode_prompts(tokenizer, self.texts, config.max_length),
                "labels": subset["train"].label.tolist(),
                "row": range(len(self.texts)),
            }
        )
        dtype, _ = compute_dtype()
        one_step = config.num_epochs == 1 and len(subset["train"]) <= config.effective_batch_size
        super().__init__(
            checkpoint_minutes=checkpoint_minutes,
            checkpoint_steps=checkpoint_steps,
            model=model,
            train_dataset=rows,
            eval_dataset=subset["validation"],
            data_collator=self._collate,
            args=_one_gpu(
                TrainingArguments(
                    output_dir=tempfile.gettempdir(),  # it writes nothing there: `_save_checkpoint` is not the Trainer's
                    seed=config.seed,
                    num_train_epochs=config.num_epochs,
                    per_device_train_batch_size=plan.micro_batch_size,
                    gradient_accumulation_steps=plan.gradient_accumulation_steps,
                    learning_rate=config.learning_rate,
                    warmup_steps=0
                    if one_step
                    else config.warmup_ratio,  # a warm-up begins with rate 0
                    lr_scheduler_type="linear",
                    max_grad_norm=config.max_grad_norm,
                    weight_decay=0.0,
                    fp16=dtype == torch.float16,
                    bf16=dtype == torch.bfloat16,
                    # the fused optimizer skips a step by itself after an overflow: neither scheduler nor count would hear of it
                    optim="adamw_torch" if dtype == torch.float16 else "adamw_torch_fused",
                    use_cpu=model.device.type == "cpu",
                    eval_strategy="epoch",
                    eval_on_start=True,
                    save_strategy="epoch",
                    metric_for_best_model="eval_loss",
                    greater_is_better=False,
                    logging_steps=1,
                    remove_unused_columns=False,
                    report_to="none",
                    dataloader_pin_memory=model.device.type == "cuda",
                )
            ),
        )
        self.watch = Watch(self)
        self.add_callback(self.watch)
        self.model_accepts_loss_kwargs = (
            True  # asks for num_items_in_batch, by which compute_loss divides ...
        )
        self._loss_shifts_labels = (
            False  # ... and which counts one label a row: nothing is shifted here
        )

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> dict[str, float]:
        """Score the validation rows as `label_probabilities` does: loss, accuracy and macro-F1, logged as the Trainer's own are."""
        start = time.perf_counter()
        found = label_probabilities(
            self.model, self._tokenizer, self.eval_dataset.text, self.config
        )
        labels = self.eval_dataset.label.to_numpy()
        metrics = {"loss": float(-np.log(found[range(len(labels)), labels]).mean())}
        metrics |= scores(found.argmax(axis=1).tolist(), labels.tolist(), self.config.labels)
        metrics["runtime"] = time.perf_counter() - start
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self._probabilities = found.round(6).tolist()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _determine_best_metric(self, metrics, trial):
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            self.best_probabilities = self._probabilities
        return is_best

    def _collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        # arrays: Accelerate would look into lists token by token for tensors to move
        return {
            "labels": torch.tensor([row["labels"] for row in rows]),
            "prompts": [np.array(row["input_ids"]) for row in rows],
            "rows": np.array([row["row"] for row in rows]),
        }

    def _get_train_sampler(self, train_dataset=None):
        # The Trainer's own draws from the global generator: the order of the second epoch would then
        # depend on what else draws from it.
        sampler = LengthGroupedSampler(
            self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps,
            lengths=[len(ids) for ids in self.train_dataset["input_ids"]],
            generator=torch.Generator().manual_seed(self.config.seed),
        )
        for _ in range(self.epochs_before):
            iter(sampler)  # draws the order of an epoch
        return sampler

    def training_step(self, model, inputs, num_items_in_batch=None):
        """A micro-batch's forward and backward pass. Out of memory, it keeps fewer activations from here on, or halves the
        micro-batch, and runs it again. Raises ModelError with the rows that gave a loss that is not finite."""
        lengths = [len(prompt) for prompt in inputs["prompts"]]
        rows, tokens = len(lengths), sum(lengths)
        if rows > self.plan.micro_batch_size:
            halves = [
                {name: part[half] for name, part in inputs.items()}
                for half in (slice(rows // 2), slice(rows // 2, None))
            ]
            return sum(self.training_step(model, half, num_items_in_batch) for half in halves)
        checkpoint_layers(
            self.model, self.plan.checkpointed_layers(len(decoder_layers(self.model)), tokens)
        )
        trainable = list(self.trainable().values())
        gradients = [p.grad if p.grad is None else p.grad.clone() for p in trainable]
        step_seed = [self.config.seed, self.state.global_step]
        try:
            with masks_of(step_seed, inputs["rows"], lengths, self.model.device):
                loss = super().training_step(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError:
            loss = None  # and leave this block: its traceback holds the activations
        if loss is None:
            for p, gradient in zip(trainable, gradients, strict=True):
                p.grad = gradient
            free_memory()
            self._ask_for_less(rows, tokens)
            return self.training_step(model, inputs, num_items_in_batch)
        self._losses.append((loss, inputs["rows"]))
        if self.accelerator.sync_gradients:
            self._check_losses()
        return loss

    def _ask_for_less(self, rows: int, tokens: int) -> None:
        kept = min(self.plan.kept_activations, tokens * len(decoder_layers(self.model)))
        if kept < tokens and rows == 1:
            raise ModelError(
                f"a single row of {tokens} tokens runs out of GPU memory: set QLORA_MAX_LENGTH lower, or free the GPU "
                "of other work."
            )
        half = math.ceil(rows / 2)
        less = (
            {"kept_activations": kept // 2}
            if kept >= tokens
            else {
                "micro_batch_size": half,
                "gradient_accumulation_steps": math.ceil(self.config.effective_batch_size / half),
            }
        )
        reason = f"step {self.state.global_step + 1} ran out of memory over {rows} rows ({tokens:,} tokens)"
        print(f"{reason.capitalize()}. From here on: {less}.")
        self.plan = dataclasses.replace(self.plan, **less, reason=reason)

    def _check_losses(self):
        parts, self._losses = self._losses, []
        for value, (_, rows) in zip(
            torch.stack([loss for loss, _ in parts]).tolist(), parts, strict=True
        ):
            if not np.isfinite(value):
                raise ModelError(
                    f"the loss is {value} at step {self.state.global_step + 1}, in the micro-batch of training rows "
                    f"{rows.tolist()}, the first of which is {self.texts[rows[0]][:60]!r}. Look at these rows; then try "
                    f"a lower QLORA_LEARNING_RATE (now {self.config.learning_rate:g})."
                )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy over the label tokens: summed and divided by the rows of the effective batch, so that no split changes it."""
        logits = label_logits(self.model, inputs["prompts"], self.label_ids)
        loss = torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="sum")
        return loss / (len(logits) if num_items_in_batch is None else num_items_in_batch)

    def floating_point_ops(self, inputs):
        return 0  # the Trainer counts them from padded input ids, which there are none of

    def facts(self) -> dict:
        return {
            "seconds": self.watch.seconds,
            "skipped_steps": self.watch.skipped_steps,
            "plan": vars(self.plan),
            "peak_gib": self.peak_gib(),
            "best_probabilities": self.best_probabilities,
        }

    def take_over(self, facts: dict) -> None:
        self.watch.before, self.watch.skipped_steps = facts["seconds"], facts["skipped_steps"]
        self.plan, self._peak_before = BatchPlan(**facts["plan"]), facts["peak_gib"]
        self.best_probabilities = facts["best_probabilities"]

    def peak_gib(self) -> float | None:
        peak = (
            round(torch.cuda.max_memory_reserved() / 2**30, 2)
            if self.model.device.type == "cuda"
            else None
        )
        return max(filter(None, (peak, self._peak_before)), default=None)

    def fit(
        self,
        checkpoints: Checkpoints,
        show: Callable[[Callable[[], dict], str], object] | None = None,
    ) -> dict:
        """Train, and return the loss history. The model then has the weights of the best epoch.

        A training that was stopped goes on from its newest complete checkpoint, to the result that
        it would have had.

        Args:
            checkpoints: of this training, as in `workspace.checkpoints()`.
            show: is called as training goes on with a function that returns the history so far, and
                a line that says how far it is: `LossPanel.live`, for one.

        Raises: TrainingStopped after an interrupt; WorkspaceError if an unfinished training has
            other settings or data, or another process is writing there.
        """
        self.checkpoints, self.watch.show = checkpoints, show
        with self.checkpoints.hold("03_qlora_training"):
            try:
                folder = self.find(self._identity())
                self.checkpoints.prepare()
                self.run(folder)
            except TrainingStopped as stopped:
                if show:
                    show(lambda: self.history(self.watch.seconds), str(stopped))
                raise
            except KeyboardInterrupt:
                raise TrainingStopped(
                    "Stopped while files were read or written: nothing is lost. Run this notebook again."
                ) from None
        return self.history(self.watch.seconds)

    def _identity(self) -> dict:
        """What a checkpoint must have been made with to be gone on from: settings and rows."""
        lora = self.model.peft_config["default"]
        settings = json.loads(self.config.to_json()) | {
            f"LoraConfig.{name}": value
            for name, value in lora.to_dict().items()
            if name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
        }
        settings["LoraConfig.target_modules"] = sorted(lora.target_modules)
        rows = [[self.texts, list(self.train_dataset["labels"])]]
        rows.append([list(self.eval_dataset.text), self.eval_dataset.label.tolist()])
        data = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return {"settings": settings, "data": data}

    def history(self, seconds: float) -> dict:
        """`train` (step, epoch, loss, ...) and `validation` (epoch, loss, accuracy, macro_f1, ...) so far, `best_epoch`, speed
        (`rows_per_second` with validation and checkpoints, `step_rows_per_second` without),
        plan, label words, and `best_probabilities`: (validation rows, labels) at the best epoch."""
        return losses(self.state.log_history) | {
            "seconds": round(seconds, 2),  # as in the log: never less than there
            "rows_per_second": round(len(self.train_dataset) * self.config.num_epochs / seconds, 2),
            "step_rows_per_second": self.watch.step_rows_per_second(),
            "skipped_steps": self.watch.skipped_steps,
            "peak_gib": self.peak_gib(),
            "plan": vars(self.plan),
            "label_words": self.label_words,
            "best_probabilities": self.best_probabilities,
        }
