"""The workspace of this run, with Google Drive as its mirror if the reader allows that."""

import os
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from qlora_helpers.colab import machine
from qlora_helpers.colab.hub_token import use_token
from qlora_helpers.colab.machine import on_colab
from qlora_helpers.colab.mirror import Mirror
from qlora_helpers.colab.threads import bounded, follow, start
from qlora_helpers.config import RunConfig, drive_wanted, workspace_folder
from qlora_helpers.errors import ConfigError, WorkspaceError, reason
from qlora_helpers.run.workspace import Workspace

ANSWER_SECONDS = 120  # for the reader, in Colab's own dialog
MOUNT_SECONDS = 180  # for Drive to come then: drive.mount tries for up to 150
_DECLINED = "declined in the form or by QLORA_DRIVE=0"
_without: str | None = None  # why this process does without Drive, once that is settled
_question: Future | None = None  # a mount that was asked for


def find_workspace(drive: bool | None = None) -> Workspace:
    """Return the workspace of this run, with what was published on Drive.

    On Colab the reader is asked for Drive, unless `drive` (or QLORA_DRIVE, which wins) says no.
    Raises ConfigError for a QLORA_WORKSPACE on Drive or a QLORA_DRIVE that is neither 0 nor 1.
    """
    path = workspace_folder()
    if Path(os.path.abspath(path)).is_relative_to(machine.CONTENT / "drive"):
        raise ConfigError(
            f"QLORA_WORKSPACE is {path}, on Google Drive. A run lives on the machine's own disk: "
            f"name runs/{path.name}, and Drive keeps a copy of it in qlora_ag_news/{path.name}."
        )
    folder = _my_drive(drive)
    workspace = Workspace(path)
    if folder:  # two runs of one name have different folders
        name = str(workspace).removeprefix("runs/").strip("/").replace("/", "_")
        workspace.mirror = Mirror(folder, name)
    workspace.pull()
    return workspace


def open_workspace(*notebooks: str) -> tuple[Workspace, RunConfig]:
    """Return `find_workspace()` and its config, after `Workspace.open` for `notebooks`.

    Raises: WorkspaceError that names the notebook to run; ConfigError if the environment asks for
        other settings.
    """
    workspace = find_workspace()
    try:
        config = RunConfig.from_json(workspace.open(*notebooks))
    except WorkspaceError as error:
        without = _without or (workspace.mirror and workspace.mirror.unread)
        if not without:
            raise
        here = sorted(path.stem for path in workspace.path.glob("manifests/*.json"))
        raise WorkspaceError(
            f"{error} A run on Google Drive cannot be seen from here, since this machine is "
            f"without Drive ({without}); on its own disk there is {', '.join(here) or 'no run'}. "
            "If the run is on Drive: Runtime > Restart session and run all, and allow Drive."
        ) from error
    config.check_environment()
    use_token(config)
    return workspace, config


def without_drive() -> str | None:
    """Return why this process does without Drive, if that is settled."""
    return _without


def _my_drive(asked: bool | None) -> Path | None:
    """Return the reader's Drive, which is mounted on Colab if the reader allows it. None, with a
    line the first time, if it is not to be had."""
    global _without
    wanted = drive_wanted(asked is not False)
    if asked is not None:  # a new answer in a form
        _without = None
    settled = _without
    if settled == _DECLINED or not on_colab():
        return None
    mount = machine.CONTENT / "drive"
    is_mounted = partial(bounded, partial(os.path.isdir, mount / "MyDrive"), MOUNT_SECONDS)
    try:
        if not wanted:
            _without = _DECLINED
        elif settled:
            _without = None if os.path.isdir(mount / "MyDrive") else settled
        elif not is_mounted():
            _ask(mount)
            _without = None if is_mounted() else "it was mounted without MyDrive"
    except Exception as error:  # Colab's own kinds, ValueError, pexpect's
        _without = reason(error).removeprefix("Error: ")
    if settled and not _without:
        print("Google Drive is there now: this run is copied to it.")
    if not _without:
        return mount / "MyDrive"
    if not settled:
        print(
            f"Without Google Drive ({_without}): this run's files stay on this machine and go when "
            "its runtime does, and the other notebooks, which get machines of their own, will not "
            "find them. To have Drive: Runtime > Restart session and run all, and allow it."
        )
    return None


def _ask(mount: Path) -> None:
    """Mount Drive. A question that is still open, after the cell was stopped, is not asked again:
    two would wait for one answer."""
    global _question
    if _question and not _question.done():
        print("Colab's question for Google Drive is still open: answer that one.", flush=True)
    else:
        print(
            f"Colab asks for Google Drive now, for {ANSWER_SECONDS} seconds. Drive would keep "
            'this run for the other notebooks. To decline, choose "No thanks"; to be asked '
            "nothing, set QLORA_DRIVE=0.",
            flush=True,
        )
        from google.colab import drive

        _question = start(partial(drive.mount, str(mount), timeout_ms=1000 * ANSWER_SECONDS))
    follow([_question], ANSWER_SECONDS + MOUNT_SECONDS)
    _question.result()
