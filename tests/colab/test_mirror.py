"""A run and its copy on Google Drive: a Drive that fails in any way costs a line, never the run, and nothing that was published is
lost. The Colab machines are simulated (tests/fake_colab has the package of their runtimes)."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import stages

from qlora_helpers import find_workspace, open_workspace
from qlora_helpers.colab import drive as drive_module
from qlora_helpers.colab import mirror
from qlora_helpers.colab.mirror import Mirror
from qlora_helpers.errors import TrainingStopped, WorkspaceError
from qlora_helpers.run import files
from qlora_helpers.run.exchange import push_all

LONG = 300  # seconds: what answers does so in time, on a busy machine too


def publish(seed: int, tiny: str = "SmolLM2-135M-Instruct"):
    """Run 01 and 02, which write other rows for another seed, and wait for the copy."""
    stages.set_up(stages.tiny_config(tiny, seed=seed))
    workspace = stages.draw()
    workspace.push()
    return workspace


def rows(workspace) -> bytes:
    return (workspace / "subset" / "train.parquet").read_bytes()


def everything(drive: Path) -> dict[str, bytes]:
    """All that is published on Drive and whole: its files by what they hold."""
    found = {}
    for path in drive.rglob("manifest.json"):
        manifest = files.read_manifest(path)
        files.check_files(manifest, path.parent)
        for name in manifest["files"]:
            found[f"{path.parent.name}/{name}"] = (path.parent / name).read_bytes()
    return found


@pytest.fixture
def drive(tmp_path):
    """The reader's Drive, on a disk of its own of 600 kB."""
    folder = tmp_path / "drive"
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


# Each of these is a context in which Drive fails, on a machine that begins, and gives the machine
# the function `begin`. What it yields is the line by which a reader learns of it; None if there is
# nothing to tell.


@contextlib.contextmanager
def refused(begin, drive, patch):
    patch.setenv("FAKE_DRIVE", "declined")
    begin()
    yield "Without Google Drive (credential propagation was unsuccessful)"


@contextlib.contextmanager
def late_answer(begin, drive, patch):
    """The reader answers when the run has gone on already."""
    patch.setenv("FAKE_DRIVE", "hangs")
    patch.setattr(drive_module, "MOUNT_SECONDS", 0.3)
    content = begin()
    find_workspace()
    (content / "drive").mkdir()
    (content / "drive" / "MyDrive").symlink_to(drive)
    yield "Without Google Drive (no answer within 0.3 s)"


@contextlib.contextmanager
def without_my_drive(begin, drive, patch):
    patch.setenv("FAKE_DRIVE", "empty")
    content = begin()
    yield "Without Google Drive (it was mounted without MyDrive)"
    shutil.rmtree(content / "drive")


