import dataclasses
import hashlib
import json
import os
import shutil

import pytest

from qlora_helpers.colab.drive import find_workspace, open_workspace
from qlora_helpers.config import RunConfig
from qlora_helpers.errors import ConfigError, WorkspaceError
from qlora_helpers.run.files import write_text
from qlora_helpers.run.workspace import Workspace


@pytest.fixture
def run(workspace, config) -> Workspace:
    """A workspace as 01 to 03 leave it."""
    run = Workspace(workspace)
    _set_up(run, config)
    write_text(run / "subset" / "train.parquet", "rows")
    write_text(run / "subset" / "test.parquet", "other rows")
    run.publish("02_data_subset", vars(config), ["subset"], inputs=("01_setup",))
    write_text(run / "adapter" / "weights", "AB")
    write_text(run / "training.json", "{}")
    run.publish(
        "03_qlora_training",
        vars(config),
        ["adapter", "training.json"],
        inputs=("02_data_subset",),
        best_epoch=2,
    )
    return run


def _set_up(run, config):
    write_text(run / "config.json", config.to_json())
    run.publish("01_setup", vars(config), ["config.json"])


def test_published_work_is_found_again(run, config):
    manifest = run.require("03_qlora_training")
    assert manifest["config"] == json.loads(config.to_json())
    assert manifest["best_epoch"] == 2
    assert list(manifest["files"]) == ["adapter/weights", "training.json"]
    # printf AB | sha256sum
    assert (
        manifest["files"]["adapter/weights"]
        == "38164fbd17603d73f696b8b4d72664d735bb6a7c88577687fd2ae33fd6964153"
    )
    assert run.is_current("03_qlora_training", vars(config))


def test_open_workspace_gives_the_config_that_01_wrote(run, config):
    opened, found = open_workspace("02_data_subset", "03_qlora_training")
    assert (opened.path, found) == (run.path, config)


@pytest.mark.parametrize("name", ["adapter", "weights.bin"])
def test_what_is_not_there_cannot_be_published(workspace, config, name):
    with pytest.raises((OSError, WorkspaceError), match=name):
        Workspace(workspace).publish("03_qlora_training", vars(config), [name])


def test_missing_work_names_the_notebook_to_run(workspace, config):
    with pytest.raises(
        WorkspaceError, match="holds nothing from 01_setup yet. Run notebooks/01_setup.ipynb first."
    ):
        open_workspace()
    _set_up(Workspace(workspace), config)
    with pytest.raises(
        WorkspaceError,
        match="holds nothing from 02_data_subset yet. Run notebooks/02_data_subset.ipynb first.",
    ):
        open_workspace("02_data_subset")


@pytest.mark.parametrize(
    "needs", [("02_data_subset", "03_qlora_training"), ("03_qlora_training",)], ids=["04", "05"]
)
def test_evaluation_and_inference_before_training(run, needs):
    (run / "manifests" / "03_qlora_training.json").unlink()
    with pytest.raises(
        WorkspaceError,
        match="holds nothing from 03_qlora_training yet. Run notebooks/03_qlora_training.ipynb first.",
    ):
        open_workspace(*needs)


def _changed(path):
    path.write_text("sowr")


def _deleted(path):
    path.unlink()


def _made_a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_changed, "is not what 02_data_subset wrote"),
        (_deleted, "cannot be read"),
        (_made_a_folder, "cannot be read"),
    ],
)
def test_a_damaged_file_is_named_with_the_notebook_that_makes_it(run, config, damage, message):
    damage(run / "subset" / "train.parquet")
    with pytest.raises(
        WorkspaceError,
        match=rf"subset/train.parquet {message}.* Run notebooks/02_data_subset.ipynb again.",
    ):
        run.require("02_data_subset")
    assert not run.is_current("02_data_subset", vars(config))
    with pytest.raises(
        WorkspaceError, match="subset/train.parquet .* Run notebooks/02_data_subset.ipynb again."
    ):
        run.require("03_qlora_training")  # what it was made from is no longer there


@pytest.mark.parametrize("keep", [0, 40, -1])
def test_a_truncated_manifest_is_named(run, keep):
    path = run / "manifests" / "02_data_subset.json"
    path.write_text(path.read_text()[:keep])
    with pytest.raises(
        WorkspaceError,
        match=r"manifests/02_data_subset.json cannot be read .* Run notebooks/02_data_subset.ipynb again.",
    ):
        run.require("02_data_subset")


def test_a_new_config_makes_later_work_stale(run, config):
    _set_up(run, dataclasses.replace(config, seed=7))
    with pytest.raises(
        WorkspaceError,
        match="what 02_data_subset wrote was made before 01_setup was run with other settings",
    ):
        open_workspace("02_data_subset")
    with pytest.raises(WorkspaceError, match="Run notebooks/02_data_subset.ipynb again."):
        run.require("03_qlora_training")
    assert not run.is_current("03_qlora_training", vars(config))


def test_work_of_another_config_is_refused(run, config):
    other = vars(dataclasses.replace(config, num_epochs=1))
    assert not run.is_current("03_qlora_training", other)
    run.publish(
        "03_qlora_training", other, ["adapter", "training.json"], inputs=("02_data_subset",)
    )
    with pytest.raises(
        WorkspaceError,
        match="03_qlora_training wrote was made with other settings. Run notebooks/03_qlora_training.ipynb",
    ):
        open_workspace("03_qlora_training")


def test_publishing_the_same_again_keeps_later_work_current(run, config):
    _set_up(run, config)
    run.publish("02_data_subset", vars(config), ["subset"], inputs=("01_setup",), seconds=3.2)
    assert run.is_current("03_qlora_training", vars(config))


