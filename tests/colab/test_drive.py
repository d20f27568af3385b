"""A Colab machine, simulated (see tests/fake_colab): its Drive, and what its failures say."""

import threading
from pathlib import Path

import pytest
import stages

from qlora_helpers import RunConfig, find_workspace, open_workspace
from qlora_helpers.colab import drive, machine
from qlora_helpers.errors import ConfigError, WorkspaceError


@pytest.fixture
def content(new_machine) -> Path:
    return new_machine()


def _asked() -> list:
    from google.colab import drive

    return drive.asked


def _set_up(drive=None):
    workspace = find_workspace(drive)
    config = stages.tiny_config("SmolLM2-135M-Instruct")
    workspace.write("config.json", config.to_json())
    workspace.publish("01_setup", vars(config), ["config.json"])
    return workspace


def test_elsewhere_nothing_is_asked(content, monkeypatch, capsys):
    monkeypatch.setattr(machine, "CONTENT", content / "no such folder")
    run = find_workspace()
    assert (run.path, run.mirror) == (content / "runs" / "cpu", None)
    assert capsys.readouterr().out == ""


def test_drive_is_asked_for_once_and_named_after_the_run(content, monkeypatch, capsys):
    run = _set_up()
    assert run.path == content / "runs" / "cpu"
    assert run.mirror.folder == content / "drive" / "MyDrive" / "qlora_ag_news" / "cpu"
    assert "Colab asks for Google Drive now, for 120 seconds" in capsys.readouterr().out
    monkeypatch.setenv("QLORA_WORKSPACE", "runs/mine")
    assert find_workspace().mirror.folder.name == "mine"
    monkeypatch.setenv("QLORA_WORKSPACE", "first/mine")
    assert find_workspace().mirror.folder.name == "first_mine"
    assert _asked() == [str(content / "drive")]


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
def test_without_drive_the_run_goes_on_and_a_line_says_why(
    content, monkeypatch, capsys, behaviour, why
):
    monkeypatch.setenv("FAKE_DRIVE", behaviour)
    if behaviour == "hangs":
        monkeypatch.setattr(drive, "ANSWER_SECONDS", 0.2)
        monkeypatch.setattr(drive, "MOUNT_SECONDS", 0.1)
    assert _set_up().mirror is None
    assert (
        f"Without Google Drive ({why}): this run's files stay on this machine and go when its "
        "runtime does, and the other notebooks, which get machines of their own, will not find "
        "them. To have Drive: Runtime > Restart session and run all, and allow it."
    ) in capsys.readouterr().out
    assert open_workspace()[0].mirror is None and len(_asked()) == 1
    assert capsys.readouterr().out == ""
    # it was allowed too late, or mounted by hand
    (content / "drive" / "MyDrive").mkdir(parents=True, exist_ok=True)
    run = find_workspace()
    assert "Google Drive is there now: this run is copied to it." in capsys.readouterr().out
    run.push()
    assert [path.name[:8] for path in run.mirror.folder.iterdir()] == ["01_setup"]
    assert len(_asked()) == 1


def test_the_form_asks_again(content, monkeypatch):
    monkeypatch.setenv("FAKE_DRIVE", "declined")
    assert find_workspace(True).mirror is None
    monkeypatch.setenv("FAKE_DRIVE", "allowed")
    assert find_workspace().mirror is None and len(_asked()) == 1
    assert find_workspace(True).mirror and len(_asked()) == 2


def test_the_answer_and_the_mount_have_clocks_of_their_own(content, monkeypatch, tmp_path, capsys):
    """The reader's answer comes when the dialog's time is over; Drive is mounted then."""
    monkeypatch.setenv("FAKE_DRIVE", "hangs")
    monkeypatch.setattr(drive, "ANSWER_SECONDS", 0.1)
    threading.Timer(0.5, (tmp_path / "answer").touch).start()
    assert find_workspace().mirror
    assert "Without Google Drive" not in capsys.readouterr().out


def test_a_question_that_a_stopped_cell_left_open_is_not_asked_twice(
    content, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("FAKE_DRIVE", "hangs")
    question = _asked()  # imports the package in the main thread

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(drive, "follow", stop)
        find_workspace()
    threading.Timer(0.5, (tmp_path / "answer").touch).start()
    assert find_workspace().mirror and len(question) == 1
    assert "is still open: answer that one." in capsys.readouterr().out


@pytest.mark.parametrize(("variable", "form"), [("0", None), ("0", True), ("", False)])
@pytest.mark.parametrize("mounted", [False, True])
def test_drive_is_not_used_where_it_is_not_wanted(
    content, monkeypatch, capsys, variable, form, mounted
):
    monkeypatch.setenv("QLORA_DRIVE", variable)
    if mounted:
        (content / "drive" / "MyDrive").mkdir(parents=True)
    assert _set_up(form).mirror is None and not _asked()
    assert (
        "Without Google Drive (declined in the form or by QLORA_DRIVE=0)" in capsys.readouterr().out
    )
    assert open_workspace()[0].mirror is None and not _asked()


def test_a_workspace_on_drive_is_refused_with_the_remedy(content, monkeypatch):
    monkeypatch.setenv("QLORA_WORKSPACE", str(content / "drive" / "MyDrive" / "mine"))
    remedy = "name runs/mine, and Drive keeps a copy of it in qlora_ag_news/mine"
    with pytest.raises(ConfigError, match=remedy):
        find_workspace()
    assert not _asked()


def test_an_odd_wish_is_named(content, monkeypatch):
    monkeypatch.setenv("QLORA_DRIVE", "no")
    for ask in (RunConfig.from_environment, find_workspace):
        with pytest.raises(ConfigError, match="QLORA_DRIVE is 'no': it must be 1 .* or 0"):
            ask()


def test_02_without_drive_says_that_the_run_there_cannot_be_seen(new_machine, monkeypatch):
    new_machine()
    _set_up()
    new_machine()
    monkeypatch.setenv("FAKE_DRIVE", "declined")
    with pytest.raises(WorkspaceError) as raised:
        open_workspace()
    assert str(raised.value) == (
        "runs/cpu holds nothing from 01_setup yet. Run notebooks/01_setup.ipynb first. A run on "
        "Google Drive cannot be seen from here, since this machine is without Drive (credential "
        "propagation was unsuccessful); on its own disk there is no run. If the run is on Drive: "
        "Runtime > Restart session and run all, and allow Drive."
    )
    _set_up()
    with pytest.raises(WorkspaceError, match="nothing from 02_.* own disk there is 01_setup. If"):
        open_workspace("02_data_subset")
