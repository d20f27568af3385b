"""A Colab machine, simulated (tests/colab has the package of its runtimes): its Drive, its secrets, and what their failures say."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import huggingface_hub
import pytest
import stages
from huggingface_hub import constants
from huggingface_hub.utils import _auth

from qlora_helpers import RunConfig, Workspace, hub_token, open_workspace, training
from qlora_helpers.colab import drive as colab
from qlora_helpers.config import AG_NEWS, PROFILES
from qlora_helpers.errors import ConfigError, TrainingStopped, WorkspaceError
from qlora_helpers.hub_token import use_token
from qlora_helpers.run import drive_copy, run_folder

SECRET = "hf_" + "Secret" * 5
LONG = 300  # seconds: what answers does so in time, on a busy machine too


@pytest.fixture
def new_machine(tmp_path, monkeypatch):
    """A function that begins on a new Colab machine, with the same Drive, and returns its /content."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "colab")
    monkeypatch.setattr(colab, "MOUNT_SECONDS", LONG)
    monkeypatch.setattr(hub_token, "SECRET_SECONDS", LONG)
    monkeypatch.setenv("FAKE_DRIVE_FOLDER", str(tmp_path / "drive"))
    (tmp_path / "drive").mkdir()
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(_auth, "is_google_colab", lambda: True)
    for module, name in (
        (_auth, "_IS_GOOGLE_COLAB_CHECKED"),
        (_auth, "_GOOGLE_COLAB_SECRET"),
        (colab, "_without"),
        (hub_token, "_found"),
    ):
        monkeypatch.setattr(module, name, None)
    for name in ("HF_TOKEN", "QLORA_WORKSPACE"):
        monkeypatch.setenv(name, "of the test before")
    before = set(sys.modules)

    def begin() -> Path:
        content = Path(tempfile.mkdtemp(dir=tmp_path, prefix="machine_")) / "content"
        (content / "tmp").mkdir(parents=True)
        monkeypatch.setattr(colab, "CONTENT", content)
        monkeypatch.setattr(tempfile, "tempdir", str(content / "tmp"))
        monkeypatch.chdir(content)
        colab._without = hub_token._found = _auth._IS_GOOGLE_COLAB_CHECKED = (
            _auth._GOOGLE_COLAB_SECRET
        ) = None
        for name in ("HF_TOKEN", "QLORA_WORKSPACE"):
            os.environ.pop(name, None)
        return content

    yield begin
    for name in [
        name for name in sys.modules if name.partition(".")[0] == "google" and name not in before
    ]:
        del sys.modules[name]


@pytest.fixture
def content(new_machine) -> Path:
    return new_machine()


def _asked(what: str) -> list:
    return __import__(f"google.colab.{what}", fromlist=["asked"]).asked


def _said(capsys) -> str:
    return capsys.readouterr().out


def _set_up(drive=None, **settings) -> Workspace:
    workspace, config = (
        Workspace.find(drive),
        stages.tiny_config("SmolLM2-135M-Instruct", **settings),
    )
    workspace.write("config.json", config.to_json())
    workspace.publish("01_setup", config, ["config.json"])
    return workspace


# Drive


def test_elsewhere_nothing_is_asked(content, monkeypatch, capsys):
    monkeypatch.setattr(colab, "CONTENT", content / "no such folder")
    assert not colab.on_colab()
    assert Workspace.find().path == content / "runs" / "cpu" and _said(capsys) == ""


