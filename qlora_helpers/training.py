"""Training: the Trainer with a loss at the label's token alone, and the history of a training."""

import contextlib
import hashlib
import json
import math
import tempfile
from collections.abc import Callable
from functools import partial

import datasets
import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from qlora_helpers.config import RunConfig, tracker, workspace_folder
from qlora_helpers.errors import ModelError
from qlora_helpers.fast import processes
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

_cross_entropy = partial(torch.nn.functional.cross_entropy, reduction="sum")


def plan_batches(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], config: RunConfig
) -> BatchPlan:
    """Return the largest micro-batch that fits the memory, with the fewest checkpointed layers.

    It is measured on the longest of `texts`; of several processes, each plans its own share of an
    effective batch. Raises ModelError if a single row does not fit.
    """
    encoded = encode_prompts(tokenizer, texts, config.max_length)
    forward = partial(label_logits, model, label_ids=label_token_ids(tokenizer, config.labels))
    share = math.ceil(config.effective_batch_size / processes.count())
    return plan_encoded(model, encoded, forward, share)


class LabelTrainer(ResumableTrainer):
    """The Trainer with a loss at the label's token, which ends with the best epoch's weights.

    The order of rows follows the seed and the effective batch alone.

    Args:
        model: with LoRA attached.
        subset: the tables `train` and `validation`, with the columns `text` and `label`.
        plan: how an effective batch is cut to fit the memory.
        loss: returns the sum of the rows' losses from (rows, labels) float32 logits of the label
            tokens and the (rows,) labels. By default the cross-entropy.
        options: of `ResumableTrainer`, for its checkpoints.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        subset: dict[str, pd.DataFrame],
        config: RunConfig,
        plan: BatchPlan,
        loss: Callable = _cross_entropy,
        **options,
    ):
        self.config, self.loss, self.tokenizer = config, loss, tokenizer
        self.label_words = label_words(tokenizer, config.labels)
        self.label_ids = label_token_ids(tokenizer, config.labels)
        train = subset["train"]
        self.texts = train.text.tolist()
        prompts = encode_prompts(tokenizer, self.texts, config.max_length)
        rows = {"prompt": prompts, "label": train.label.tolist(), "row": range(len(train))}
        dtype, _ = compute_dtype()
        one_step = config.num_epochs == 1 and len(train) <= config.effective_batch_size
        report_to = tracker()
        args = TrainingArguments(
            # without a tracker nothing is written there
            output_dir=tempfile.gettempdir() if report_to == "none" else workspace_folder(),
            report_to=report_to,
            seed=config.seed,
            num_train_epochs=config.num_epochs,
            per_device_train_batch_size=config.effective_batch_size,  # `training_step` cuts it
            learning_rate=config.learning_rate,
            warmup_steps=0 if one_step else config.warmup_ratio,  # a warm-up begins with rate 0
            max_grad_norm=config.max_grad_norm,
            fp16=dtype == torch.float16,
            bf16=dtype == torch.bfloat16,
            # after an overflow the fused one skips a step without the scheduler's knowledge
            optim="adamw_torch" if dtype == torch.float16 else "adamw_torch_fused",
            use_cpu=model.device.type == "cpu",
            eval_strategy="epoch",
            eval_on_start=True,
            save_strategy="epoch",
            metric_for_best_model="eval_loss",
            logging_steps=1,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        # The model is on one GPU. The Trainer would multiply the batch by the number it sees.
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collate,
            train_dataset=datasets.Dataset.from_dict(rows),
            eval_dataset=subset["validation"],
            **options,
        )
        self.watch = Watch(self)
        self.add_callback(self.watch)
        self.facts["plan"] = vars(plan)

    @property
    def plan(self) -> BatchPlan:
        return BatchPlan(**self.facts["plan"])

    def go_on(self, step, facts):
        super().go_on(step, facts)
        size, kept = self.plan.micro_batch_size, self.plan.kept_activations
        if type(size) is not int or type(kept) is not int or min(size - 1, kept) < 0:
            raise ValueError(f"its plan is {str(facts['plan'])[:200]}")

    def _collate(self, rows: list[dict]) -> dict:
        # arrays: Accelerate would look into lists token by token for tensors to move
        return {
            "labels": torch.tensor([row["label"] for row in rows]),
            "prompts": [np.array(row["prompt"]) for row in rows],
            "rows": np.array([row["row"] for row in rows]),
        }

    def _get_train_sampler(self, train_dataset=None):
        # The Trainer's own sampler uses the global generator: the order of the second epoch would
        # then depend on what else draws from it.
        sampler = LengthGroupedSampler(
            self.config.effective_batch_size,
            lengths=[len(prompt) for prompt in self.train_dataset["prompt"]],
            generator=torch.Generator().manual_seed(self.config.seed),
        )
        for _ in range(self.epochs_before):
            iter(sampler)  # draws the order of an epoch
        return sampler

    def get_train_dataloader(self):
        # Each process gets the whole effective batch, and `training_step` takes its share:
        # Accelerate's shards would be equal, with rows that repeat.
        return DataLoader(
            self.train_dataset,
            batch_size=self.config.effective_batch_size,
            sampler=self._get_train_sampler(),
            collate_fn=self.data_collator,
        )

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run forward and backward pass of an effective batch, in the plan's micro-batches.

        One that needs too much memory is halved. Of several processes, each takes every n-th row;
        the gradients are then summed. Raises ModelError for a loss that is not finite.
        """
        whole = len(inputs["rows"])
        inputs = {name: processes.share(values) for name, values in inputs.items()}
        total = torch.zeros((), device=self.model.device)
        start, seed = 0, [self.config.seed, self.state.global_step]
        while start < len(inputs["rows"]):
            micro_batch = slice(start, start + self.plan.micro_batch_size)
            part = {name: values[micro_batch] for name, values in inputs.items()}
            lengths = [len(prompt) for prompt in part["prompts"]]
            layers = self.plan.checkpointed_layers(len(decoder_layers(self.model)), sum(lengths))
            checkpoint_layers(self.model, layers)
            trainable = self.trainable.values()
            gradients = [p.grad if p.grad is None else p.grad.clone() for p in trainable]
            try:
                with masks_of(seed, part["rows"], lengths, self.model.device):
                    loss = self.compute_loss(model, part, num_items_in_batch=whole)
                    self.accelerator.backward(loss)
                    loss = loss.detach()  # without what the pass has kept in memory
            except torch.OutOfMemoryError:
                loss = None  # after this block, nothing holds the traceback with its activations
            if loss is None:
                for p, gradient in zip(trainable, gradients, strict=True):
                    p.grad = gradient
                free_memory()
                self._halve_plan(len(lengths), sum(lengths))
                continue
            if not loss.isfinite():
                raise ModelError(
                    f"the loss is {loss.item()} at step {self.state.global_step + 1}, in the "
                    f"micro-batch of training rows {part['rows'].tolist()}, the first of which is "
                    f"{self.texts[part['rows'][0]][:60]!r}. Look at these rows; then try a lower "
                    f"QLORA_LEARNING_RATE (now {self.config.learning_rate:g})."
                )
            total, start = total + loss, start + len(lengths)
        return total if processes.count() == 1 else self._summed(total)

    def _summed(self, loss: torch.Tensor) -> torch.Tensor:
        """Sum in one message over all processes: the gradients, `loss`, and the wish to stop."""
        parameters = self.trainable.values()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        numbers = torch.stack([loss, loss.new_tensor(self.schedule.stop)])
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), numbers])
        flat = processes.summed(flat, flat.device)
        *parts, numbers = flat.split([*(gradient.numel() for gradient in gradients), 2])
        self.schedule.agreed = bool(numbers[1])
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view_as(p)
        return numbers[0]

    def _halve_plan(self, rows: int, tokens: int) -> None:
        """Go on with half the micro-batch, and half the activations kept for backward. Raises
        ModelError if one row is still too much."""
        kept = min(self.plan.kept_activations, tokens * len(decoder_layers(self.model)))
        if rows == 1 and kept < tokens:
            raise ModelError(
                f"a single row of {tokens} tokens runs out of GPU memory: set QLORA_MAX_LENGTH "
                "lower, or free the GPU of other work."
            )
        size, step = math.ceil(rows / 2), self.state.global_step + 1
        steps = math.ceil(self.config.effective_batch_size / size)
        reason = f"step {step} ran out of memory over {rows} rows ({tokens:,} tokens)"
        print(f"{reason.capitalize()}: from here on, a micro-batch has {size} rows.")
        self.facts["plan"] = vars(BatchPlan(size, steps, kept // 2, self.plan.peak_gib, reason))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return a micro-batch's part of its effective batch's mean loss, however that is cut."""
        logits = label_logits(self.model, inputs["prompts"], self.label_ids)
        return self.loss(logits, inputs["labels"].to(logits.device)) / num_items_in_batch

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Return and log loss, accuracy and macro-F1 of the validation rows."""
        texts, labels = self.eval_dataset.text, self.eval_dataset.label.to_numpy()
        probabilities = label_probabilities(self.model, self.tokenizer, texts, self.config)
        metrics = {"loss": float(-np.log(probabilities[range(len(labels)), labels]).mean())}
        metrics |= scores(probabilities.argmax(1).tolist(), labels.tolist(), self.config.labels)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.state.log_history[-1]["probabilities"] = probabilities.round(6).tolist()
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs):
        return 0  # the Trainer counts them from padded input ids, which there are none of

    def fit(self, checkpoints: Checkpoints, show: Callable | None = None) -> dict:
        """Train, and return the history. The model then has the weights of the best epoch.

        A stopped training goes on from the newest of `checkpoints` (`workspace.checkpoints()`), to
        the result that it would have had. `show`, such as `LossPanel.live`, gets a function that
        returns the history so far, and a line of progress. Raises what `ResumableTrainer.run` does.
        """
        self.watch.show = show
        is_first = self.is_world_process_zero()
        with checkpoints.hold("03_qlora_training") if is_first else contextlib.nullcontext():
            self.run(checkpoints, self._identity())
        return self.history(self.watch.seconds)

    def _identity(self) -> dict:
        """Return the settings and a hash of the rows. A training goes on only with these."""
        lora = self.model.peft_config["default"]
        names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
        settings = json.loads(self.config.to_json())
        settings |= {f"LoraConfig.{name}": getattr(lora, name) for name in names}
        settings["LoraConfig.target_modules"] = sorted(lora.target_modules)
        rows = [self.texts, list(self.train_dataset["label"])]
        rows += [self.eval_dataset.text.tolist(), self.eval_dataset.label.tolist()]
        return {"settings": settings, "data": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}

    def peak_gib(self) -> float | None:
        """Return the most GPU memory that this process has reserved, in GiB; None on a CPU."""
        on_gpu = self.model.device.type == "cuda"
        return round(torch.cuda.max_memory_reserved() / 2**30, 2) if on_gpu else None

    def history(self, seconds: float) -> dict:
        """Return the losses, speed, memory and plan of a training that has taken `seconds` so far.

        `rows_per_second` counts validation and checkpoints, `step_rows_per_second` does not.
        """
        rows, step = len(self.train_dataset) * self.config.num_epochs, self.watch.step_seconds
        return losses(self.state.log_history) | {
            "seconds": round(seconds, 2),
            "rows_per_second": round(rows / seconds, 2),
            "step_rows_per_second": step and round(self.config.effective_batch_size / step, 2),
            "skipped_steps": self.watch.skipped_steps,
            "peak_gib": self.peak_gib(),
            "plan": vars(self.plan),
            "label_words": self.label_words,
        }
