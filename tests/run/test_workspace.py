import dataclasses
import hashlib
import json
import os
import shutil

import pytest

from qlora_helpers.colab.drive import find_workspace, open_workspace
from qlora_helpers.errors import ConfigError, WorkspaceError
from qlora_helpers.run.files import write_text
from qlora_helpers.run.workspace import Workspace

SETUP, SUBSET = "01_setup", "02_data_subset"
TRAINING, EVALUATION = "03_qlora_training", "04_evaluation"


@pytest.fixture
def run(workspace, config) -> Workspace:
    """A workspace as 01 to 03 leave it."""
    run = Workspace(workspace)
    _set_up(run, config)
    run.write("subset/train.parquet", "rows")
    run.write("subset/test.parquet", "other rows")
    run.publish(SUBSET, vars(config), ["subset"], inputs=(SETUP,))
    run.write("adapter/weights", "AB")
    run.write("training.json", "{}")
    run.publish(TRAINING, vars(config), ["adapter", "training.json"], (SUBSET,), best_epoch=2)
    return run


def _set_up(run, config):
    run.write("config.json", config.to_json())
    run.publish(SETUP, vars(config), ["config.json"])


def test_published_work_is_read_again(run, config):
    manifest = run.require(TRAINING)
    assert manifest["config"] == json.loads(config.to_json())
    assert manifest["best_epoch"] == 2
    assert list(manifest["files"]) == ["adapter/weights", "training.json"]
    # printf AB | sha256sum
    digest = "38164fbd17603d73f696b8b4d72664d735bb6a7c88577687fd2ae33fd6964153"
    assert manifest["files"]["adapter/weights"] == digest
    opened, read = open_workspace(SUBSET, TRAINING)
    assert (opened.path, read) == (run.path, config)
    shutil.move(run.path, run.path.with_name("moved"))
    assert Workspace(run.path.with_name("moved")).is_current(TRAINING, vars(config))


@pytest.mark.parametrize("name", ["adapter", "weights.bin"])
def test_what_is_not_there_cannot_be_published(workspace, config, name):
    with pytest.raises(WorkspaceError, match=f"{name} cannot be published .No such file"):
        Workspace(workspace).publish(TRAINING, vars(config), [name])


def test_missing_work_names_the_notebook_to_run(run):
    for needs, missing in [((SUBSET, TRAINING), TRAINING), ((TRAINING,), TRAINING), ((), SETUP)]:
        run.manifest_path(missing).unlink()
        message = f"holds nothing from {missing} yet. Run notebooks/{missing}.ipynb first."
        with pytest.raises(WorkspaceError, match=message):
            open_workspace(*needs)
        run.manifest_path(missing).touch()


def _changed(path):
    path.write_text("sowr")


def _deleted(path):
    path.unlink()


def _folder(path):
    path.unlink()
    path.mkdir()


def _pipe(path):  # which nobody waits for
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_changed, "is not what 02_data_subset wrote"),
        (_deleted, "cannot be read .No such file or directory."),
        (_folder, "cannot be read .Not an ordinary file."),
        (_pipe, "cannot be read .Not an ordinary file."),
    ],
)
def test_a_damaged_file_is_named_with_the_notebook_that_makes_it(run, config, damage, message):
    damage(run / "subset" / "train.parquet")
    message = f"subset/train.parquet {message}. Run notebooks/02_data_subset.ipynb again."
    for notebook in (SUBSET, TRAINING):  # what the training was made from is no longer there
        with pytest.raises(WorkspaceError, match=message):
            run.require(notebook)
        assert not run.is_current(notebook, vars(config))


def _cut(size):
    return lambda text: text[:size]


@pytest.mark.parametrize(
    "damage",
    [
        *map(_cut, [0, 40, -1]),
        lambda text: text.replace('"best_epoch": 2', '"best_epoch": 3'),
        lambda text: text.replace('"seed": 42', '"seed": 7'),
        lambda text: text.replace('seal": "', 'seal": "0'),
    ],
)
def test_a_damaged_manifest_is_named(run, damage):
    path = run.manifest_path(TRAINING)
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text
    message = (
        "03_qlora_training.json cannot be read .* Run notebooks/03_qlora_training.ipynb again."
    )
    with pytest.raises(WorkspaceError, match=message):
        run.require(TRAINING)


def test_a_manifest_in_the_place_of_another_is_named(run):
    shutil.copy(run.manifest_path(SUBSET), run.manifest_path(TRAINING))
    message = "training.json is the manifest of 02_data_subset. Run notebooks/03_qlora_training"
    with pytest.raises(WorkspaceError, match=message):
        run.require(TRAINING)


def test_a_new_config_makes_later_work_stale(run, config):
    _set_up(run, dataclasses.replace(config, seed=7))
    message = "what 02_data_subset wrote was made before 01_setup was run with other settings"
    with pytest.raises(WorkspaceError, match=message):
        open_workspace(SUBSET)
    with pytest.raises(WorkspaceError, match="Run notebooks/02_data_subset.ipynb again."):
        run.require(TRAINING)
    assert not run.is_current(TRAINING, vars(config))