def test_the_environment_must_not_contradict_the_workspace(run, monkeypatch):
    monkeypatch.setenv("QLORA_TRAIN_SIZE", "8")
    with pytest.raises(ConfigError, match="QLORA_TRAIN_SIZE asks for 8, .* set up with 280"):
        open_workspace()


def test_set_aside_keeps_the_old_files(run, config):
    names = ["checkpoints", "adapter", "training.json"]
    earlier = run.set_aside("03_qlora_training", names)
    assert (earlier / "adapter" / "weights").read_text() == "AB"
    assert (earlier / "training.json").read_text() == "{}"
    assert json.loads((earlier / "manifest.json").read_text())["notebook"] == "03_qlora_training"
    assert not any((run / name).exists() for name in names)
    assert run.set_aside("03_qlora_training", names) is None
    assert run.is_current("02_data_subset", vars(config))
    with pytest.raises(WorkspaceError, match="Run notebooks/03_qlora_training.ipynb first."):
        run.require("03_qlora_training")


def test_write_text_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "note.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new" * 100_000 + "\ud800")  # fails on the way to the disk
    assert path.read_text() == "old"
    path.with_name("note.json.partial").write_text("what an interrupted run left behind")
    write_text(path, "newer: é")
    assert [p.name for p in path.parent.iterdir()] == ["note.json"]
    assert path.read_bytes() == "newer: é".encode()


@pytest.mark.parametrize("folder", [".", "notebooks"])
def test_the_default_workspace_is_the_same_from_the_notebooks_folder(tmp_path, monkeypatch, folder):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / folder)
    assert find_workspace().path == tmp_path / "runs" / "cpu"


@pytest.mark.parametrize("folder", [".", "notebooks"])
def test_a_relative_workspace_is_the_same_from_the_notebooks_folder(tmp_path, monkeypatch, folder):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / folder)
    monkeypatch.setenv("QLORA_WORKSPACE", "my run")
    located = find_workspace()
    assert (located.path, str(located)) == (tmp_path / "my run", "my run")


def test_a_workspace_can_be_moved(run, config, tmp_path):
    shutil.move(run.path, tmp_path / "elsewhere")
    assert Workspace(tmp_path / "elsewhere").is_current(
        "03_qlora_training", vars(RunConfig.from_json(config.to_json()))
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"best_epoch": 2', '"best_epoch": 3'),
        ('"seed": 42', '"seed": 7'),
        ('seal": "', 'seal": "0'),
    ],
)
def test_an_edited_manifest_is_named(run, old, new):
    path = run / "manifests" / "03_qlora_training.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(
        WorkspaceError,
        match=r"03_qlora_training.json cannot be read \(it is torn, or was changed .*Run notebooks/03",
    ):
        run.require("03_qlora_training")


def test_a_manifest_in_the_place_of_another_is_named(run):
    shutil.copy(
        run / "manifests" / "02_data_subset.json", run / "manifests" / "03_qlora_training.json"
    )
    with pytest.raises(
        WorkspaceError,
        match="03_qlora_training.json is the manifest of 02_data_subset. Run notebooks/03_qlora_training",
    ):
        run.require("03_qlora_training")


def test_what_a_notebook_may_have_written_is_found_or_none_or_named(run, config):
    assert run.find_json("04_evaluation", "adapter/calibration.json") is None
    run.write("adapter/calibration.json", '{"temperature": 2.5}')
    with pytest.raises(
        WorkspaceError,
        match="holds nothing from 04_evaluation yet. Run notebooks/04_evaluation.ipynb first.",
    ):
        run.find_json(
            "04_evaluation", "adapter/calibration.json"
        )  # it was stopped before it published
    run.publish(
        "04_evaluation", vars(config), ["adapter/calibration.json"], inputs=("03_qlora_training",)
    )
    assert run.find_json("04_evaluation", "adapter/calibration.json") == {"temperature": 2.5}
    (run / "adapter" / "calibration.json").unlink()
    with pytest.raises(
        WorkspaceError,
        match="calibration.json cannot be read .* Run notebooks/04_evaluation.ipynb again.",
    ):
        run.find_json("04_evaluation", "adapter/calibration.json")


def test_what_was_read_must_still_be_there_when_it_is_built_upon(run, config):
    opened, _ = open_workspace("02_data_subset")
    run.write("subset/train.parquet", "newer rows")
    run.publish("02_data_subset", vars(config), ["subset"], inputs=("01_setup",))
    with pytest.raises(
        WorkspaceError,
        match="02_data_subset was run with other settings or data after this notebook had read",
    ):
        opened.publish("03_qlora_training", vars(config), ["adapter"], inputs=("02_data_subset",))


def test_a_folder_in_the_place_of_a_file_is_replaced(run):
    (run / "training.json").unlink()
    (run / "training.json" / "inside").mkdir(parents=True)
    run.write("training.json", "{}")
    assert (run / "training.json").read_text() == "{}"


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(run):
    (run / "training.json").unlink()
    os.mkfifo(run / "training.json")
    with pytest.raises(
        WorkspaceError,
        match="training.json cannot be read .Not an ordinary file.. Run notebooks/03_qlora_training",
    ):
        run.require("03_qlora_training")


def test_a_file_is_read_once_while_it_does_not_change(run, monkeypatch):
    path, read, digest = run / "adapter" / "weights", [], hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, kind: read.append(file.name) or digest(file, kind)
    )
    os.utime(path, ns=(0, 10**18))  # written long ago
    for _ in range(3):
        run.require("03_qlora_training")
    assert read.count(str(path)) == 1
    path.write_text("BA")  # a moment ago: the clock of its disk may not show the next change
    for _ in range(2):
        with pytest.raises(WorkspaceError, match="weights is not what 03_qlora_training wrote"):
            run.require("03_qlora_training")
    path.write_text("AB")
    run.require("03_qlora_training")