def test_a_run_on_drive_is_found_by_the_next_machine(new_machine, capsys):
    first = new_machine()
    assert Workspace.locate().path == first / "runs" / "cpu"  # a question, which asks nobody
    run = _set_up()
    assert run.path == first / "drive" / "MyDrive" / "qlora_ag_news" / "cpu" and _asked(
        "drive"
    ) == [str(first / "drive")]
    assert (
        'Colab asks for it now, for 300 seconds. To decline, choose "No thanks"; to be asked nothing, set QLORA_DRIVE=0'
    ) in _said(capsys)
    second = new_machine()
    opened, config = open_workspace()
    assert (
        opened.path == second / "drive" / "MyDrive" / "qlora_ag_news" / "cpu"
        and config.train_size == 44
    )
    assert len(_asked("drive")) == 2
    Workspace.find()
    assert len(_asked("drive")) == 2  # it is there


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        ("declined", "credential propagation was unsuccessful"),
        ("failed", "mount failed: timeout during initial read of root folder"),
        ("unsupported", "google.colab.drive is unsupported in this environment."),
        ("hangs", "no answer within 0.3 s"),
        ("empty", "it was mounted without MyDrive"),
    ],
)
def test_without_drive_the_local_disk_will_do_and_it_is_said(
    content, monkeypatch, capsys, behaviour, why
):
    monkeypatch.setenv("FAKE_DRIVE", behaviour)
    with monkeypatch.context() as patch:
        patch.setattr(colab, "MOUNT_SECONDS", 0.3 if behaviour == "hangs" else LONG)
        run = _set_up()
    assert run.path == content / "runs" / "cpu"
    assert (
        f"Without Google Drive ({why}): this run's files stay on this machine and go when its runtime does, and the other notebooks, "
        "which get machines of their own, will not find them. To have Drive: Runtime > Restart session and run all, and allow it."
    ) in _said(capsys)
    assert open_workspace()[0].path == run.path
    (content / "drive" / "MyDrive").mkdir(
        parents=True, exist_ok=True
    )  # an answer that came too late
    assert Workspace.locate().path == run.path and len(_asked("drive")) == 1 and _said(capsys) == ""
    shutil.rmtree(content / "drive")
    monkeypatch.setenv("FAKE_DRIVE", "allowed")
    assert Workspace.find(True).path.is_relative_to(content / "drive")  # the form's cell, run again


@pytest.mark.parametrize(("variable", "form"), [("0", None), ("0", True), ("", False)])
def test_drive_is_not_asked_for_where_it_is_not_wanted(
    content, monkeypatch, capsys, variable, form
):
    monkeypatch.setenv("QLORA_DRIVE", variable)
    assert _set_up(form).path == content / "runs" / "cpu" and not _asked("drive")
    assert "Without Google Drive (it was not wanted)" in _said(capsys)
    open_workspace()
    assert not _asked("drive")


def test_nor_where_the_workspace_is_named_unless_it_is_on_drive(content, monkeypatch):
    monkeypatch.setenv("QLORA_WORKSPACE", "elsewhere")
    assert _set_up().path == content / "elsewhere" and not _asked("drive")
    monkeypatch.setenv("QLORA_WORKSPACE", str(content / "drive" / "MyDrive" / "my run"))
    assert _set_up().path == content / "drive" / "MyDrive" / "my run" and len(_asked("drive")) == 1


def test_a_mounted_drive_is_left_alone_where_it_is_not_wanted(content, monkeypatch):
    (content / "drive" / "MyDrive").mkdir(parents=True)
    monkeypatch.setenv("QLORA_DRIVE", "0")
    assert Workspace.locate().path == content / "runs" / "cpu"


def test_an_odd_wish_is_named(content, monkeypatch):
    monkeypatch.setenv("QLORA_DRIVE", "no")
    for ask in (RunConfig.from_environment, Workspace.find):
        with pytest.raises(
            ConfigError,
            match=r"QLORA_DRIVE is 'no': it must be 1 \(Google Drive, where Colab can mount it\) or 0",
        ):
            ask()


