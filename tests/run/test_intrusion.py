"""What a run does not own, links, names that lead out, and a second writer: nothing of it is
touched or trusted, and a message says so."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from qlora_helpers.colab.drive import find_workspace
from qlora_helpers.errors import WorkspaceError
from qlora_helpers.run.checkpoints import Checkpoints
from qlora_helpers.run.files import ordinary, sha256
from qlora_helpers.run.manifest import read_manifest, sealed
from qlora_helpers.run.workspace import Workspace

SETUP, IDENTITY = "01_setup", {"settings": {"seed": 1}, "data": "rows"}


@pytest.fixture
def run(workspace) -> Workspace:
    run = Workspace(workspace)
    run.write("config.json", "{}")
    run.publish(SETUP, {}, ["config.json"])
    return run


@pytest.mark.parametrize("name", ["thesis.txt", "checkpoints/checkpoint-500/model", "adapter/me"])
def test_a_folder_that_holds_something_else_is_refused_at_opening(workspace, name):
    (workspace / name).parent.mkdir(parents=True)
    (workspace / name).write_text("mine")
    with pytest.raises(WorkspaceError, match=f"no run, .*{name.partition('/')[0]}.*QLORA_WORKSP"):
        find_workspace()
    assert [path for path in workspace.rglob("*") if path.is_file()] == [workspace / name]


@pytest.mark.parametrize("name", ["checkpoint-500", "checkpoint-best", "notes.md"])
def test_only_checkpoints_of_ours_are_removed(tmp_path, name):
    """Something else is refused before training, and is there after a later one's end."""
    checkpoints, mine = Checkpoints(tmp_path / "checkpoints"), tmp_path / "checkpoints" / name
    (mine / "inside").mkdir(parents=True)
    with pytest.raises(WorkspaceError, match=f"{name} is not of this run.* Move it"):
        checkpoints.prepare()
    checkpoints.finish()
    assert (mine / "inside").exists()
    mine.rename(tmp_path / "moved")
    checkpoints.prepare()
    checkpoints.newest(IDENTITY)
    for step in (1, 2, 3):
        checkpoints.write(step, lambda folder: (folder / "state").touch(), facts={})
    (tmp_path / "moved").rename(mine.with_name("checkpoint-best"))
    checkpoints.finish()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["checkpoint-best"]


def test_a_stopped_training_leaves_nothing_where_other_users_can_write(
    stopped, workspace, tmp_path, monkeypatch
):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    stopped(3)
    assert (workspace / "checkpoints" / "checkpoint-3").exists()
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        *({"files": {name: "0" * 64}} for name in ("../x", "/x", "a/../../x", "", ".", "a\0b")),
        *({"notebook": name} for name in ("../../x", "", 3)),
        *({"fingerprint": text} for text in ("../../x", 3, None)),
        {"files": ["x"]},
        {"inputs": None},
        *({"inputs": {name: "0" * 64}} for name in ("../x", SETUP)),
        {"replaces": 3},
        {"replaces": [3]},
        {"config": None},
    ],
    ids=str,
)
def test_a_manifest_that_was_sealed_again_is_refused(run, change):
    path = run.manifest_path(SETUP)
    path.write_text(sealed(read_manifest(path) | change))
    with pytest.raises(WorkspaceError, match="01_setup.json cannot be read .*its .* Run notebooks"):
        run.open()
    assert run.read(SETUP) is None


@pytest.mark.parametrize("change", [{"step": "x"}, {"identity": 3}, {"facts": None}], ids=str)
def test_a_checkpoint_that_was_sealed_again_is_skipped(tmp_path, capsys, change):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.newest(IDENTITY)
    checkpoints.write(1, lambda folder: (folder / "state").touch(), facts={})
    path = tmp_path / "checkpoint-1" / "manifest.json"
    path.write_text(sealed(read_manifest(path) | change))
    assert checkpoints.newest(IDENTITY) is None
    assert f"is not complete (its {list(change)[0]} is not" in capsys.readouterr().out


