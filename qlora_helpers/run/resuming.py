"""A Trainer that can be stopped at any time, and goes on to the same result."""

import math
import signal
import threading
import time
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from qlora_helpers.errors import (
    ModelError,
    QLoraError,
    TrainingStopped,
    WorkspaceError,
    reason,
)
from qlora_helpers.run.checkpoints import Checkpoints
from qlora_helpers.run.files import DAMAGE, FAILURES


class _Schedule(TrainerCallback):
    """Asks for a checkpoint after so many minutes or steps, and after a signal to stop."""

    def __init__(self, trainer: "ResumableTrainer", minutes: float, steps: int | None):
        self.trainer, self.minutes, self.steps = trainer, minutes, steps
        self.stop, self.saved = False, 0.0
        self.agreed = None  # of several processes: whether one of them was asked to stop
        self.began = False  # whether a step has begun: a bad checkpoint fails before
        self.random_state = None  # before the running step, until its optimizer step begins

    def signalled(self, number, frame):
        if self.stop:
            raise KeyboardInterrupt  # a second signal ends the step that is running
        self.stop = True

    def on_train_begin(self, *args, **kwargs):
        self.saved = time.monotonic()
        self.trainer.model.train()  # once: in 7B it takes a hundredth of a second

    def on_step_begin(self, *args, **kwargs):
        self.began = True
        self.random_state = torch.get_rng_state()

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.random_state = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.trainer.steps_per_epoch == 0:
            return  # the epoch's evaluation comes first, and a checkpoint after it
        late = time.monotonic() - self.saved >= 60 * self.minutes
        due = self.steps is not None and state.global_step % self.steps == 0
        control.should_save |= self._stopping() or late or due

    def on_save(self, *args, **kwargs):
        self.saved = time.monotonic()
        if self._stopping():
            raise KeyboardInterrupt

    def _stopping(self) -> bool:
        """Return the same in all processes: one that went on alone would wait for the others."""
        return self.stop if self.agreed is None else self.agreed

    def on_train_end(self, *args, **kwargs):
        self.trainer.put(self.trainer.best)


