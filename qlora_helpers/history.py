"""What a training log says: how long it takes, its losses by step and epoch, and a sentence about them."""

import time

import numpy as np
from transformers import TrainerCallback


def what_validation_says(history: dict) -> str:
    """What the validation losses of `LabelTrainer.history` did, in a sentence.
    It guesses nothing of more epochs."""
    first, *epochs = history["validation"]
    kept, last = min(epochs, key=lambda e: e["loss"]), epochs[-1]
    if kept["loss"] >= first["loss"]:
        return (
            f"Validation loss was {first['loss']:.3f} before training, and is not lower after "
            f"any epoch ({kept['loss']:.3f} at best): training has not helped."
        )
    if kept is not last:
        return (
            f"Validation loss was lowest after epoch {kept['epoch']:g} ({kept['loss']:.3f}) "
            f"and is {last['loss']:.3f} after the last: later epochs did not help on these "
            "rows."
        )
    before = epochs[-2] if len(epochs) > 1 else first
    return (
        f"Validation loss fell from {before['loss']:.3f} to {last['loss']:.3f} in the last "
        "epoch. Only a training with more epochs can tell whether it would fall further."
    )


class Watch(TrainerCallback):
    """Adds the time to what is logged, counts the steps that the float16 scaler skipped after an overflow, and shows how far it is."""

    def __init__(self, trainer):
        self.trainer, self.show, self.skipped_steps = trainer, None, 0
        self.before, self.start = (
            0.0,
            time.perf_counter(),
        )  # seconds spent before the training went on
        self.step_start, self.steps = 0.0, []  # seconds of each step of this process

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.start

    def on_train_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_begin(self, *args, **kwargs):
        self.step_start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.steps.append(time.perf_counter() - self.step_start)
        self.skipped_steps += self.trainer.accelerator.optimizer_step_was_skipped

    def on_log(self, args, state, control, **kwargs):
        seconds = self.seconds
        state.log_history[-1]["seconds"] = round(seconds, 2)
        if self.show and state.global_step:
            rate = state.global_step * self.trainer.config.effective_batch_size / seconds
            peak = self.trainer.peak_gib()
            memory = "" if peak is None else f", peak {peak:.1f} GiB of GPU memory"
            self.show(
                lambda: self.trainer.history(seconds),
                f"step {state.global_step} of {state.max_steps}, {rate:.2f} rows/s"
                + self._left(state)
                + memory,
            )

    def step_rows_per_second(self) -> float | None:
        """Return the rows a second of the median step; None before the second step, since the first compiles."""
        if len(self.steps) < 2:
            return None
        return round(self.trainer.config.effective_batch_size / float(np.median(self.steps[1:])), 2)

    def _left(self, state) -> str:
        """The time of the steps and validations to come, by recent steps and the last validation.
        The first of each compile; a row validates no slower than it trains."""
        if len(self.steps) < 2:
            return ""
        step = float(np.median(self.steps[1:][-50:]))
        batches = len(self.trainer.eval_dataset) / self.trainer.config.effective_batch_size
        validations = [e["eval_runtime"] for e in state.log_history if "eval_runtime" in e]
        to_come = max(0, state.num_train_epochs + 1 - len(validations))  # one comes before training
        seconds = step * (state.max_steps - state.global_step)
        seconds += to_come * min([step * batches, *validations[-1:]])
        return f", {seconds / 60:.1f} minutes left"


def losses(log: list[dict]) -> dict:
    """Return what the Trainer's `log` says so far: `train` (step, epoch, loss, ...), `validation`
    (epoch, loss, accuracy, macro_f1, ...; first the one before training), and `best_epoch`."""
    train = ("step", "epoch", "loss", "learning_rate", "grad_norm", "seconds")
    validation = [
        {name: e[name] for name in ("step", "epoch", "seconds")}
        | {name: e[f"eval_{name}"] for name in ("loss", "accuracy", "macro_f1")}
        for e in log
        if "eval_loss" in e
    ]
    best = min(validation[1:], key=lambda e: e["loss"], default=None)
    return {
        "train": [{name: e[name] for name in train} for e in log if "loss" in e],
        "validation": validation,
        "best_epoch": best and best["epoch"],
    }