def test_work_of_another_config_is_refused(run, config):
    other = vars(dataclasses.replace(config, num_epochs=1))
    assert not run.is_current(TRAINING, other)
    run.publish(TRAINING, other, ["adapter", "training.json"], inputs=(SUBSET,))
    with pytest.raises(WorkspaceError, match="training wrote was made with other settings. Run"):
        open_workspace(TRAINING)


def test_publishing_the_same_again_keeps_later_work_current(run, config):
    _set_up(run, config)
    run.publish(SUBSET, vars(config), ["subset"], inputs=(SETUP,), seconds=3.2)
    assert run.is_current(TRAINING, vars(config))


def test_the_environment_must_not_contradict_the_workspace(run, monkeypatch):
    monkeypatch.setenv("QLORA_TRAIN_SIZE", "8")
    with pytest.raises(ConfigError, match="QLORA_TRAIN_SIZE asks for 8, .* set up with 280"):
        open_workspace()


def test_set_aside_keeps_the_old_files(run, config, capsys):
    names = ["adapter", "training.json"]
    earlier = run.set_aside(TRAINING, names)
    assert earlier.name.startswith("03_qlora_training-0001-")
    assert f"What 03_qlora_training wrote before is kept in earlier/{earlier.name}." in (
        capsys.readouterr().out
    )
    assert (earlier / "adapter" / "weights").read_text() == "AB"
    assert run.earlier_json("training.json") == {earlier.name: {}}
    assert not any((run / name).exists() for name in names)
    assert run.set_aside(TRAINING, names) is None
    assert run.is_current(SUBSET, vars(config))
    with pytest.raises(WorkspaceError, match="Run notebooks/03_qlora_training.ipynb first."):
        run.require(TRAINING)
    (run / "adapter").mkdir()  # the reader's own, or what a killed notebook left
    (run / "adapter" / "own").touch()
    kept = run.set_aside(TRAINING, names)
    assert kept.name.startswith("03_qlora_training-unpublished-")
    assert (kept / "adapter" / "own").exists() and not (run / "adapter").exists()
    write_text(earlier / "training.json", "[]")
    assert run.earlier_json("training.json") == {}
    assert "training.json is left out (it is not what was set aside)" in capsys.readouterr().out


def test_what_a_notebook_may_have_written_is_read_or_none_or_named(run, config):
    name = "adapter/calibration.json"
    assert run.find_json(EVALUATION, name) is None
    run.write(name, '{"temperature": 2.5}')  # it was stopped before it published
    with pytest.raises(WorkspaceError, match="holds nothing from 04_evaluation yet. Run"):
        run.find_json(EVALUATION, name)
    run.publish(EVALUATION, vars(config), [name], inputs=(TRAINING,))
    assert run.find_json(EVALUATION, name) == {"temperature": 2.5}
    (run / name).unlink()
    with pytest.raises(WorkspaceError, match="json cannot be read .* Run notebooks/04_evaluation"):
        run.find_json(EVALUATION, name)


def test_what_was_read_must_still_be_there_when_it_is_built_upon(run, config):
    opened, _ = open_workspace(SUBSET)
    run.write("subset/train.parquet", "newer rows")
    run.publish(SUBSET, vars(config), ["subset"], inputs=(SETUP,))
    message = "02_data_subset was run with other settings or data after this notebook had read"
    with pytest.raises(WorkspaceError, match=message):
        opened.publish(TRAINING, vars(config), ["adapter"], inputs=(SUBSET,))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "note.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new" * 100_000 + "\ud800")
    assert path.read_text() == "old"
    path.with_name("note.json.partial").write_text("what an interrupted run wrote")
    write_text(path, "newer: é")
    assert [p.name for p in path.parent.iterdir()] == ["note.json"]
    assert path.read_bytes() == "newer: é".encode()
    path.unlink()
    (path / "inside").mkdir(parents=True)  # a folder in its place is replaced
    write_text(path, "{}")
    assert path.read_text() == "{}"


def test_a_file_is_read_once_while_it_does_not_change(run, monkeypatch):
    path, read, digest = run / "adapter" / "weights", [], hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, kind: read.append(file.name) or digest(file, kind)
    )
    os.utime(path, ns=(0, 10**18))  # written long ago
    for _ in range(3):
        run.require(TRAINING)
    assert read.count(str(path)) == 1
    path.write_text("BA")  # a moment ago: the clock of its disk may not show the next change
    for _ in range(2):
        with pytest.raises(WorkspaceError, match="weights is not what 03_qlora_training wrote"):
            run.require(TRAINING)
    path.write_text("AB")
    run.require(TRAINING)


@pytest.mark.parametrize("folder", [".", "notebooks"])
def test_the_workspace_is_the_same_from_the_notebooks_folder(tmp_path, monkeypatch, folder):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / folder)
    assert find_workspace().path == tmp_path / "runs" / "cpu"
    monkeypatch.setenv("QLORA_WORKSPACE", "my run")
    located = find_workspace()
    assert (located.path, str(located)) == (tmp_path / "my run", "my run")