class ResumableTrainer(Trainer):
    """The Trainer with the best epoch's weights at its end, and with whole checkpoints.

    Each holds the trainable weights, those of the best epoch so far, the states of optimizer,
    scheduler, scaler and random numbers, the log, and `facts`. The order of the rows may depend on
    the seed and `epochs_before`, and on no other state. A batch is an optimizer step. A checkpoint
    is written after each epoch, every `checkpoint_minutes` and, if given, every `checkpoint_steps`.
    """

    def __init__(self, *args, checkpoint_minutes=10.0, checkpoint_steps=None, **kwargs):
        self.checkpoints: Checkpoints | None = None
        self.epochs_before = 0  # whole epochs before this training went on
        self.best: dict[str, torch.Tensor] = {}  # the trainable weights of the best epoch
        self.facts = {}  # what else a training needs to go on, as JSON
        super().__init__(*args, **kwargs)
        self.schedule = _Schedule(self, checkpoint_minutes, checkpoint_steps)
        self.add_callback(self.schedule)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_dataset) / self.args.train_batch_size)

    @cached_property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def put(self, weights: dict[str, torch.Tensor]) -> None:
        for name, p in self.trainable.items():
            p.data.copy_(weights[name])

    def _clip_grad_norm(self, model):
        # the Trainer would look at each frozen weight too, for another hundredth
        return self.accelerator.clip_grad_norm_(self.trainable.values(), self.args.max_grad_norm)

    def _determine_best_metric(self, metrics, trial):
        if not np.isfinite(metrics["eval_loss"]):
            raise ModelError(
                f"the validation loss is {metrics['eval_loss']} after step "
                f"{self.state.global_step}: the weights are no longer numbers. Try a lower "
                f"QLORA_LEARNING_RATE (now {self.args.learning_rate:g})."
            )
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            self.best = {name: p.detach().cpu().clone() for name, p in self.trainable.items()}
        return is_best

    def _save_checkpoint(self, model, trial):
        weights = {name: p.detach().cpu() for name, p in self.trainable.items()}
        if not self.checkpoints or not self.is_world_process_zero():
            return
        if not all(p.isfinite().all() for p in weights.values()):
            return  # they make the next loss an error

        def fill(folder: Path) -> None:
            save_file(weights, folder / "adapter.safetensors")
            if self.state.best_global_step != self.state.global_step:
                save_file(self.best, folder / "best.safetensors")
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            self.state.save_to_json(str(folder / "trainer_state.json"))

        self.checkpoints.write(self.state.global_step, fill, facts=self.facts)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder = Path(resume_from_checkpoint)
        weights, best = load_file(folder / "adapter.safetensors"), folder / "best.safetensors"
        self.put(weights)
        self.best = load_file(best) if best.exists() else weights

    def run(self, checkpoints: Checkpoints, identity: dict) -> None:
        """Train, from the newest of `checkpoints` if there is one, and write checkpoints.

        Raises: TrainingStopped after SIGINT (the stop button) or SIGTERM, with a checkpoint of the
            last step written; WorkspaceError if the newest checkpoint has another `identity`, or
            none can be written; ModelError if memory runs out.
        """
        self.checkpoints, folder = checkpoints, None
        self.schedule.stop = self.schedule.began = False
        main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if main else ()  # others may not handle signals
        handlers = {number: signal.signal(number, self.schedule.signalled) for number in numbers}
        try:
            if self.is_world_process_zero():
                checkpoints.prepare()
            if newest := self._find(identity):
                folder, manifest = str(newest[0]), newest[1]
                self.go_on(manifest["step"], manifest["facts"])
                total = self.steps_per_epoch * self.args.num_train_epochs
                progress = f"{manifest['step']} of {total:g}, written {manifest['written']}"
                print(f"Going on from the checkpoint of step {progress}.")
            self.train(resume_from_checkpoint=folder)
        except KeyboardInterrupt:
            step, random_state = self.state.global_step, self.schedule.random_state
            written = step % self.steps_per_epoch == 0 or step == checkpoints.step
            # In forward and backward pass all but the random state is as after the last step.
            if random_state is not None and not written:
                torch.set_rng_state(random_state)
                self._save_checkpoint(self.model, None)
            progress = f"{step} of {self.state.max_steps}"
            raise TrainingStopped(f"Stopped at step {progress}. {self._kept()}") from None
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"memory ran out after step {self.state.global_step} ({reason(error)}). Restart "
                f"the runtime, so that nothing else holds memory. {self._kept()}"
            ) from None
        except (UnpicklingError, *DAMAGE, *FAILURES) as error:
            if folder is None or self.schedule.began or isinstance(error, QLoraError):
                raise
            is_code = isinstance(error, UnpicklingError)
            what = "objects that could run code" if is_code else "no state of this training"
            raise WorkspaceError(
                f"{folder} holds {what} ({reason(error)}). It was not loaded: delete it, and run "
                "this notebook again from its start."
            ) from None
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _find(self, identity: dict) -> tuple[Path, dict] | None:
        """Return the newest checkpoint's folder and manifest; None without one."""
        newest = self.checkpoints.newest(identity)
        trained = any("lora_B" in name and p.any() for name, p in self.trainable.items())
        if newest is None and trained:
            raise ModelError(
                "this model has been trained already, and there is no checkpoint to go on from. A "
                "new training needs a new adapter: run this notebook from its start."
            )
        return newest

    def go_on(self, step: int, facts: dict) -> None:
        """Take over the place and the facts of a checkpoint. Raises what odd facts raise."""
        self.args.eval_on_start = False
        self.epochs_before, self.facts = step // self.steps_per_epoch, facts

    def _kept(self) -> str:
        if self.checkpoints.step is None:
            return "No checkpoint was written yet: run this notebook again from its start."
        said = f"The checkpoint of step {self.checkpoints.step} is written: run this notebook again"
        if self.checkpoints.copied(30):
            return f"{said} to go on from it."
        return f"{said}. Its copy to Google Drive is not finished: keep this machine."