def test_02_without_drive_says_that_the_run_there_cannot_be_seen(new_machine, monkeypatch):
    new_machine()
    _set_up()
    new_machine()
    monkeypatch.setenv("FAKE_DRIVE", "declined")
    with pytest.raises(WorkspaceError) as raised:
        open_workspace()
    assert str(raised.value) == (
        "runs/cpu holds nothing from 01_setup yet. Run notebooks/01_setup.ipynb first. A run on Google Drive cannot be seen from here, "
        "since this machine is without Drive (credential propagation was unsuccessful); on its own disk there is no run. If the run is on "
        "Drive: Runtime > Restart session and run all, and allow Drive this time."
    )
    _set_up()
    with pytest.raises(
        WorkspaceError,
        match="nothing from 02_data_subset yet.*on its own disk there is 01_setup. If the run is on Drive",
    ):
        open_workspace("02_data_subset")


def test_a_drive_that_cannot_be_read_is_named(content):
    run = _set_up()
    manifest = run / "manifests" / "01_setup.json"
    manifest.unlink()
    manifest.symlink_to("/proc/self/mem")  # to read it is an input/output error
    with pytest.raises(
        WorkspaceError,
        match="^Google Drive cannot be read .Input/output error.. What is on it is still there: Runtime",
    ):
        open_workspace()


# Drive fails in the middle


@pytest.fixture
def drive(new_machine, tmp_path):
    """The reader's Drive, on a disk of its own of 0.4 MB."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(tmp_path / "drive")],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    new_machine()
    yield tmp_path / "drive"
    subprocess.run(["umount", "-l", str(tmp_path / "drive")], capture_output=True)


def _fill(drive: Path) -> Path:
    with (
        pytest.raises(OSError, match="No space left"),
        open(drive / "filler", "wb", buffering=0) as file,
    ):
        while True:
            file.write(b"x" * 4096)
    return drive / "filler"


def test_a_full_drive_does_not_stop_02_and_the_run_can_be_brought_back(drive, new_machine, capsys):
    _set_up()
    filler = _fill(drive)
    stages.draw()
    said = _said(capsys)
    here = Path(os.environ["QLORA_WORKSPACE"])
    assert (
        "Google Drive cannot be written (No space left on device). From here on the run is in runs/cpu-off-drive, on this machine's "
        "own disk, and goes when its runtime does; what was on Drive is still there. Make room on Drive, or mount it again, and before "
        "the runtime ends bring the run back, in a cell: !cp -r "
    ) in said
    assert (
        "02_data_subset is published on this machine's own disk alone. To bring it to Drive: !cp -r "
        in said
    )
    run, config = open_workspace("02_data_subset")  # what comes after it in this runtime
    assert (run.path, str(run)) == (here, "runs/cpu-off-drive") and not run.path.is_relative_to(
        colab.CONTENT / "drive"
    )
    filler.unlink()
    command = re.findall(r"!(cp -r .*)", said)[-1]
    subprocess.run(command, shell=True, check=True)
    new_machine()
    run, again = open_workspace("02_data_subset")
    assert run.path.is_relative_to(colab.CONTENT / "drive") and again == config


def test_a_drive_that_goes_away_takes_nothing_with_it(drive, capsys):
    """Not even what was read from it: the next manifest vouches for that."""
    _set_up()
    stages.draw()
    run, config = open_workspace("02_data_subset")
    subset = (run / "subset" / "train.parquet").read_bytes()
    run.write("adapter/weights", "AB")
    (colab.CONTENT / "drive" / "MyDrive").unlink()
    run.write("training.json", "{}")
    manifest = run.publish(
        "03_qlora_training", config, ["adapter", "training.json"], inputs=("02_data_subset",)
    )
    assert list(manifest["files"]) == ["adapter/weights", "training.json"]
    assert (
        "Google Drive cannot be written (MyDrive is no longer mounted). From here on the run is in runs/cpu-off-drive"
        in _said(capsys)
    )
    run, _ = open_workspace("02_data_subset", "03_qlora_training")
    assert (run / "subset" / "train.parquet").read_bytes() == subset and not (
        colab.CONTENT / "drive" / "MyDrive"
    ).exists()


def test_a_drive_that_hangs_is_left(drive, monkeypatch, capsys):
    """The write to Drive does not end before the one to this machine's disk is done."""
    run, write, done, late = _set_up(), run_folder.write_file, threading.Event(), []

    def write_file(path, data):
        if colab.on_drive(path):
            late.append(not done.wait(LONG))
        write(path, data)

    monkeypatch.setattr(drive_copy, "DRIVE_SECONDS", 0.3)
    monkeypatch.setattr(run_folder, "write_file", write_file)
    run.write("note", "x")
    assert not late and (run / "note").read_text() == "x" and (run / "config.json").exists()
    assert "Google Drive cannot be written (no answer within 0.3 s)" in _said(capsys)
    done.set()