@contextlib.contextmanager
def full(begin, drive, patch):
    begin()
    find_workspace()
    with contextlib.suppress(OSError), open(drive / "filler", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    yield "Google Drive does not take this run (No space left on device)"
    (drive / "filler").unlink()


@contextlib.contextmanager
def read_only(begin, drive, patch):
    subprocess.run(["mount", "-o", "remount,ro", str(drive)], check=True)
    begin()
    yield "Google Drive does not take this run (Read-only file system)"
    subprocess.run(["mount", "-o", "remount,rw", str(drive)], check=True)


@contextlib.contextmanager
def _hangs(module, name, drive, patch):
    """What `name` of `module` does in Drive's folders does not end before the run has."""
    real, over, waited = getattr(module, name), threading.Event(), []

    def hang(*arguments):
        if any("MyDrive" in str(one) for one in arguments):
            waited.append(over.wait(LONG))
        return real(*arguments)

    patch.setattr(module, name, hang)
    patch.setattr(mirror, "SECONDS", 0.3)
    yield
    assert not waited, "the run waited for Drive"
    over.set()
    patch.setattr(module, name, real)


@contextlib.contextmanager
def hanging_read(begin, drive, patch):
    begin()
    with _hangs(mirror, "read_manifest", drive, patch):
        yield "Google Drive cannot be read (no answer within 0.3 s)"


@contextlib.contextmanager
def hanging_write(begin, drive, patch):
    begin()
    with _hangs(Mirror, "_write", drive, patch):
        yield "Google Drive does not take this run (no answer within 0.3 s)"


@contextlib.contextmanager
def gone_in_the_middle(begin, drive, patch):
    content = begin()
    find_workspace()
    (content / "drive" / "MyDrive").unlink()
    patch.setenv("FAKE_DRIVE", "declined")
    yield "Without Google Drive (credential propagation was unsuccessful)"
    assert not (content / "drive" / "MyDrive").exists()  # nothing is in the place of the next mount
    (content / "drive").rmdir()


@contextlib.contextmanager
def stale_copy(begin, drive, patch):
    """Drive shows what it held before the last publication."""
    folder, hidden = drive / "qlora_ag_news" / "cpu", {}
    for path in folder.glob("0*/0002-*"):
        hidden[path] = path.rename(drive / f"hidden-{path.name}")
    assert hidden
    begin()
    yield None
    for path, where in hidden.items():
        where.rename(path)


@contextlib.contextmanager
def half_pushed(begin, drive, patch):
    """A machine that was taken away in the middle left a folder without a manifest, and one that lacks a file."""
    folder = drive / "qlora_ag_news" / "cpu" / "02_data_subset"
    newest = max(folder.iterdir())
    shutil.copytree(newest, folder / "0008-half")
    (folder / "0008-half" / "manifest.json").unlink()
    shutil.copytree(newest, folder / "0009-half")
    (folder / "0009-half" / "subset" / "train.parquet").unlink()
    begin()
    yield "02_data_subset/0009-half on Google Drive is not complete (No such file or directory): skipped"
    shutil.rmtree(folder / "0008-half")
    shutil.rmtree(folder / "0009-half")


@contextlib.contextmanager
def two_machines(begin, drive, patch):
    begin()
    yield None


@contextlib.contextmanager
def clock_skew(begin, drive, patch):
    """The machine's clock is a day late, and Drive's files are from tomorrow."""
    day, now, utc = 86400, time.time, time.gmtime
    for path in drive.rglob("*"):
        os.utime(path, (now() + day, now() + day))
    patch.setattr(time, "time", lambda: now() - day)
    patch.setattr(time, "gmtime", lambda seconds=None: utc(now() - day))
    begin()
    yield None


FAULTS = [
    refused,
    late_answer,
    without_my_drive,
    full,
    read_only,
    hanging_read,
    hanging_write,
    gone_in_the_middle,
    stale_copy,
    half_pushed,
    two_machines,
    clock_skew,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_drive_that_fails_loses_nothing(drive, new_machine, monkeypatch, capsys, fault):
    """Two machines publish before; then one on which Drive fails; then a fourth one looks."""
    for seed in (1, 2):
        new_machine()
        publish(seed)
    before = everything(drive)
    assert len(before) == 8  # of each machine, the config and three splits
    capsys.readouterr()
    with monkeypatch.context() as patch, fault(new_machine, drive, patch) as line:
        mine = publish(seed=3)
        opened, config = open_workspace("02_data_subset")  # the run goes on
        assert (config.seed, rows(opened)) == (3, rows(mine))
        said = capsys.readouterr().out
        assert line is None or line in said
    find_workspace(True).push()  # the cell that pushes again
    assert "On Google Drive: MyDrive/qlora_ag_news/cpu" in capsys.readouterr().out
    assert before.items() <= everything(drive).items()
    new_machine()
    found, config = open_workspace("02_data_subset")
    assert (config.seed, rows(found)) == (3, rows(mine))


def test_a_run_that_cannot_be_read_is_not_said_to_be_missing(new_machine, tmp_path, monkeypatch):
    new_machine()
    publish(seed=1)
    new_machine()
    with (
        monkeypatch.context() as patch,
        _hangs(mirror, "read_manifest", tmp_path / "drive", patch),
        pytest.raises(WorkspaceError, match=r"without Drive \(no answer within 0.3 s\).*Restart"),
    ):
        open_workspace("02_data_subset")


def test_settings_that_come_back_are_newer_than_those_between(drive, new_machine, monkeypatch):
    """What 01 and 02 write for seed 1 is the same the second time; Drive has what was between."""
    content = new_machine()
    for seed in (1, 2):
        publish(seed)
    with full(lambda: content, drive, monkeypatch):
        publish(seed=1)
    for _ in range(2):
        workspace, config = open_workspace("02_data_subset")
        assert config.seed == 1 and not (workspace / "earlier").exists()
    workspace.push()
    new_machine()
    assert open_workspace("02_data_subset")[1].seed == 1


def test_a_push_that_is_killed_leaves_the_older_or_the_newer_copy(drive, new_machine):
    """The kernel dies at its first change of Drive, at its second, and so on, until it comes through."""
    new_machine()
    older = rows(publish(seed=1))
    found, kill_at, status = [], 0, None
    while status != 0:
        kill_at += 1
        new_machine()
        if not (child := os.fork()):
            _push_and_die(kill_at)
        _, status = os.waitpid(child, 0)
        new_machine()
        opened, _ = open_workspace("02_data_subset")  # whose files are checked
        found.append(rows(opened))
        assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    newer = [data for data in found if data != older]
    assert kill_at > 10 and found == [older] * (kill_at - len(newer)) + newer
    assert found[-1] == b"newer"


def test_files_that_changed_since_they_were_published_replace_nothing(drive, new_machine):
    new_machine()
    workspace = publish(seed=1)
    workspace.push()
    before = everything(drive)
    workspace.write("subset/train.parquet", "newer, and not published yet")
    push_all(workspace)
    workspace.push()
    assert everything(drive) == before


def _push_and_die(kill_at: int) -> None:
    changes = 0

    def count(event, arguments):
        nonlocal changes
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_WRONLY
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            changes += "MyDrive" in str(arguments[0])
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        workspace, config = open_workspace("02_data_subset")
        sys.addaudithook(count)
        workspace.write("subset/train.parquet", "newer")
        workspace.publish("02_data_subset", vars(config), ["subset"], inputs=("01_setup",))
        workspace.push()
        os._exit(0)
    finally:
        os._exit(1)


# Training, on a Drive of any size


def _train(tiny: str, stop_at: int | None = None):
    """01, 02 and 03, as Run all does them; 03 until a step."""
    stages.set_up(stages.tiny_config(tiny))
    stages.draw()
    workspace, config = open_workspace("02_data_subset")
    trainer = stages.trainer_for(workspace, config, checkpoint_steps=2)
    if stop_at:
        stages.stop_at(trainer, stop_at)
    stages.fit(workspace, trainer)
    return workspace


def test_a_training_goes_on_on_another_machine(new_machine, tiny, tmp_path, capsys):
    """01 and 02 run again before 03: they write the same, and disturb nothing."""
    checkpoints = tmp_path / "drive" / "qlora_ag_news" / "cpu" / "checkpoints"
    new_machine()
    with pytest.raises(TrainingStopped, match="The checkpoint of step 5 is written") as stopped:
        _train(tiny, stop_at=5)
    assert "keep this machine" not in str(stopped.value)  # it was copied
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-5", "checkpoint-4"}
    shutil.copytree(checkpoints / "checkpoint-5", checkpoints / "checkpoint-7")  # torn
    (checkpoints / "checkpoint-7" / "optimizer.pt").write_bytes(b"")
    assert "Going on" not in capsys.readouterr().out
    new_machine()
    workspace = _train(tiny)
    workspace.push()
    said = capsys.readouterr().out
    assert "checkpoint-7 on Google Drive is not complete (optimizer.pt is not what" in said
    assert "Going on from the checkpoint of step 5 of 12, written 2" in said
    assert not checkpoints.exists()  # the training is on Drive
    new_machine()
    again = _train(tiny)
    assert "holds the finished training with these settings" in capsys.readouterr().out
    history = json.loads((again / "training.json").read_text())
    assert history == json.loads((workspace / "training.json").read_text())
    assert len(history["train"]) == 12


def test_a_drive_that_hangs_holds_no_step_up(new_machine, tiny, tmp_path, monkeypatch, capsys):
    """Nothing that is written to Drive ends before the training has."""
    new_machine()
    with monkeypatch.context() as patch, _hangs(Mirror, "_write", tmp_path / "drive", patch):
        workspace = _train(tiny)
        workspace.push()
        assert "does not take this run (no answer within 0.3 s)" in capsys.readouterr().out
    workspace.push()
    assert "On Google Drive" in capsys.readouterr().out
    new_machine()
    opened, _ = open_workspace("03_qlora_training")
    assert (opened / "training.json").read_bytes() == (workspace / "training.json").read_bytes()


def test_checkpoints_stay_on_drive_until_the_training_is_there(
    new_machine, tiny, tmp_path, patch_write
):
    new_machine()
    patch_write("adapter_model.safetensors")
    workspace = _train(tiny)
    workspace.push()
    folder = tmp_path / "drive" / "qlora_ag_news" / "cpu"
    assert (folder / "checkpoints").exists() and not list(folder.glob("03_*/*"))


@pytest.fixture
def patch_write(monkeypatch):
    """A function that makes Drive refuse files of this name."""
    real = Mirror._write

    def refuse(name):
        def write(self, source, target, *digest):
            if target.name == name:
                raise OSError(28, "No space left on device")
            real(self, source, target, *digest)

        monkeypatch.setattr(Mirror, "_write", write)

    return refuse


def test_an_earlier_training_can_be_compared_with_on_another_machine(new_machine, tiny, tmp_path):
    histories = []
    for seed in (1, 2):
        new_machine()
        stages.set_up(stages.tiny_config(tiny, seed=seed))
        stages.draw()
        histories.append(json.loads(json.dumps(stages.train())))
        find_workspace().push()
    new_machine()
    workspace, _ = open_workspace("03_qlora_training")
    assert list(workspace.earlier_json("training.json").values()) == histories[:1]
    assert workspace.read_json("03_qlora_training", "training.json") == histories[1]
    assert find_workspace().earlier_json("training.json").keys() == {
        path.name for path in (workspace / "earlier").iterdir()
    }


def test_a_checkpoint_that_changed_does_not_pass_for_one_that_is_on_drive(drive, tmp_path):
    """Drive has another training's checkpoint of that step: it goes, and the failure is said."""
    mirror_of_run, root = Mirror(drive, "cpu"), tmp_path / "checkpoint-1"
    for content in ("one", "two"):
        files.write_text(root / "state", content)
        manifest = files.manifest_of(root, ["state"], step=1)
        if content == "two":
            files.write_text(root / "state", "being written")
            with pytest.raises(ValueError, match="state is not what its manifest names"):
                mirror_of_run._copy_out("checkpoints/checkpoint-1", root, manifest)
        else:
            mirror_of_run._copy_out("checkpoints/checkpoint-1", root, manifest)
    assert not (mirror_of_run.folder / "checkpoints" / "checkpoint-1").exists()
