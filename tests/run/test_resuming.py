import dataclasses
import os
import pickle
import shutil
import signal
import threading
from pathlib import Path

import pytest
import stages
import torch

from qlora_helpers import LossPanel, Workspace, training
from qlora_helpers.errors import ModelError, TrainingStopped, WorkspaceError
from qlora_helpers.run.checkpoints import Checkpoints
from qlora_helpers.run.files import read_manifest, sealed, sha256


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory) -> dict:
    """What a run ends with that was never stopped, and wrote no checkpoint but the epochs'."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_WORKSPACE", str(folder))
        stages.set_up(stages.tiny_config(tiny))
        stages.draw()
        stages.train(checkpoint_steps=None)
        stages.evaluate()
    return stages.result(folder)


@pytest.fixture
def prepared(tiny, workspace):
    """A function that makes a trainer in a workspace that has its subset."""
    stages.set_up(stages.tiny_config(tiny))
    stages.draw()

    def prepare(**options):
        run, config = stages.open_workspace("02_data_subset")
        return run, stages.trainer_for(run, config, **options)

    return prepare


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def _finish(prepared, workspace) -> dict:
    run, trainer = prepared()
    stages.fit(run, trainer)
    stages.evaluate()
    return stages.result(workspace)


@pytest.mark.parametrize("step", [1, 7])
def test_an_interrupt_inside_an_accumulation_loses_nothing(
    prepared, workspace, uninterrupted, step
):
    run, trainer = prepared()
    stages.stop_at(trainer, step)
    panel = LossPanel(run)
    with pytest.raises(
        TrainingStopped,
        match=rf"Stopped at step {step} of 12. The checkpoint of step {step} is written: run this",
    ):
        stages.fit(run, trainer, panel)
    assert f"The checkpoint of step {step} is written" in panel.status.value
    assert set(_names(workspace / "checkpoints")) == {
        f"checkpoint-{n}" for n in (6, step) if n <= step
    }
    assert _finish(prepared, workspace) == uninterrupted
    assert not (workspace / "checkpoints").exists()


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 6), (signal.SIGTERM, 4)])
def test_a_signal_ends_training_after_the_step_with_a_checkpoint(
    prepared, workspace, uninterrupted, number, step
):
    run, trainer = prepared()
    handlers, done = (
        [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)],
        trainer.training_step,
    )

    def training_step(*args, **kwargs):
        if trainer.state.global_step == step - 1:
            os.kill(os.getpid(), number)
        return done(*args, **kwargs)

    trainer.training_step = training_step
    with pytest.raises(TrainingStopped, match="Stopped"):
        stages.fit(run, trainer)
    assert handlers == [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    assert _finish(prepared, workspace) == uninterrupted


def test_an_interrupt_before_the_first_step_starts_again(prepared, workspace, uninterrupted):
    run, trainer = prepared()
    stages.stop_at(trainer, 0)
    with pytest.raises(TrainingStopped, match="No checkpoint was written yet"):
        stages.fit(run, trainer)
    assert _finish(prepared, workspace) == uninterrupted


def test_an_interrupt_in_the_first_evaluation_starts_again(prepared, workspace, uninterrupted):
    run, trainer = prepared()
    trainer.compute_loss = lambda *args, **kwargs: signal.default_int_handler(signal.SIGINT, None)
    panel = LossPanel(run)
    with pytest.raises(
        TrainingStopped, match="Stopped at step 0 of 12. No checkpoint was written yet"
    ):
        stages.fit(run, trainer, panel)
    assert "Stopped at step 0" in panel.status.value
    assert _finish(prepared, workspace) == uninterrupted


def test_a_trained_model_is_no_start(prepared):
    run, trainer = prepared()
    trainer.train()
    with pytest.raises(ModelError, match="this model has been trained already"):
        stages.fit(run, trainer)


def test_time_spent_before_is_counted_and_skipped_steps_too(prepared):
    run, trainer = prepared()
    stages.stop_at(trainer, 5)
    trainer.watch.before, trainer.watch.skipped_steps = 1000.0, 3
    with pytest.raises(TrainingStopped):
        stages.fit(run, trainer)
    run, trainer = prepared()
    history = stages.fit(run, trainer)
    seconds = [entry["seconds"] for entry in history["train"]] + [history["seconds"]]
    # the clock starts again at step 6: without the time before, its seconds would be few
    assert len(seconds) == 13 and seconds == sorted(seconds) and seconds[0] >= 1000
    assert history["skipped_steps"] == 3


def test_a_cut_that_memory_now_allows_does_not_change_the_rest(prepared, workspace, uninterrupted):
    """Another micro-batch rounds otherwise: a training goes on with the plan that it began with."""
    run, trainer = prepared()
    stages.stop_at(trainer, 5)
    with pytest.raises(TrainingStopped):
        stages.fit(run, trainer)
    run, config = stages.open_workspace("02_data_subset")
    trainer = stages.trainer_for(run, config)
    trainer.plan = dataclasses.replace(
        trainer.plan, micro_batch_size=8, gradient_accumulation_steps=1
    )
    trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps = 8, 1
    stages.fit(run, trainer)
    stages.evaluate()
    assert stages.result(workspace) == uninterrupted


def test_other_settings_refuse_to_go_on_and_say_which(prepared, workspace, tiny):
    run, trainer = prepared()
    stages.stop_at(trainer, 3)
    with pytest.raises(TrainingStopped):
        stages.fit(run, trainer)
    for settings, said in (
        ({"learning_rate": 0.02}, "learning_rate was 0.01 and is now 0.02"),
        ({"lora_r": 8}, "LoraConfig.r was 4 and is now 8; lora_r was 4"),
        ({"seed": 7}, "seed was 42 and is now 7"),
        ({"num_epochs": 3}, "num_epochs was 2 and is now 3"),
    ):
        stages.set_up(stages.tiny_config(tiny, **settings))
        stages.draw()
        run, trainer = prepared()
        with pytest.raises(
            WorkspaceError,
            match="checkpoint-3 is of an unfinished training with "
            rf"other settings: .*{said}.*delete .*/chec",
        ):
            stages.fit(run, trainer)
    shutil.rmtree(workspace / "checkpoints")  # the remedy
    assert len(stages.fit(run, trainer)["train"]) == 6 * 3


def test_other_rows_refuse_to_go_on(prepared):
    run, trainer = prepared()
    stages.stop_at(trainer, 3)
    with pytest.raises(TrainingStopped):
        stages.fit(run, trainer)
    frame = stages.pd.read_parquet(run / "subset" / "train.parquet")
    run.write("subset/train.parquet", frame.iloc[::-1].to_parquet())
    run.publish("02_data_subset", vars(trainer.config), ["subset"], inputs=("01_setup",))
    with pytest.raises(
        WorkspaceError, match="02_data_subset was run .* after this notebook had read"
    ):
        stages.fit(run, trainer)
    run, trainer = prepared()
    with pytest.raises(WorkspaceError, match="unfinished training with other data"):
        stages.fit(run, trainer)


def test_a_checkpoint_is_due_by_minutes(prepared, monkeypatch):
    run, trainer = prepared(checkpoint_minutes=0.0)
    written, write = [], Checkpoints.write
    monkeypatch.setattr(
        Checkpoints,
        "write",
        lambda self, step, *a, **k: written.append(step) or write(self, step, *a, **k),
    )
    stages.fit(run, trainer)
    assert written == list(range(1, 13))


def test_only_safetensors_json_and_plain_state_are_read(prepared, workspace, tmp_path):
    """A pickle that runs code, in a checkpoint whose manifest names it."""

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    run, trainer = prepared()
    stages.stop_at(trainer, 3)
    with pytest.raises(TrainingStopped):
        stages.fit(run, trainer)
    folder = workspace / "checkpoints" / "checkpoint-3"
    assert {path.name for path in folder.iterdir()} == {
        "adapter.safetensors",
        "best.safetensors",
        "manifest.json",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    }
    (folder / "rng_state.pth").write_bytes(pickle.dumps(Payload()))
    manifest = read_manifest(folder / "manifest.json")
    manifest["files"]["rng_state.pth"] = sha256(folder / "rng_state.pth")
    (folder / "manifest.json").write_text(sealed(manifest))
    run, trainer = prepared()
    with pytest.raises(
        WorkspaceError, match="checkpoint-3 holds more than the state of a training .* delete it"
    ):
        stages.fit(run, trainer)
    assert not (tmp_path / "ran").exists()


def test_a_loss_that_is_not_a_number_leaves_the_checkpoint(prepared, workspace, monkeypatch):
    run, trainer = prepared(checkpoint_steps=2)
    logits = training.label_logits
    monkeypatch.setattr(
        training,
        "label_logits",
        lambda *a: logits(*a) * (torch.nan if trainer.state.global_step == 3 else 1),
    )
    with pytest.raises(ModelError, match="the loss is nan at step 4.*QLORA_LEARNING_RATE"):
        stages.fit(run, trainer)
    assert _names(workspace / "checkpoints") == ["checkpoint-2"]


def test_weights_that_are_not_numbers_are_never_kept(prepared, workspace):
    run, trainer = prepared(checkpoint_steps=1)
    step = trainer.watch.on_step_end

    def poison(args, state, control, **kwargs):
        step(args, state, control, **kwargs)
        if state.global_step == 3:
            next(iter(trainer.trainable().values())).data.fill_(torch.nan)

    trainer.watch.on_step_end = poison
    with pytest.raises(ModelError, match="the loss is nan at step 4"):
        stages.fit(run, trainer)
    assert _names(workspace / "checkpoints") == ["checkpoint-1", "checkpoint-2"]


def test_training_outside_the_main_thread_needs_no_signals(prepared, workspace):
    run, trainer = prepared()
    thread = threading.Thread(target=lambda: stages.fit(run, trainer))
    thread.start()
    thread.join()
    assert Workspace(workspace).is_current("03_qlora_training", vars(trainer.config))