def test_what_is_no_failure_of_drive_is_raised_as_elsewhere(drive, config):
    run = _set_up()
    with pytest.raises(WorkspaceError, match="adapter cannot be published .No such file"):
        run.publish("03_qlora_training", config, ["adapter"])
    assert run.path.is_relative_to(colab.CONTENT / "drive")


def test_two_runs_that_left_drive_do_not_meet(drive, new_machine, capsys):
    _set_up()
    _fill(drive)
    for name in ("cpu-off-drive", "cpu-off-drive-1"):
        os.environ.pop("QLORA_WORKSPACE", None)
        run = Workspace.find()
        run.write("note", name)
        assert run.path.name == name and run.require("01_setup")


def test_a_drive_that_fills_up_loses_no_training(drive, tiny, capsys):
    """03, with room on Drive for its inputs alone."""
    run = Workspace.find()
    config = stages.tiny_config(tiny)
    run.write("config.json", config.to_json())
    run.publish("01_setup", config, ["config.json"])
    stages.draw()
    _fill(drive)
    history = stages.train()
    said = _said(capsys)
    assert (
        "Google Drive takes no checkpoints (No space left on device): they stay on this machine"
        in said
    )
    assert "From here on the run is in runs/cpu-off-drive" in said
    assert "03_qlora_training is published on this machine's own disk alone" in said
    run, _ = open_workspace("02_data_subset", "03_qlora_training")
    assert str(run) == "runs/cpu-off-drive" and run.read_json(
        "03_qlora_training", "training.json"
    ) == json.loads(json.dumps(history))


@pytest.mark.parametrize("at", ["a step", "the adapter", "its history"])
def test_a_drive_that_goes_away_in_03_loses_no_training(content, tiny, monkeypatch, capsys, at):
    """At a step; when the adapter is to be written; and when the adapter is written there, and gone with it."""
    run = Workspace.find()
    config = stages.tiny_config(tiny)
    run.write("config.json", config.to_json())
    run.publish("01_setup", config, ["config.json"])
    stages.draw()
    run, config = open_workspace("02_data_subset")
    trainer = stages.trainer_for(run, config, checkpoint_steps=2)
    owner, name = {
        "a step": (trainer, "compute_loss"),
        "the adapter": (training, "save_adapter"),
        "its history": (run, "write"),
    }[at]
    real = getattr(owner, name)

    def unmounted_then(*args, **kwargs):
        if trainer.state.global_step == (4 if at == "a step" else 12):
            (colab.CONTENT / "drive" / "MyDrive").unlink(missing_ok=True)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, unmounted_then)
    history = trainer.fit(run)
    said = _said(capsys)
    assert (
        "Google Drive cannot be written (MyDrive is no longer mounted). From here on the run is in runs/cpu-off-drive"
        in said
    )
    assert not (
        colab.CONTENT / "drive" / "MyDrive"
    ).exists()  # nothing was put in the place of the next mount
    run, _ = open_workspace("02_data_subset", "03_qlora_training")
    assert (
        run.read_json("03_qlora_training", "training.json") == json.loads(json.dumps(history))
        and len(history["train"]) == 12
    )


# Disconnected half-way


