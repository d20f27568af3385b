import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import stages

from qlora_helpers.errors import QLoraError, TrainingStopped, WorkspaceError
from qlora_helpers.run.checkpoints import Checkpoints


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_a_torn_checkpoint_is_skipped_with_a_line(
    stopped, prepared, finish, workspace, uninterrupted, capsys
):
    stopped(5, checkpoint_steps=1)
    folder = workspace / "checkpoints"
    assert _names(folder) == ["checkpoint-4", "checkpoint-5"]
    with open(folder / "checkpoint-5" / "optimizer.pt", "r+b") as file:
        file.truncate(1000)
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-9.partial")
    assert finish(prepared) == uninterrupted
    printed = capsys.readouterr().out
    assert "checkpoint-5 is not complete (optimizer.pt is not what its manifest" in printed
    assert "Going on from the checkpoint of step 4 of 12" in printed


def test_a_checkpoint_with_a_file_that_its_manifest_does_not_name_is_skipped(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path)
    identity = {"settings": {"seed": 1}, "data": "rows"}
    assert checkpoints.newest(identity) is None
    for step in (1, 2, 10, 11):
        assert checkpoints.write(step, lambda folder: (folder / "state").touch(), facts={})
    assert _names(tmp_path) == ["checkpoint-10", "checkpoint-11"]
    (tmp_path / "checkpoint-11" / "scaler.pt").touch()
    path, manifest = checkpoints.newest(identity)
    assert (path.name, manifest["step"]) == ("checkpoint-10", 10)
    assert "11 is not complete (its manifest does not name scaler.pt)" in capsys.readouterr().out


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


def test_no_secret_is_written(stopped, workspace, monkeypatch, capfd):
    secret = "hf_" + "Secret" * 5
    monkeypatch.setenv("HF_TOKEN", secret)
    stopped(7, checkpoint_steps=1)
    written = [path.read_bytes() for path in workspace.rglob("*") if path.is_file()]
    stages.train()
    written += [path.read_bytes() for path in workspace.rglob("*") if path.is_file()]
    assert sum(map(len, written)) > 100_000 and secret.encode() not in b"".join(written)
    assert secret not in "".join(capfd.readouterr())


def test_an_unfinished_training_outlives_a_finished_one(tiny, workspace, capsys):
    """Back to the settings that are finished, and forth again."""
    configs = {seed: stages.tiny_config(tiny, seed=seed, num_epochs=1) for seed in (1, 2)}

    def again(seed: int):
        stages.set_up(configs[seed])
        stages.draw()
        return stages.open_workspace("02_data_subset")

    again(1)
    stages.train()
    run, config = again(2)
    trainer = stages.trainer_for(run, config)
    stages.stop_at(trainer, step=3)
    with pytest.raises(TrainingStopped):
        stages.fit(run, trainer)
    again(1)
    stages.train()
    assert "holds the finished training" in capsys.readouterr().out
    again(2)
    stages.train()
    assert "Going on from the checkpoint of step 3 of 6" in capsys.readouterr().out
    assert not (workspace / "checkpoints").exists()


def _run(config, folder: Path, change: int = 0, seconds: float = 0) -> tuple[int, str, float]:
    """Run everything in `folder`, in a forked process; return its exit code, what it printed, and
    its seconds of CPU time, which are the same on a busy machine.

    It kills itself at its `change`-th change of a file, or after so many `seconds` of CPU time.
    """
    changes, log = 0, folder.with_suffix(".txt")

    def count(event: str, arguments: tuple) -> None:
        nonlocal changes
        if forks.changes_a_file(event, arguments) and str(arguments[0]).startswith(str(folder)):
            changes += 1
            if changes == change:
                os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # nothing handles SIGPROF: it ends it
        os.environ["QLORA_WORKSPACE"] = str(folder)
        sys.addaudithook(count)
        stages.run_all(config)
        print("changes", changes)

    _, status, used = os.wait4(forks.start(run, log), 0)
    return os.waitstatus_to_exitcode(status), log.read_text(), used.ru_utime + used.ru_stime


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_anywhere_it_ends_as_if_never_stopped(tiny, tmp_path, kills):
    config, chance = stages.tiny_config(tiny), random.Random(kills)
    status, said, whole = _run(config, tmp_path / "expected")
    assert status == 0, said
    expected, changes = stages.result(tmp_path / "expected"), int(said.split()[-1])
    for i in range(kills):
        folder, number = tmp_path / str(i), signal.SIGKILL if i % 2 else signal.SIGPROF
        kind = "change" if i % 2 else "seconds"
        at = chance.randint(1, changes) if i % 2 else chance.uniform(0.25, 0.95) * whole
        while (status := _run(config, folder, **{kind: at})[0]) == 0:
            shutil.rmtree(folder)  # it had less to do than the one that was measured
            at = type(at)(0.8 * at)
        again, said, _ = _run(config, folder)
        case = f"killed ({status}) at {kind} {at:.4g}: {said}"
        assert (status, again) == (-number, 0), case
        assert stages.result(folder) == expected, case
        print(case.partition("\n")[0], *re.findall("Going on.*", said))
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_second_and_third_run_in_one_kernel_hold_no_more_memory(tmp_path, monkeypatch):
    """Anonymous memory, of the embedded model, by the cells of 03."""
    monkeypatch.setenv("QLORA_WORKSPACE", str(tmp_path / "run"))
    program, root = Path(stages.__file__).with_name("memory.py"), Path(stages.__file__).parents[1]
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "cwd": root}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    first, *later = json.loads(done.stdout.splitlines()[-1])
    assert max(later) < first + 50, done.stdout


def test_errors_are_for_readers():
    assert issubclass(TrainingStopped, QLoraError)
    assert TrainingStopped("x")._render_traceback_() == ["TrainingStopped: x"]
