import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import stages

from qlora_helpers.errors import QLoraError, TrainingStopped, WorkspaceError


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


def test_a_torn_checkpoint_is_skipped_with_a_line(prepared, workspace, uninterrupted, capsys):
    run, trainer = prepared(checkpoint_steps=1)
    stages.stop_at(trainer, 5)
    with pytest.raises(TrainingStopped):
        stages.fit(run, trainer)
    folder = workspace / "checkpoints"
    assert _names(folder) == ["checkpoint-4", "checkpoint-5"]
    with open(folder / "checkpoint-5" / "optimizer.pt", "r+b") as file:
        file.truncate(1000)
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-9.partial")
    assert _finish(prepared, workspace) == uninterrupted
    said = capsys.readouterr().out
    assert (
        "checkpoint-5 is not complete (optimizer.pt is not what its manifest names): skipped."
        in said
    )
    assert (
        "checkpoint-9.partial was not finished" in said
        and "Going on from the checkpoint of step 4 of 12" in said
    )


def _mounted(folder: Path, options: str) -> None:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A workspace on a disk of a mebibyte; the tiny model's checkpoints take 0.3."""
    folder = tmp_path / "disk"
    _mounted(folder, "size=1400k")
    monkeypatch.setenv("QLORA_WORKSPACE", str(folder / "run"))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_nothing_before(small_disk, tiny, uninterrupted, capsys):
    stages.set_up(stages.tiny_config(tiny))
    stages.draw()
    run, config = stages.open_workspace("02_data_subset")
    trainer = stages.trainer_for(run, config, checkpoint_steps=1)
    on_step_end, filler = trainer.watch.on_step_end, small_disk / "filler"

    def fill(args, state, control, **kwargs):
        on_step_end(args, state, control, **kwargs)
        if state.global_step == 4:
            free = os.statvfs(small_disk)
            filler.write_bytes(b"x" * (free.f_bavail * free.f_bsize - 40_000))

    trainer.watch.on_step_end = fill
    with pytest.raises(
        WorkspaceError,
        match="adapter.* cannot be written .*No space left.*Free some space there; then run this",
    ):
        stages.fit(run, trainer)
    said = capsys.readouterr().out
    assert (
        "The checkpoint of step 4 cannot be written" in said
        and "the one of step 3 is kept. Training goes on" in said
    )
    assert _names(run / "checkpoints") == ["checkpoint-2", "checkpoint-3"]
    filler.unlink()
    stages.train()
    stages.evaluate()
    assert stages.result(run.path) == uninterrupted


def test_a_workspace_that_is_read_only_is_named_before_training(small_disk, prepared_on_disk):
    run, trainer = prepared_on_disk
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for write in (
        lambda: stages.fit(run, trainer),
        lambda: run.publish("02_data_subset", vars(trainer.config), ["subset"]),
        stages.draw,
    ):
        with pytest.raises(
            WorkspaceError, match="cannot be written .*Read-only file system.*QLORA_WORKSPACE"
        ):
            write()
    assert trainer.state.global_step == 0


@pytest.fixture
def prepared_on_disk(small_disk, tiny):
    stages.set_up(stages.tiny_config(tiny))
    stages.draw()
    run, config = stages.open_workspace("02_data_subset")
    return run, stages.trainer_for(run, config)


def test_two_notebooks_in_one_workspace(prepared, workspace):
    """Another process holds it: nothing is written. It is killed: the lock is gone with it."""
    run, trainer = prepared()
    with run.hold("03_qlora_training"):
        said = (workspace / ".lock.txt").read_text()
    assert said.startswith(f"03_qlora_training, process {os.getpid()}, since ")
    code = (
        "import fcntl, sys\nfile = open(sys.argv[1])\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )  # until it is killed
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(workspace / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "held\n"
        before = {path: path.stat().st_mtime_ns for path in workspace.rglob("*")}
        for write in (
            lambda: stages.fit(run, trainer),
            stages.draw,
            lambda: run.write("note", "x"),
        ):
            with pytest.raises(
                WorkspaceError,
                match=r"another notebook is writing to .*\(03_qlora_training, process \d+, since",
            ):
                write()
        assert {path: path.stat().st_mtime_ns for path in workspace.rglob("*")} == before
    finally:
        other.kill()
        other.wait()
    run.write("note", "x")
    assert len(stages.fit(run, trainer)["train"]) == 12


def test_no_secret_is_written(prepared, workspace, monkeypatch, capfd):
    secret = "hf_" + "Secret" * 5
    monkeypatch.setenv("HF_TOKEN", secret)
    run, trainer = prepared(checkpoint_steps=1)
    stages.stop_at(trainer, 7)
    with pytest.raises(TrainingStopped):
        stages.fit(run, trainer)
    kept = b"".join(path.read_bytes() for path in workspace.rglob("*") if path.is_file())
    stages.train()
    kept += b"".join(path.read_bytes() for path in workspace.rglob("*") if path.is_file())
    assert (
        len(kept) > 100_000
        and secret.encode() not in kept
        and secret not in "".join(capfd.readouterr())
    )


@pytest.mark.parametrize(
    "kills", [pytest.param(5, id="5"), pytest.param(40, id="40", marks=pytest.mark.slow)]
)
def test_killed_anywhere_it_ends_as_if_never_stopped(tiny, tmp_path, kills):
    done = subprocess.run(
        [sys.executable, stages.__file__, tiny, str(tmp_path / "runs"), str(kills), str(kills)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(stages.__file__).parents[1],
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} of {kills} ended as the run that was never stopped." in done.stdout


@pytest.mark.slow
def test_a_second_and_third_run_in_one_kernel_hold_no_more_memory(tmp_path):
    """Anonymous memory, of the embedded model, by the cells of 03."""
    code = Path(__file__).with_name("memory.py")
    done = subprocess.run(
        [sys.executable, code],
        capture_output=True,
        text=True,
        cwd=code.parents[1],
        env=os.environ | {"QLORA_WORKSPACE": str(tmp_path / "run"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    first, *later = json.loads(done.stdout.splitlines()[-1])
    assert max(later) < first + 50, done.stdout


def test_errors_are_for_readers():
    assert issubclass(TrainingStopped, QLoraError) and TrainingStopped(
        "x"
    )._render_traceback_() == ["TrainingStopped: x"]