def test_run_all_again_on_a_new_machine_goes_on_and_says_from_where(new_machine, tiny, capsys):
    """01 and 02 run again before 03: they write the same, and disturb nothing."""

    def run_all() -> str:
        new_machine()
        workspace, config = Workspace.find(), stages.tiny_config(tiny)
        workspace.write("config.json", config.to_json())
        workspace.publish("01_setup", config, ["config.json"])
        stages.draw()
        workspace, config = open_workspace("02_data_subset")
        trainer = stages.trainer_for(workspace, config, checkpoint_steps=2)
        if not workspace.has("03_qlora_training") and not (workspace / "checkpoints").exists():
            stages.stop_at(trainer, 5)
            with pytest.raises(TrainingStopped, match="Stopped at step 5 of 12"):
                trainer.fit(workspace)
        else:
            trainer.fit(workspace)
        return _said(capsys)

    assert "Going on" not in run_all()
    assert "Going on from the checkpoint of step 5 of 12, written 2" in run_all()
    assert (
        "This workspace holds the finished training with these settings: nothing to do."
        in run_all()
    )


# The hub's token


HUB_CONFIG = RunConfig(**PROFILES["cpu"] | {"profile": "cpu", "data": AG_NEWS})


@pytest.mark.parametrize(
    ("behaviour", "source", "note", "warning"),
    [
        (f"is {SECRET}", "Colab's secret HF_TOKEN", "", False),
        ("is ", None, "Colab's secret HF_TOKEN is empty.", False),
        ("missing", None, "Colab has no secret HF_TOKEN.", False),
        ("forbidden", None, "This notebook may not read Colab's secret HF_TOKEN.", False),
        (
            "late",
            None,
            "Colab's secret HF_TOKEN did not come (Requesting secret HF_TOKEN timed out. Secrets can only be fetched when running "
            "from the Colab UI): going on without it.",
            True,
        ),
        (
            "hangs",
            None,
            "Colab's secret HF_TOKEN did not come (no answer within 0.3 s): going on without it.",
            True,
        ),
    ],
)
def test_the_token_of_colabs_secrets(
    content, monkeypatch, capsys, behaviour, source, note, warning
):
    monkeypatch.setenv("FAKE_SECRET", behaviour)
    monkeypatch.setattr(hub_token, "SECRET_SECONDS", 0.3 if behaviour == "hangs" else LONG)
    token = use_token(HUB_CONFIG)
    assert (token.source, token.note, token.warning) == (source, note, warning)
    assert huggingface_hub.get_token() == os.environ.get("HF_TOKEN") == (SECRET if source else None)
    assert ("going on without it. If the base model asks for a token" in _said(capsys)) is warning
    use_token(HUB_CONFIG)
    assert _asked("userdata") == ["HF_TOKEN"] and _said(capsys) == ""


def test_without_a_secret_the_environments_token_then_the_stored_one(content, monkeypatch):
    os.environ["HF_TOKEN"] = SECRET
    assert use_token(HUB_CONFIG).source == "HF_TOKEN in the environment"
    del os.environ["HF_TOKEN"]
    Path(constants.HF_TOKEN_PATH).write_text(SECRET)
    assert (
        use_token(HUB_CONFIG, again=True).source == "the stored login"
        and "HF_TOKEN" not in os.environ
    )


def test_no_token_is_asked_for_where_none_is_needed(content):
    assert use_token(RunConfig.from_environment()).note == "not needed" and not _asked("userdata")


def test_the_token_is_nowhere_written_or_said(content, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_SECRET", f"is {SECRET}")
    run = _set_up(data=AG_NEWS)
    token, _ = use_token(HUB_CONFIG), open_workspace()
    written = b"".join(path.read_bytes() for path in run.path.rglob("*") if path.is_file())
    assert (
        len(written) > 1000
        and SECRET.encode() not in written
        and SECRET not in "".join(capfd.readouterr()) + repr(token)
    )
