"""A run and its copy on Google Drive: a Drive that fails in any way costs a line, never the run,
and nothing that was published is lost. The Colab machines are simulated (see tests/fake_colab)."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import forks
import pytest
import stages

from qlora_helpers import find_workspace, open_workspace
from qlora_helpers.colab import drive as drive_module
from qlora_helpers.colab import mirror
from qlora_helpers.errors import TrainingStopped, WorkspaceError
from qlora_helpers.run.checkpoints import Checkpoints
from qlora_helpers.run.files import write_text
from qlora_helpers.run.manifest import manifest_of, read_archive

LONG = 300  # seconds: what answers does so in time, on a busy machine too


def publish(seed: int):
    """Run 01 and 02, which write other rows for another seed, and wait for the copy."""
    stages.set_up(stages.tiny_config("SmolLM2-135M-Instruct", seed=seed))
    workspace = stages.draw()
    workspace.push()
    return workspace


def rows(workspace) -> bytes:
    return (workspace / "subset" / "train.parquet").read_bytes()


def everything(drive: Path) -> dict[str, bytes]:
    """All that is published on Drive: the bytes of each file, by archive and name."""
    contents = {}
    for path in drive.rglob("*.tar"):
        with tempfile.TemporaryDirectory() as folder:
            for name in read_archive(path, lambda size: None, Path(folder))["files"]:
                contents[f"{path.name}/{name}"] = Path(folder, name).read_bytes()
    return contents


@pytest.fixture
def drive(tmp_path):
    """The reader's Drive, on a disk of its own of 600 kB."""
    folder = tmp_path / "drive"
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


# Each of these is a context in which Drive fails, on a machine that begins, and gives the machine
# the function `begin`. What it yields is the line by which a reader learns of it; None if there is
# nothing to tell.
FAULTS = []


def _fault(function):
    FAULTS.append(contextlib.contextmanager(function))
    return FAULTS[-1]


@_fault
def refused(begin, drive, patch):
    patch.setenv("FAKE_DRIVE", "declined")
    begin()
    yield "Without Google Drive (credential propagation was unsuccessful)"


@_fault
def late_answer(begin, drive, patch):
    """The reader answers when the run has gone on already."""
    patch.setenv("FAKE_DRIVE", "hangs")
    patch.setattr(drive_module, "ANSWER_SECONDS", 0)
    patch.setattr(drive_module, "MOUNT_SECONDS", 0.3)
    content = begin()
    find_workspace()
    (content / "drive").mkdir()
    (content / "drive" / "MyDrive").symlink_to(drive)
    yield "Without Google Drive (no answer within 0.3 s)"


@_fault
def without_my_drive(begin, drive, patch):
    patch.setenv("FAKE_DRIVE", "empty")
    content = begin()
    yield "Without Google Drive (it was mounted without MyDrive)"
    shutil.rmtree(content / "drive")


