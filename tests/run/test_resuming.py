import os
import pickle
import shutil
import signal
import threading
from pathlib import Path

import pytest
import stages
import torch

from qlora_helpers.errors import ModelError, TrainingStopped, WorkspaceError
from qlora_helpers.fast.plan import BatchPlan
from qlora_helpers.run.checkpoints import Checkpoints
from qlora_helpers.run.files import sha256
from qlora_helpers.run.manifest import read_manifest, sealed


def _checkpoints(workspace: Path) -> set[str]:
    return {path.name for path in (workspace / "checkpoints").glob("checkpoint-*")}


@pytest.mark.parametrize("step", [1, 7])
def test_an_interrupt_within_a_step_loses_nothing(
    stopped, prepared, workspace, uninterrupted, finish, step
):
    assert stopped(step) == (
        f"Stopped at step {step} of 12. The checkpoint of step {step} is written: run this "
        "notebook again to go on from it."
    )
    assert _checkpoints(workspace) == {f"checkpoint-{n}" for n in (6, step) if n <= step}
    assert finish(prepared) == uninterrupted
    assert not (workspace / "checkpoints").exists()


@pytest.mark.parametrize(
    ("number", "step", "times", "reached"),
    [(signal.SIGTERM, 3, 1, 4), (signal.SIGINT, 3, 2, 3), (signal.SIGINT, 5, 1, 6)],
)
def test_a_signal_ends_training_after_the_step_and_a_second_one_at_once(
    prepared, workspace, uninterrupted, finish, number, step, times, reached
):
    run, trainer = prepared()
    handlers, loss, sent = signal.getsignal(number), trainer.compute_loss, []

    def compute_loss(*args, **kwargs):
        if trainer.state.global_step == step and len(sent) < times:
            sent.append(number)
            os.kill(os.getpid(), number)
        return loss(*args, **kwargs)

    trainer.compute_loss = compute_loss
    with pytest.raises(TrainingStopped, match=f"step {reached} of 12. .* step {reached} is writ"):
        stages.fit(run, trainer)
    assert signal.getsignal(number) == handlers
    assert finish(lambda: (run, trainer)) == uninterrupted  # with the same trainer


def test_an_interrupt_before_the_first_step_starts_again(
    stopped, prepared, workspace, uninterrupted, finish
):
    assert "step 0 of 12. No checkpoint was written yet" in stopped(0)
    assert finish(prepared) == uninterrupted


def test_a_training_goes_on_with_its_own_plan(stopped, prepared, workspace, uninterrupted, finish):
    """Another micro-batch, which memory allows now, would round differently."""
    stopped(5)
    assert finish(prepared, plan=BatchPlan(8, 1, 0, None, "")) == uninterrupted


def test_a_training_goes_on_with_dropout(stopped, prepared, workspace, uninterrupted, finish):
    stopped(5)
    run, trainer = prepared()
    trainer.model.eval()  # as after a look at its answers
    assert finish(lambda: (run, trainer)) == uninterrupted


def test_the_best_weights_are_written_once(stopped, workspace):
    stopped(7)
    [written] = (workspace / "checkpoints").glob("*/best.safetensors")
    assert written.parent.name == "checkpoint-7"  # at the end of epoch 1 the weights are the best


def test_a_trained_model_is_no_start(prepared):
    run, trainer = prepared()
    trainer.train()
    with pytest.raises(ModelError, match="this model has been trained already"):
        stages.fit(run, trainer)


def test_time_and_skipped_steps_go_on(prepared):
    run, trainer = prepared()
    stages.stop_at(trainer, 5)
    begin = trainer.watch.on_train_begin

    def begin_earlier(*args, **kwargs):
        begin(*args, **kwargs)
        trainer.watch.start -= 1000
        trainer.watch.skipped_steps = 3

    trainer.watch.on_train_begin = begin_earlier
    with pytest.raises(TrainingStopped):
        stages.fit(run, trainer)
    history = stages.fit(*prepared())
    seconds = [entry["seconds"] for entry in history["train"]] + [history["seconds"]]
    assert len(seconds) == 13 and seconds == sorted(seconds) and seconds[0] >= 1000
    assert history["skipped_steps"] == 3


def test_other_settings_refuse_to_go_on_and_say_which(stopped, prepared, workspace, tiny):
    stopped(3)
    for settings, said in (
        ({"lora_r": 8}, "LoraConfig.r was 4 and is now 8; lora_r was 4"),
        ({"num_epochs": 3}, "num_epochs was 2 and is now 3"),
    ):
        stages.set_up(stages.tiny_config(tiny, **settings))
        stages.draw()
        run, trainer = prepared()
        refused = f"checkpoint-3 is of an unfinished training with other settings: .*{said}"
        with pytest.raises(WorkspaceError, match=refused):
            stages.fit(run, trainer)
    shutil.rmtree(workspace / "checkpoints")  # the remedy
    assert len(stages.fit(run, trainer)["train"]) == 6 * 3


