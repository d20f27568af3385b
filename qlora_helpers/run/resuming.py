"""A Trainer that can be stopped anywhere, and goes on to the result that it would have had."""

import contextlib
import math
import signal
import threading
import time
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from qlora_helpers.errors import ModelError, TrainingStopped, WorkspaceError
from qlora_helpers.run.checkpoints import Checkpoints
from qlora_helpers.run.files import reason


class _Due(TrainerCallback):
    """Says when a checkpoint is due: after so many minutes or steps, and when the training is asked to stop."""

    def __init__(self, trainer: "ResumableTrainer", minutes: float, steps: int | None):
        self.trainer, self.minutes, self.steps = trainer, minutes, steps
        self.stop, self.random, self.saved = False, None, 0.0

    def on_train_begin(self, *args, **kwargs):
        self.saved = time.monotonic()

    def on_step_begin(self, *args, **kwargs):
        self.random = (
            torch.get_rng_state()
        )  # from here to the optimizer's step nothing else changes

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.random = None

    def on_step_end(self, args, state, control, **kwargs):
        steps, minutes = self.steps or state.max_steps, (time.monotonic() - self.saved) / 60
        if (
            state.global_step % self.trainer.steps_per_epoch
        ):  # at an epoch's end the evaluation comes first, and then a checkpoint
            control.should_save |= (
                self.stop or minutes >= self.minutes or state.global_step % steps == 0
            )

    def on_save(self, *args, **kwargs):
        self.saved = time.monotonic()
        if self.stop:
            raise KeyboardInterrupt

    def on_train_end(self, *args, **kwargs):
        self.trainer.put(self.trainer.best)