@pytest.mark.parametrize("name", [".lock", ".lock.txt", "config.json.partial"])
def test_a_link_is_not_written_through(run, tmp_path, name):
    target = tmp_path / "target"
    target.write_text("mine")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)
    run.write("config.json", "{}")
    run.publish(SETUP, {}, ["config.json"])
    assert target.read_text() == "mine"


@pytest.mark.parametrize("name", ["checkpoints", "manifests", "earlier", "adapter"])
def test_a_link_in_the_place_of_a_folder_is_refused(run, tmp_path, name):
    if (run / name).exists():
        (run / name).rename(tmp_path / name)
    (tmp_path / name).mkdir(exist_ok=True)
    (run / name).symlink_to(tmp_path / name)
    with pytest.raises(WorkspaceError, match=f"{name} is a link.* Delete it"):
        find_workspace()


def test_a_link_in_the_place_of_a_file_is_named(run, tmp_path):
    (run / "config.json").rename(tmp_path / "config.json")
    (run / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(WorkspaceError, match="config.json cannot be read .Not an ordinary file"):
        run.open()


def test_a_file_without_end_is_not_read(tmp_path):
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 2**40)
    for read in (ordinary, sha256, read_manifest):
        with pytest.raises(OSError, match="sparse is longer than"):
            read(path)


def test_what_another_notebook_wrote_is_not_published_as_ones_own(run, workspace):
    other = Workspace(workspace)
    run.write("rows", "of seed 1")
    other.write("rows", "of seed 2")
    other.publish("02_data_subset", {"seed": 2}, ["rows"], (SETUP,))
    with pytest.raises(WorkspaceError, match="rows is not what this notebook wrote.* again"):
        run.publish("02_data_subset", {"seed": 1}, ["rows"], (SETUP,))
    assert other.require("02_data_subset")["config"] == {"seed": 2}


def test_a_training_is_published_while_no_other_writes(run, workspace, tuned):
    """As 03 does: an adapter's files are not written by `Workspace.write`, which notes them."""
    training, other = "03_qlora_training", Workspace(workspace)
    with run.hold(training):
        shutil.copytree(tuned / "adapter", run / "adapter")
        with pytest.raises(WorkspaceError, match="another notebook is writing"):
            other.set_aside(training, ["adapter"])
        with pytest.raises(WorkspaceError, match="another notebook is writing"):
            other.publish(training, {}, ["adapter"], (SETUP,))
        run.publish(training, {}, ["adapter"], (SETUP,))
    assert other.set_aside(training, ["adapter"])  # whole, and not mixed with the other's
    assert not (run / "adapter").exists()


def test_trainings_that_are_set_aside_at_once_are_all_kept(workspace, run):
    for text in ("{}", '{"a": 1}', "{}", "{}"):
        process = Workspace(workspace)  # which knows nothing of the ones before
        process.write("training.json", text)
        process.publish("03_qlora_training", {}, ["training.json"], (SETUP,))
        process.set_aside("03_qlora_training", ["training.json"])
    assert sorted(map(str, run.earlier_json("training.json").values())) == ["{'a': 1}", "{}"]


@pytest.mark.parametrize("text", ["[]", "", "3", '"x"', "[" * 100_000])
def test_an_odd_history_of_an_earlier_training_is_left_out(run, capsys, text):
    path = Path(run / "earlier" / "one" / "training.json")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert run.earlier_json("training.json") == {}
    assert "one/training.json is left out (" in capsys.readouterr().out


def test_a_lock_that_is_deleted_while_it_is_held_is_said(run, capsys):
    with run.hold("03_qlora_training"):
        (run / ".lock").unlink()
        Workspace(run.path).write("rows", "of another")
    assert ".lock was deleted while 03_qlora_training wrote" in capsys.readouterr().out