def test_other_rows_refuse_to_go_on(stopped, prepared):
    stopped(3)
    run, trainer = prepared()
    frame = stages.pd.read_parquet(run / "subset" / "train.parquet")
    run.write("subset/train.parquet", frame.iloc[::-1].to_parquet())
    run.publish("02_data_subset", vars(trainer.config), ["subset"], inputs=("01_setup",))
    with pytest.raises(WorkspaceError, match="unfinished training with other data"):
        stages.fit(*prepared())


def test_a_checkpoint_is_due_by_minutes(prepared, monkeypatch):
    written, write = [], Checkpoints.write

    def noted(self, step, *args, **kwargs):
        written.append(step)
        return write(self, step, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "write", noted)
    stages.fit(*prepared(checkpoint_minutes=0.0))
    assert written == list(range(1, 13))


def test_only_safetensors_json_and_plain_state_are_read(stopped, prepared, workspace, tmp_path):
    """A pickle that runs code, in a checkpoint whose manifest names it."""

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    stopped(3)
    folder = workspace / "checkpoints" / "checkpoint-3"
    names = "adapter.safetensors best.safetensors manifest.json optimizer.pt rng_state.pth"
    names += " scheduler.pt trainer_state.json"
    assert sorted(path.name for path in folder.iterdir()) == names.split()
    (folder / "rng_state.pth").write_bytes(pickle.dumps(Payload()))
    manifest = read_manifest(folder / "manifest.json")
    manifest["files"]["rng_state.pth"] = sha256(folder / "rng_state.pth")
    (folder / "manifest.json").write_text(sealed(manifest))
    refused = "checkpoint-3 holds objects that could run code .* delete it"
    with pytest.raises(WorkspaceError, match=refused):
        stages.fit(*prepared())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["adapter.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_state_that_was_sealed_again_is_named(stopped, prepared, workspace, file):
    stopped(3)
    folder = workspace / "checkpoints" / "checkpoint-3"
    torch.save({"odd": 1}, folder / file)
    manifest = read_manifest(folder / "manifest.json")
    manifest["files"][file] = sha256(folder / file)
    (folder / "manifest.json").write_text(sealed(manifest))
    refused = "checkpoint-3 holds no state of this training .* delete it"
    with pytest.raises(WorkspaceError, match=refused):
        stages.fit(*prepared())


def test_a_plan_that_was_sealed_again_is_named(stopped, prepared, workspace):
    stopped(3)
    path = workspace / "checkpoints" / "checkpoint-3" / "manifest.json"
    manifest = read_manifest(path)
    plan = manifest["facts"]["plan"]
    for odd in (
        None,
        {"rows": 1},
        plan | {"micro_batch_size": 0},
        plan | {"kept_activations": "x"},
    ):
        path.write_text(sealed(manifest | {"facts": {"plan": odd}}))
        refused = "checkpoint-3 holds no state of this training .* delete it"
        with pytest.raises(WorkspaceError, match=refused):
            stages.fit(*prepared())


@pytest.mark.parametrize(("at", "said"), [(3, "the loss is nan at step 4"), (6, "validation loss")])
def test_weights_that_are_not_numbers_are_never_kept(prepared, workspace, at, said):
    run, trainer = prepared(checkpoint_steps=1)
    step_end = trainer.watch.on_step_end

    def poison(args, state, control, **kwargs):
        step_end(args, state, control, **kwargs)
        if state.global_step == at:
            next(iter(trainer.trainable.values())).data.fill_(torch.nan)

    trainer.watch.on_step_end = poison
    with pytest.raises(ModelError, match=said):
        stages.fit(run, trainer)
    assert _checkpoints(workspace) == {f"checkpoint-{at - 2}", f"checkpoint-{at - 1}"}


def test_memory_that_ends_between_the_passes_keeps_the_checkpoint(prepared, workspace):
    run, trainer = prepared(checkpoint_steps=2)

    def full(args, state, control, **kwargs):
        if state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.watch.on_pre_optimizer_step = full
    with pytest.raises(ModelError, match="out after step 3 .*The checkpoint of step 2 is written"):
        stages.fit(run, trainer)


def test_training_outside_the_main_thread_needs_no_signals(prepared):
    run, trainer = prepared()
    thread = threading.Thread(target=lambda: stages.fit(run, trainer))
    thread.start()
    thread.join()
    assert run.is_current("03_qlora_training", vars(trainer.config))