class ResumableTrainer(Trainer):
    """The Trainer with the best epoch's weights at its end, and with checkpoints of its own: each holds the trainable weights, those of
    the best epoch so far, the state of optimizer, scheduler, scaler and random numbers, the log, and what `facts` returns.

    The order of the rows must come from `epochs_before` and nothing else that a stop would lose. Without `checkpoints` none is written."""

    def __init__(self, *args, checkpoint_minutes: float, checkpoint_steps: int | None, **kwargs):
        self.checkpoints: Checkpoints | None = None
        self._trainable: dict[str, torch.nn.Parameter] = {}
        self.epochs_before, self.best = (
            0,
            {},
        )  # whole epochs before this training went on; the trainable weights of the best one
        super().__init__(*args, **kwargs)
        self.due = _Due(self, checkpoint_minutes, checkpoint_steps)
        self.add_callback(self.due)

    def facts(self) -> dict:
        """What else a training goes on with, as JSON."""
        raise NotImplementedError

    def take_over(self, facts: dict) -> None:
        """Go on with what `facts` returned."""
        raise NotImplementedError

    @property
    def steps_per_epoch(self) -> int:
        effective_batch_size = (
            self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        )
        return math.ceil(len(self.train_dataset) / effective_batch_size)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Return the trainable parameters by name. They are looked up once: LoRA makes thousands of modules of a model."""
        if not self._trainable:
            self._trainable = {
                name: p for name, p in self.model.named_parameters() if p.requires_grad
            }
        return self._trainable

    def put(self, weights: dict[str, torch.Tensor]) -> None:
        """Give the model these trainable weights, if there are any."""
        for name, p in self.trainable().items() if weights else ():
            p.data.copy_(weights[name])

    def _determine_best_metric(self, metrics, trial):
        if not np.isfinite(metrics["eval_loss"]):
            raise ModelError(
                f"the validation loss is {metrics['eval_loss']} after step {self.state.global_step}: the weights are no "
                f"longer numbers. Try a lower QLORA_LEARNING_RATE (now {self.args.learning_rate:g})."
            )
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            self.best = {name: p.detach().cpu().clone() for name, p in self.trainable().items()}
        return is_best

    def _save_checkpoint(self, model, trial):
        weights = {name: p.detach().cpu() for name, p in self.trainable().items()}
        if not self.checkpoints or not all(p.isfinite().all() for p in weights.values()):
            return  # the next loss will say that the weights are no longer numbers: the checkpoint before stays the newest

        def fill(folder: Path) -> None:
            save_file(weights, folder / "adapter.safetensors")
            save_file(self.best, folder / "best.safetensors")
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            self.state.save_to_json(str(folder / "trainer_state.json"))

        cut = [self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps]
        self.checkpoints.write(self.state.global_step, fill, cut=cut, facts=self.facts())

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.put(load_file(Path(resume_from_checkpoint) / "adapter.safetensors"))
        self.best = load_file(Path(resume_from_checkpoint) / "best.safetensors")

    def find(self, identity: dict) -> str | None:
        """The folder of the checkpoint to go on from, its facts taken over; None where a training starts. Raises WorkspaceError if
        it is of other settings, ModelError if a start is due and the model is not at its start."""
        found = self.checkpoints.newest(identity)
        if found is None:
            if any("lora_B" in name and p.any() for name, p in self.trainable().items()):
                raise ModelError(
                    "this model has been trained already, and there is no checkpoint to go on from. Run this notebook again "
                    "from its start: a new training needs a new adapter."
                )
            return None
        folder, manifest = found
        rows, accumulated = manifest["cut"]
        self.args.per_device_train_batch_size = rows
        self.args.gradient_accumulation_steps, self._train_batch_size = (
            accumulated,
            self.args.train_batch_size,
        )
        self.args.eval_on_start, self.epochs_before = (
            False,
            manifest["step"] // self.steps_per_epoch,
        )
        self.take_over(manifest["facts"])
        print(
            f"Going on from the checkpoint of step {manifest['step']} of {self.steps_per_epoch * int(self.args.num_train_epochs)}, "
            f"written {manifest['written']}."
        )
        return str(folder)

    def run(self, folder: str | None) -> None:
        """Train, from the checkpoint in `folder` if there is one. Raises TrainingStopped after SIGINT (the stop button), SIGTERM or
        KeyboardInterrupt, with a checkpoint of the last step written; ModelError if memory runs out."""
        try:
            with self._stoppable():
                self.train(resume_from_checkpoint=folder)
        except KeyboardInterrupt:
            self._save_after_interrupt()
            raise TrainingStopped(
                f"Stopped at step {self.state.global_step} of {self.state.max_steps}. {self._kept()}"
            ) from None
        except UnpicklingError as error:  # its manifest is whole: it was made so
            raise WorkspaceError(
                f"{folder} holds more than the state of a training ({reason(error)}). It was not loaded: delete it, and "
                "run this notebook again from its start."
            ) from None
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ModelError(
                f"memory ran out after step {self.state.global_step} ({reason(error)}). Restart the runtime, so that nothing "
                f"else holds memory. {self._kept()}"
            ) from None

    @contextlib.contextmanager
    def _stoppable(self):
        """A signal ends the training after the step that is running; a second one ends it at once."""

        def ask(number, frame):
            if self.due.stop:
                raise KeyboardInterrupt
            self.due.stop = True

        main = threading.current_thread() is threading.main_thread()  # no other may handle signals
        before = {
            number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM) if main
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _save_after_interrupt(self) -> None:
        # In forward or backward all but the random state is as after the last step. An epoch's end has its checkpoint already.
        step = self.state.global_step
        if (
            self.due.random is not None
            and step % self.steps_per_epoch
            and step != self.checkpoints.step
        ):
            torch.set_rng_state(self.due.random)
            self._save_checkpoint(self.model, None)

    def _kept(self) -> str:
        if self.checkpoints.step is None:
            return "There is no checkpoint yet: it starts again when this notebook is run again from its start."
        copied = (
            ""
            if self.checkpoints.copied(30)
            else " Its copy to Google Drive is not finished: keep this machine."
        )
        return f"The checkpoint of step {self.checkpoints.step} is written: it goes on from there when this notebook is run again.{copied}"