@_fault
def full(begin, drive, patch):
    begin()
    find_workspace()
    with contextlib.suppress(OSError), open(drive / "filler", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    yield "Google Drive does not take this run (No space left on device)"
    (drive / "filler").unlink()


@_fault
def read_only(begin, drive, patch):
    subprocess.run(["mount", "-o", "remount,ro", str(drive)], check=True)
    begin()
    yield "Google Drive does not take this run (Read-only file system)"
    subprocess.run(["mount", "-o", "remount,rw", str(drive)], check=True)


@contextlib.contextmanager
def _hangs(name, patch):
    """No call of `name` of the module mirror ends before the run has."""
    real, over, waited = getattr(mirror, name), threading.Event(), []

    def hang(*arguments):
        waited.append(over.wait(LONG))
        return real(*arguments)

    patch.setattr(mirror, name, hang)
    patch.setattr(mirror, "SECONDS", 0.3)
    yield
    assert not waited, "the run waited for Drive"
    over.set()
    patch.setattr(mirror, name, real)


@_fault
def hanging_read(begin, drive, patch):
    begin()
    with _hangs("read_archive", patch):
        yield "Google Drive cannot be read (no answer within 0.3 s)"


@_fault
def hanging_write(begin, drive, patch):
    begin()
    with _hangs("write_archive", patch):
        yield "Google Drive does not take this run (no answer within 0.3 s)"


@_fault
def gone_in_the_middle(begin, drive, patch):
    content = begin()
    find_workspace()
    (content / "drive" / "MyDrive").unlink()
    patch.setenv("FAKE_DRIVE", "declined")
    yield "Without Google Drive (credential propagation was unsuccessful)"
    assert not (content / "drive" / "MyDrive").exists()  # nothing is in the place of the next mount
    (content / "drive").rmdir()


@_fault
def stale_copy(begin, drive, patch):
    """Drive shows what it held before the last publication."""
    folder, hidden = drive / "qlora_ag_news" / "cpu", {}
    for path in folder.glob("0*-0002-*"):
        hidden[path] = path.rename(drive / f"hidden-{path.name}")
    assert hidden
    begin()
    yield None
    for path, where in hidden.items():
        where.rename(path)


@_fault
def half_pushed(begin, drive, patch):
    """A machine that was taken away left an archive unfinished, and Drive lost a part of others."""
    folder = drive / "qlora_ag_news" / "cpu"
    whole = max(folder.glob("02_data_subset-*")).read_bytes()
    halves = ["0007-half.tar.partial", "0008-half.tar", "0009-half.tar"]
    for name, size in zip(halves, (9000, 9000, 0), strict=True):
        (folder / f"02_data_subset-{name}").write_bytes(whole[:size])
    begin()
    yield "02_data_subset-0008-half.tar on Google Drive is not complete (unexpected end of data)"
    for name in halves:
        (folder / f"02_data_subset-{name}").unlink()


@_fault
def two_machines(begin, drive, patch):
    begin()
    yield None


@_fault
def clock_skew(begin, drive, patch):
    """The machine's clock is a day late, and Drive's files are from tomorrow."""
    day, now, utc = 86400, time.time, time.gmtime
    for path in drive.rglob("*"):
        os.utime(path, (now() + day, now() + day))
    patch.setattr(time, "time", lambda: now() - day)
    patch.setattr(time, "gmtime", lambda seconds=None: utc(now() - day))
    begin()
    yield None


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
        printed = capsys.readouterr().out
        assert line is None or line in printed
    find_workspace(True).push()  # the cell that pushes again
    assert "On Google Drive: MyDrive/qlora_ag_news/cpu" in capsys.readouterr().out
    assert before.items() <= everything(drive).items()
    new_machine()
    opened, config = open_workspace("02_data_subset")
    assert (config.seed, rows(opened)) == (3, rows(mine))


def test_a_run_that_cannot_be_read_is_not_said_to_be_missing(new_machine, tmp_path, monkeypatch):
    new_machine()
    publish(seed=1)
    new_machine()
    with (
        monkeypatch.context() as patch,
        _hangs("read_archive", patch),
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


def test_a_push_that_is_killed_leaves_the_older_or_the_newer_copy(drive, new_machine, tmp_path):
    """The kernel dies at the first change of Drive, at the second, and so on, until it is done."""
    new_machine()
    older = rows(publish(seed=1))
    seen, kill_at, status = [], 0, None
    while status != 0:
        kill_at += 1
        new_machine()
        status, said = forks.run(partial(_push_and_die, kill_at), tmp_path / "log")
        new_machine()
        opened, _ = open_workspace("02_data_subset")  # whose files are checked
        seen.append(rows(opened))
        assert status in (0, -signal.SIGKILL), said
    newer = [data for data in seen if data != older]
    assert kill_at > 10 and seen == [older] * (kill_at - len(newer)) + newer
    assert seen[-1] == b"newer"
    assert not list(drive.rglob("*.partial"))


def _push_and_die(kill_at: int) -> None:
    changes = 0

    def change(*arguments):
        nonlocal changes
        changes += 1
        if changes == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, arguments):
        if forks.changes_a_file(event, arguments) and "MyDrive" in str(arguments[0]):
            change()

    workspace, config = open_workspace("02_data_subset")
    workspace.push()
    workspace.mirror._jobs.count = change  # each piece that is written or read
    sys.addaudithook(audit)
    workspace.write("subset/train.parquet", "newer")
    workspace.publish("02_data_subset", vars(config), ["subset"], inputs=("01_setup",))
    workspace.push()


def test_files_that_changed_since_they_were_published_are_not_pushed(drive, new_machine, capsys):
    new_machine()
    workspace = publish(seed=1)
    (archive,) = drive.rglob("02_*.tar")
    archive.unlink()
    workspace.write("subset/train.parquet", "newer, and not published yet")
    workspace.push()
    assert "train.parquet is not what its manifest names" in capsys.readouterr().out
    assert [path.name[:8] for path in drive.rglob("*.*")] == ["01_setup"]


# Training, on a Drive of any size


def _train(tiny: str, stop_at: int | None = None, **settings):
    """01, 02 and 03, as Run all does them; 03 until a step."""
    stages.set_up(stages.tiny_config(tiny, **settings))
    stages.draw()
    workspace, config = open_workspace("02_data_subset")
    trainer = stages.trainer_for(workspace, config, checkpoint_steps=2)
    if stop_at:
        stages.stop_at(trainer, stop_at)
    stages.fit(workspace, trainer)
    return workspace


def test_a_training_goes_on_on_another_machine(new_machine, tiny, tmp_path, capsys, monkeypatch):
    """01 and 02 run again before 03: they write the same, and disturb nothing."""
    folder, write = tmp_path / "drive" / "qlora_ag_news" / "cpu", Checkpoints.write

    def write_and_copy(self, *args, **facts) -> bool:
        return write(self, *args, **facts) and self.copied(LONG)

    monkeypatch.setattr(Checkpoints, "write", write_and_copy)  # a newer one would take its place
    new_machine()
    with pytest.raises(TrainingStopped, match="The checkpoint of step 5 is written") as stopped:
        _train(tiny, stop_at=5)
    assert "keep this machine" not in str(stopped.value)  # it was copied
    assert {path.name for path in folder.glob("c*")} == {"checkpoint-5.tar", "checkpoint-4.tar"}
    damaged = bytearray((folder / "checkpoint-5.tar").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / "checkpoint-7.tar").write_bytes(damaged)
    assert "Going on" not in capsys.readouterr().out
    new_machine()
    workspace = _train(tiny)
    workspace.push()
    printed = capsys.readouterr().out
    assert "checkpoint-7.tar on Google Drive is not complete" in printed
    assert "Going on from the checkpoint of step 5 of 12, written 2" in printed
    assert not list(folder.glob("checkpoint-*"))  # the training is on Drive
    new_machine()
    again = _train(tiny)
    assert "holds the finished training with these settings" in capsys.readouterr().out
    history = again.read_json("03_qlora_training", "training.json")
    assert history == workspace.read_json("03_qlora_training", "training.json")
    assert len(history["train"]) == 12


def test_a_drive_that_hangs_holds_no_step_up(new_machine, tiny, monkeypatch, capsys):
    """Nothing that is written to Drive ends before the training has."""
    new_machine()
    with monkeypatch.context() as patch, _hangs("write_archive", patch):
        workspace = _train(tiny)
        workspace.push()
        assert "does not take this run (no answer within 0.3 s)" in capsys.readouterr().out
    workspace.push()
    assert "On Google Drive" in capsys.readouterr().out
    new_machine()
    opened, _ = open_workspace("03_qlora_training")
    assert (opened / "training.json").read_bytes() == (workspace / "training.json").read_bytes()


def test_checkpoints_stay_on_drive_until_the_training_is_there(
    new_machine, tiny, tmp_path, monkeypatch
):
    def write_archive(path, *arguments):
        if path.name.startswith("03_"):
            raise OSError(28, "No space left on device")
        write(path, *arguments)

    write = mirror.write_archive
    monkeypatch.setattr(mirror, "write_archive", write_archive)
    new_machine()
    with pytest.raises(TrainingStopped):
        _train(tiny, stop_at=5)
    open_workspace("02_data_subset")[0].push()  # waits until the checkpoint is on Drive
    _train(tiny).push()
    folder = tmp_path / "drive" / "qlora_ag_news" / "cpu"
    assert list(folder.glob("checkpoint-*")) and not list(folder.glob("03_*"))


def test_checkpoints_stay_while_a_slow_push_is_asked_for_again(tmp_path, monkeypatch):
    """03's last cell comes while Drive still writes the training, which then fails."""
    run, root, asked = mirror.Mirror(tmp_path, "cpu"), tmp_path / "files", threading.Event()

    def write_archive(*arguments):
        asked.wait(LONG)
        raise OSError(28, "No space left on device")

    write_text(root / "state", "of the training")
    manifest = manifest_of(root, ["state"], step=1, identity={}, facts={})
    run.push("checkpoint", "checkpoint-1", root, manifest)
    assert run.done(LONG)
    monkeypatch.setattr(mirror, "write_archive", write_archive)
    run.push("03_qlora_training", "03_qlora_training-0001", root, manifest)
    run.clear_checkpoints()
    run.push("03_qlora_training", "03_qlora_training-0001", root, manifest)
    asked.set()
    assert not run.done(LONG)
    assert [path.name for path in run.folder.iterdir()] == ["checkpoint-1.tar"]


def test_an_earlier_training_can_be_compared_with_on_another_machine(new_machine, tiny):
    histories = []
    for seed in (1, 2):
        new_machine()
        workspace = _train(tiny, seed=seed)
        workspace.push()
        histories.append(workspace.read_json("03_qlora_training", "training.json"))
    new_machine()
    for _ in range(2):
        workspace, _ = open_workspace("03_qlora_training")
        assert list(workspace.earlier_json("training.json").values()) == histories[:1]
        assert workspace.read_json("03_qlora_training", "training.json") == histories[1]


def test_a_checkpoint_of_another_training_is_replaced(tmp_path):
    run, root = mirror.Mirror(tmp_path, "cpu"), tmp_path / "checkpoint"
    for step, content in [(1, "one"), (2, "two"), (3, "three"), (3, "three, other settings")]:
        write_text(root / "state", content)
        manifest = manifest_of(root, ["state"], step=step, identity={}, facts={})
        run.push("checkpoint", f"checkpoint-{step}", root, manifest)
        assert run.done(LONG)
    archives = {
        path.name: read_archive(path, lambda size: None)["files"] for path in run.folder.iterdir()
    }
    assert archives.keys() == {"checkpoint-2.tar", "checkpoint-3.tar"}
    assert archives["checkpoint-3.tar"] == manifest["files"]
