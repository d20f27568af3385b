"""The workspace of this run, with Google Drive as its mirror where its reader allows that."""

import os
from functools import partial
from pathlib import Path

from qlora_helpers.colab import machine
from qlora_helpers.colab.hub_token import use_token
from qlora_helpers.colab.machine import on_colab
from qlora_helpers.colab.mirror import Mirror
from qlora_helpers.colab.threads import bounded
from qlora_helpers.config import RunConfig, drive_wanted, workspace_folder
from qlora_helpers.errors import ConfigError, WorkspaceError, reason
from qlora_helpers.run.workspace import Workspace

MOUNT_SECONDS = 120  # for the reader to answer, and for Drive to come
_without: str | None = None  # why this process does without Drive, once that is settled


def find_workspace(drive: bool | None = None) -> Workspace:
    """Return the workspace of this run, in `workspace_folder`.

    On a Colab machine Drive is asked for, unless `drive` (or QLORA_DRIVE, which wins) says no: it
    is then the workspace's mirror, and what was published elsewhere is brought from there.

    Raises: ConfigError for a QLORA_WORKSPACE on Drive or a QLORA_DRIVE that is neither 0 nor 1.
    """
    path = workspace_folder()
    if Path(os.path.abspath(path)).is_relative_to(machine.CONTENT / "drive"):
        raise ConfigError(
            f"QLORA_WORKSPACE is {path}, on Google Drive. A run lives on the machine's own disk: "
            f"name runs/{path.name}, and Drive keeps a copy of it in qlora_ag_news/{path.name}."
        )
    ask_for_drive(drive)
    folder = my_drive()
    workspace = Workspace(path, Mirror(folder, path.name) if folder else None)
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
        manifests = sorted((workspace / "manifests").glob("*.json"))
        found = ", ".join(path.stem for path in manifests) or "no run"
        raise WorkspaceError(
            f"{error} A run on Google Drive cannot be seen from here, since this machine is "
            f"without Drive ({without}); on its own disk there is {found}. If the run is on Drive: "
            "Runtime > Restart session and run all, and allow Drive this time."
        ) from error
    config.check_environment()
    use_token(config)
    return workspace, config


def my_drive() -> Path | None:
    """The reader's Drive if it is mounted and to be used."""
    folder = machine.CONTENT / "drive" / "MyDrive"
    if _without or not drive_wanted():
        return None
    try:  # isdir is False for a mount that has died
        return folder if bounded(partial(os.path.isdir, folder), MOUNT_SECONDS) else None
    except TimeoutError:
        return None


def ask_for_drive(wanted: bool | None = None) -> None:
    """On Colab, mount Google Drive: its dialog is the reader's to accept, to decline, or to leave.

    Without it a line says so, and why. Nothing is asked twice, nor where QLORA_DRIVE, else
    `wanted`, says no. Raises ConfigError for a QLORA_DRIVE that is neither 0 nor 1.
    """
    global _without
    if wanted is not None:  # a form's answer: this is a new question
        _without = None
    if not on_colab() or _without or my_drive():
        return
    if not drive_wanted(wanted is not False):
        _without = "it was not wanted"
    else:
        print(
            "Google Drive would keep this run for the other notebooks: Colab asks for it now, for "
            f'{MOUNT_SECONDS} seconds. To decline, choose "No thanks"; to be asked nothing, set '
            "QLORA_DRIVE=0.",
            flush=True,
        )
        try:
            from google.colab import drive

            mount, milliseconds = str(machine.CONTENT / "drive"), 1000 * MOUNT_SECONDS
            # the dialog itself waits for ever: timeout_ms is for the mount that follows it
            bounded(lambda: drive.mount(mount, timeout_ms=milliseconds), MOUNT_SECONDS)
            _without = None if my_drive() else "it was mounted without MyDrive"
        except Exception as error:  # ValueError, MessageError, pexpect's: none is worth a run
            _without = reason(error).removeprefix("Error: ")
    if _without:
        print(
            f"Without Google Drive ({_without}): this run's files stay on this machine and go when "
            "its runtime does, and the other notebooks, which get machines of their own, will not "
            "find them. To have Drive: Runtime > Restart session and run all, and allow it."
        )


def without_drive() -> str | None:
    """Why this process does without Drive, if that is settled."""
    return _without
