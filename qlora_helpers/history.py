"""What a training's log says: its losses, its speed, and what validation shows."""

import time

import numpy as np
from transformers import TrainerCallback


def what_validation_says(history: dict) -> str:
    """Return a sentence on the validation losses of a history, without a guess at more epochs."""
    first, *epochs = history["validation"]
    kept, last = min(epochs, key=lambda e: e["loss"]), epochs[-1]
    if kept["loss"] >= first["loss"]:
        return (
            f"Validation loss was {first['loss']:.3f} before training, and is not lower after "
            f"any epoch ({kept['loss']:.3f} at best): training has not helped."
        )
    if kept is not last:
        return (
            f"Validation loss was lowest after epoch {kept['epoch']:g} ({kept['loss']:.3f}) and is "
            f"{last['loss']:.3f} after the last: later epochs did not help on these rows."
        )
    before = history["validation"][-2]
    return (
        f"Validation loss fell from {before['loss']:.3f} to {last['loss']:.3f} in the last epoch. "
        "Only a training with more epochs can tell whether it would fall further."
    )


class Watch(TrainerCallback):
    """Logs the time and the steps that the float16 scaler skipped, and shows the progress."""

    def __init__(self, trainer):
        self.trainer, self.show, self.skipped_steps = trainer, None, 0
        self.start = self.step_start = time.perf_counter()
        self.steps = []  # seconds of each step in this process

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @property
    def step_seconds(self) -> float | None:
        """The median step's time; None before the second step, since the first one compiles."""
        return float(np.median(self.steps[1:])) if len(self.steps) > 1 else None

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()
        if state.log_history:  # of a training that goes on
            self.start -= state.log_history[-1]["seconds"]
            self.skipped_steps = state.log_history[-1]["skipped_steps"]

    def on_step_begin(self, *args, **kwargs):
        self.step_start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.steps.append(time.perf_counter() - self.step_start)
        self.skipped_steps += self.trainer.accelerator.optimizer_step_was_skipped

    def on_log(self, args, state, control, **kwargs):
        seconds, rows = self.seconds, self.trainer.config.effective_batch_size
        state.log_history[-1] |= {"seconds": round(seconds, 2), "skipped_steps": self.skipped_steps}
        if not self.show or not state.global_step:
            return
        status = f"step {state.global_step} of {state.max_steps}, "
        status += f"{state.global_step * rows / seconds:.2f} rows/s"
        if step := self.step_seconds:
            # a validation row takes no longer than a training row
            validations = state.num_train_epochs - int(state.epoch)
            steps = validations * len(self.trainer.eval_dataset) / rows
            left = step * (state.max_steps - state.global_step + steps)
            status += f", {left / 60:.1f} minutes left"
        if peak := self.trainer.peak_gib():
            status += f", peak {peak:.1f} GiB of GPU memory"
        self.show(lambda: self.trainer.history(seconds), status)


def losses(log: list[dict]) -> dict:
    """Return the steps and validations in the Trainer's `log`, and what the best epoch gave."""
    names = ("step", "epoch", "loss", "learning_rate", "grad_norm", "seconds")
    train = [{name: e[name] for name in names} for e in log if "loss" in e]
    names = ("step", "epoch", "seconds", "eval_loss", "eval_accuracy", "eval_macro_f1")
    evaluations = [e for e in log if "eval_loss" in e]
    validation = [{name.removeprefix("eval_"): e[name] for name in names} for e in evaluations]
    # the first is from before training
    best = min(evaluations[1:], key=lambda e: e["eval_loss"], default={"epoch": None})
    return {
        "train": train,
        "validation": validation,
        "best_epoch": best["epoch"],
        "best_probabilities": best.get("probabilities", []),  # which come after the losses
    }
