"""A Colab machine, simulated (tests/fake_colab has the package of its runtimes): its Drive, its secrets, and what their failures say."""

import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import stages
from huggingface_hub import constants

from qlora_helpers import RunConfig, Workspace, find_workspace, open_workspace
from qlora_helpers.colab import drive, hub_token, machine
from qlora_helpers.colab.hub_token import use_token
from qlora_helpers.config import AG_NEWS, PROFILES
from qlora_helpers.errors import ConfigError, WorkspaceError

SECRET = "hf_" + "Secret" * 5
LONG = 300  # seconds: what answers does so in time, on a busy machine too


@pytest.fixture
def content(new_machine) -> Path:
    return new_machine()


def _asked(what: str) -> list:
    return __import__(f"google.colab.{what}", fromlist=["asked"]).asked


def _said(capsys) -> str:
    return capsys.readouterr().out


def _set_up(drive=None, **settings) -> Workspace:
    workspace = find_workspace(drive)
    config = stages.tiny_config("SmolLM2-135M-Instruct", **settings)
    workspace.write("config.json", config.to_json())
    workspace.publish("01_setup", vars(config), ["config.json"])
    return workspace


# Drive


def test_elsewhere_nothing_is_asked(content, monkeypatch, capsys):
    monkeypatch.setattr(machine, "CONTENT", content / "no such folder")
    run = find_workspace()
    assert (run.path, run.mirror) == (content / "runs" / "cpu", None) and _said(capsys) == ""


def test_drive_is_asked_for_once_and_named_after_the_run(content, monkeypatch, capsys):
    run = _set_up()
    assert run.path == content / "runs" / "cpu"
    assert run.mirror.folder == content / "drive" / "MyDrive" / "qlora_ag_news" / "cpu"
    assert (
        'Colab asks for it now, for 300 seconds. To decline, choose "No thanks"; to be asked nothing, '
        "set QLORA_DRIVE=0"
    ) in _said(capsys)
    monkeypatch.setenv("QLORA_WORKSPACE", "runs/mine")
    assert find_workspace().mirror.folder.name == "mine"
    assert _asked("drive") == [str(content / "drive")]


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
        patch.setattr(drive, "MOUNT_SECONDS", 0.3 if behaviour == "hangs" else LONG)
        run = _set_up()
    assert run.mirror is None
    assert (
        f"Without Google Drive ({why}): this run's files stay on this machine and go when its runtime does, and the other notebooks, "
        "which get machines of their own, will not find them. To have Drive: Runtime > Restart session and run all, and allow it."
    ) in _said(capsys)
    assert open_workspace()[0].mirror is None
    (content / "drive" / "MyDrive").mkdir(
        parents=True, exist_ok=True
    )  # an answer that came too late
    assert find_workspace().mirror is None and len(_asked("drive")) == 1 and _said(capsys) == ""
    shutil.rmtree(content / "drive")
    monkeypatch.setenv("FAKE_DRIVE", "allowed")
    assert find_workspace(True).mirror  # the form's cell, run again


@pytest.mark.parametrize(("variable", "form"), [("0", None), ("0", True), ("", False)])
def test_drive_is_not_asked_for_where_it_is_not_wanted(
    content, monkeypatch, capsys, variable, form
):
    monkeypatch.setenv("QLORA_DRIVE", variable)
    assert _set_up(form).mirror is None and not _asked("drive")
    assert "Without Google Drive (it was not wanted)" in _said(capsys)
    open_workspace()
    assert not _asked("drive")


def test_a_mounted_drive_is_left_alone_where_it_is_not_wanted(content, monkeypatch):
    (content / "drive" / "MyDrive").mkdir(parents=True)
    monkeypatch.setenv("QLORA_DRIVE", "0")
    assert find_workspace().mirror is None


def test_a_workspace_on_drive_is_refused_with_the_remedy(content, monkeypatch):
    monkeypatch.setenv("QLORA_WORKSPACE", str(content / "drive" / "MyDrive" / "mine"))
    with pytest.raises(
        ConfigError, match="name runs/mine, and Drive keeps a copy of it in qlora_ag_news/mine"
    ):
        find_workspace()
    assert not _asked("drive")


def test_an_odd_wish_is_named(content, monkeypatch):
    monkeypatch.setenv("QLORA_DRIVE", "no")
    for ask in (RunConfig.from_environment, find_workspace):
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
