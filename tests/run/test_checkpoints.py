import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import stages
import torch

from qlora_helpers import LossPanel, Workspace, training
from qlora_helpers.errors import ModelError, QLoraError, TrainingStopped, WorkspaceError
from qlora_helpers.run.checkpoints import Checkpoints
from qlora_helpers.run.files import sha256
from qlora_helpers.run.manifest import read_manifest, sealed


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


def _stop(prepared, step: int, **options):
    """Stop a training after `step` steps, and return its workspace and trainer."""
    run, trainer = prepared(**options)
    stages.stop_at(trainer, step)
    with pytest.raises(TrainingStopped):
        stages.fit(run, trainer)
    return run, trainer


def _finish(prepared, workspace) -> dict:
    stages.fit(*prepared())
    stages.evaluate()
    return stages.result(workspace)


@pytest.mark.parametrize("step", [1, 7])
def test_an_interrupt_inside_an_accumulation_loses_nothing(
    prepared, workspace, uninterrupted, step
):
    run, trainer = prepared()
    stages.stop_at(trainer, step)
    panel = LossPanel(run)
    message = f"Stopped at step {step} of 12. The checkpoint of step {step} is written: it goes on"
    with pytest.raises(TrainingStopped, match=message):
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
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    train_step = trainer.training_step

    def training_step(*args, **kwargs):
        if trainer.state.global_step == step - 1:
            os.kill(os.getpid(), number)
        return train_step(*args, **kwargs)

    trainer.training_step = training_step
    with pytest.raises(TrainingStopped, match="Stopped"):
        stages.fit(run, trainer)
    assert handlers == [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    assert _finish(prepared, workspace) == uninterrupted


def test_an_interrupt_before_the_first_step_starts_again(prepared, workspace, uninterrupted):
    run, trainer = prepared()
    stages.stop_at(trainer, 0)
    with pytest.raises(TrainingStopped, match="There is no checkpoint yet"):
        stages.fit(run, trainer)
    assert _finish(prepared, workspace) == uninterrupted


def test_an_interrupt_in_the_first_evaluation_starts_again(prepared, workspace, uninterrupted):
    run, trainer = prepared()
    trainer.compute_loss = lambda *args, **kwargs: signal.default_int_handler(signal.SIGINT, None)
    panel = LossPanel(run)
    with pytest.raises(
        TrainingStopped, match="Stopped at step 0 of 12. There is no checkpoint yet"
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
    _stop(prepared, 5)
    plan = dataclasses.replace(stages.PLAN, micro_batch_size=8, gradient_accumulation_steps=1)
    stages.fit(*prepared(plan=plan))
    stages.evaluate()
    assert stages.result(workspace) == uninterrupted


def test_other_settings_refuse_to_go_on_and_say_which(prepared, workspace, tiny):
    _stop(prepared, 3)
    for settings, fields in (
        ({"learning_rate": 0.02}, "learning_rate was 0.01 and is now 0.02"),
        ({"lora_r": 8}, "LoraConfig.r was 4 and is now 8; lora_r was 4"),
        ({"num_epochs": 3}, "num_epochs was 2 and is now 3"),
    ):
        stages.set_up(stages.tiny_config(tiny, **settings))
        stages.draw()
        run, trainer = prepared()
        message = f"checkpoint-3 is of an unfinished training with other settings: .*{fields}"
        with pytest.raises(WorkspaceError, match=f"{message}.*delete .*/checkpoints"):
            stages.fit(run, trainer)
    shutil.rmtree(workspace / "checkpoints")  # the remedy
    assert len(stages.fit(run, trainer)["train"]) == 6 * 3


def test_other_rows_refuse_to_go_on(prepared):
    run, trainer = _stop(prepared, 3)
    frame = stages.pd.read_parquet(run / "subset" / "train.parquet")
    run.write("subset/train.parquet", frame.iloc[::-1].to_parquet())
    run.publish("02_data_subset", vars(trainer.config), ["subset"], inputs=("01_setup",))
    with pytest.raises(WorkspaceError, match="02_data_subset was run .* this notebook had read"):
        stages.fit(run, trainer)
    with pytest.raises(WorkspaceError, match="unfinished training with other data"):
        stages.fit(*prepared())


def test_a_torn_checkpoint_is_skipped_with_a_line(prepared, workspace, uninterrupted, capsys):
    _stop(prepared, 5, checkpoint_steps=1)
    folder = workspace / "checkpoints"
    assert _names(folder) == ["checkpoint-4", "checkpoint-5"]
    with open(folder / "checkpoint-5" / "optimizer.pt", "r+b") as file:
        file.truncate(1000)
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-9.partial")
    assert _finish(prepared, workspace) == uninterrupted
    printed = capsys.readouterr().out
    assert "checkpoint-5 is not complete (optimizer.pt is not what its manifest" in printed
    assert "Going on from the checkpoint of step 4 of 12" in printed


def test_a_checkpoint_with_a_file_that_its_manifest_does_not_name_is_skipped(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path)
    identity = {"settings": {"seed": 1}, "data": "rows"}
    assert checkpoints.newest(identity) is None
    for step in (1, 2, 10, 11):
        assert checkpoints.write(step, lambda folder: (folder / "state").touch(), facts=step)
    assert _names(tmp_path) == ["checkpoint-10", "checkpoint-11"]
    (tmp_path / "checkpoint-11" / "scaler.pt").touch()
    path, manifest = checkpoints.newest(identity)
    assert (path.name, manifest["facts"]) == ("checkpoint-10", 10)
    assert "11 is not complete (its manifest does not name scaler.pt)" in capsys.readouterr().out


def test_a_checkpoint_is_due_by_minutes(prepared, monkeypatch):
    run, trainer = prepared(checkpoint_minutes=0.0)
    written = []
    monkeypatch.setattr(Checkpoints, "write", lambda self, step, *a, **k: written.append(step))
    stages.fit(run, trainer)
    assert written == list(range(1, 13))


def test_only_safetensors_json_and_plain_state_are_read(prepared, workspace, tmp_path):
    """A pickle that runs code, in a checkpoint whose manifest names it."""

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    _stop(prepared, 3)
    folder = workspace / "checkpoints" / "checkpoint-3"
    stems = "adapter best manifest optimizer rng_state scheduler trainer_state"
    assert " ".join(sorted(path.stem for path in folder.iterdir())) == stems
    (folder / "rng_state.pth").write_bytes(pickle.dumps(Payload()))
    manifest = read_manifest(folder / "manifest.json")
    manifest["files"]["rng_state.pth"] = sha256(folder / "rng_state.pth")
    (folder / "manifest.json").write_text(sealed(manifest))
    message = "checkpoint-3 holds more than the state of a training .* delete it"
    with pytest.raises(WorkspaceError, match=message):
        stages.fit(*prepared())
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


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A workspace on a disk of 1.4 MB; a checkpoint of the tiny model takes 0.3."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", folder]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    monkeypatch.setenv("QLORA_WORKSPACE", str(folder / "run"))
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def prepared_on_disk(small_disk, tiny):
    """A workspace with its subset on the small disk, and a trainer."""
    stages.set_up(stages.tiny_config(tiny))
    stages.draw()
    run, config = stages.open_workspace("02_data_subset")
    return run, stages.trainer_for(run, config, checkpoint_steps=1)


def test_a_full_disk_loses_nothing_before(small_disk, prepared_on_disk, uninterrupted, capsys):
    run, trainer = prepared_on_disk
    on_step_end, filler = trainer.watch.on_step_end, small_disk / "filler"

    def fill(args, state, control, **kwargs):
        on_step_end(args, state, control, **kwargs)
        if state.global_step == 4:
            free = os.statvfs(small_disk)
            filler.write_bytes(b"x" * (free.f_bavail * free.f_bsize - 40_000))

    trainer.watch.on_step_end = fill
    message = "adapter.* cannot be written .*No space left.*Free some space there"
    with pytest.raises(WorkspaceError, match=message):
        stages.fit(run, trainer)
    printed = capsys.readouterr().out
    assert "The checkpoint of step 4 cannot be written" in printed
    assert "the one of step 3 is kept. Training goes on" in printed
    assert _names(run / "checkpoints") == ["checkpoint-2", "checkpoint-3"]
    filler.unlink()
    stages.train()
    stages.evaluate()
    assert stages.result(run.path) == uninterrupted


def test_a_workspace_that_is_read_only_is_named_before_training(small_disk, prepared_on_disk):
    run, trainer = prepared_on_disk
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    message = "cannot be written .*Read-only file system.*QLORA_WORKSPACE"
    for write in (
        lambda: stages.fit(run, trainer),
        lambda: run.publish("02_data_subset", vars(trainer.config), ["subset"]),
        stages.draw,
    ):
        with pytest.raises(WorkspaceError, match=message):
            write()
    assert trainer.state.global_step == 0


def test_two_notebooks_in_one_workspace(prepared, workspace):
    """Another process holds it: nothing is written. It is killed: the lock is gone with it."""
    run, trainer = prepared()
    with run.hold("03_qlora_training"):
        said = (workspace / ".lock.txt").read_text()
    assert said.startswith(f"03_qlora_training, process {os.getpid()}, since ")
    code = "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX); "
    code += "print('held', flush=True); sys.stdin.read()"  # until it is killed
    command, pipe = [sys.executable, "-c", code, workspace / ".lock"], subprocess.PIPE
    other = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    message = r"another notebook is writing to .*\(03_qlora_training, process \d+, since"
    try:
        assert other.stdout.readline() == "held\n"
        before = {path: path.stat().st_mtime_ns for path in workspace.rglob("*")}
        for write in (lambda: stages.fit(run, trainer), stages.draw, lambda: run.write("a", "x")):
            with pytest.raises(WorkspaceError, match=message):
                write()
        assert {path: path.stat().st_mtime_ns for path in workspace.rglob("*")} == before
    finally:
        other.kill()
        other.wait()
    run.write("note", "x")
    assert len(stages.fit(run, trainer)["train"]) == 12


def test_training_outside_the_main_thread_needs_no_signals(prepared, workspace):
    run, trainer = prepared()
    thread = threading.Thread(target=lambda: stages.fit(run, trainer))
    thread.start()
    thread.join()
    assert Workspace(workspace).is_current("03_qlora_training", vars(trainer.config))


def test_no_secret_is_written(prepared, workspace, monkeypatch, capfd):
    secret = "hf_" + "Secret" * 5
    monkeypatch.setenv("HF_TOKEN", secret)
    _stop(prepared, 7, checkpoint_steps=1)
    written = [path.read_bytes() for path in workspace.rglob("*") if path.is_file()]
    stages.train()
    written += [path.read_bytes() for path in workspace.rglob("*") if path.is_file()]
    assert sum(map(len, written)) > 100_000 and secret.encode() not in b"".join(written)
    assert secret not in "".join(capfd.readouterr())


def _run(*arguments) -> subprocess.CompletedProcess:
    env, root = os.environ | {"OMP_NUM_THREADS": "1"}, Path(stages.__file__).parents[1]
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=root)


@pytest.mark.parametrize("kills", [5, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_anywhere_it_ends_as_if_never_stopped(tiny, tmp_path, kills):
    done = _run(stages.__file__, tiny, tmp_path / "runs", str(kills), str(kills))
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} of {kills} ended as the run that was never stopped." in done.stdout


@pytest.mark.slow
def test_a_second_and_third_run_in_one_kernel_hold_no_more_memory(tmp_path, monkeypatch):
    """Anonymous memory, of the embedded model, by the cells of 03."""
    monkeypatch.setenv("QLORA_WORKSPACE", str(tmp_path / "run"))
    done = _run(Path(stages.__file__).with_name("memory.py"))
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    first, *later = json.loads(done.stdout.splitlines()[-1])
    assert max(later) < first + 50, done.stdout


def test_errors_are_for_readers():
    assert issubclass(TrainingStopped, QLoraError)
    assert TrainingStopped("x")._render_traceback_() == ["TrainingStopped: x"]
