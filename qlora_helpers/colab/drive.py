"""Google Colab: whether this is it, and its reader's Drive, which may be refused."""

import errno
import importlib.util
import os
from pathlib import Path

from qlora_helpers.colab.machine import bounded
from qlora_helpers.config import drive_wanted
from qlora_helpers.errors import reason

CONTENT = Path("/content")  # where Colab's notebooks run
MOUNT_SECONDS = 120  # for the reader to answer, and for Drive to come
_without: str | None = None  # why this process does without Drive, once that is settled


def on_colab() -> bool:
    try:
        return CONTENT.is_dir() and importlib.util.find_spec("google.colab") is not None
    except (ImportError, ValueError):
        return False


def on_drive(path: str | os.PathLike) -> bool:
    """Whether `path` lies where Colab mounts Google Drive."""
    return Path(os.path.abspath(path)).is_relative_to(CONTENT / "drive")


def check_mounted(path: str | os.PathLike) -> None:
    """Raise OSError where Drive has gone from under `path`."""
    if on_drive(path):
        mount = CONTENT / "drive"
        root = mount.joinpath(
            *Path(os.path.abspath(path)).relative_to(mount).parts[:1]
        )  # MyDrive, or Shareddrives
        if not os.path.isdir(root):
            raise OSError(errno.ENOTCONN, f"{root.name} is no longer mounted")


def my_drive() -> Path | None:
    """The reader's Drive if it is mounted and to be used."""
    folder = CONTENT / "drive" / "MyDrive"
    return (
        folder if not _without and drive_wanted() and os.path.isdir(folder) else None
    )  # isdir: False for a mount that has died


def ask_for_drive(wanted: bool | None = None) -> None:
    """On Colab, mount Google Drive: its dialog is the reader's to accept, to decline, or to leave. Without it the local disk will do,
    with a line that says so, and why; nothing is asked twice, nor where QLORA_DRIVE, else `wanted`, says no. Raises ConfigError for
    a QLORA_DRIVE that is neither 0 nor 1."""
    global _without
    if wanted is not None:  # a form's answer: this is a new question
        _without = None
    if not on_colab() or _without or my_drive():
        return
    if not drive_wanted(wanted is not False):
        _without = "it was not wanted"
    else:
        print(
            f"Google Drive would keep this run for the other notebooks: Colab asks for it now, for {MOUNT_SECONDS} seconds. To decline, "
            'choose "No thanks"; to be asked nothing, set QLORA_DRIVE=0.',
            flush=True,
        )
        try:
            from google.colab import drive

            # the dialog itself waits for ever: timeout_ms is for the mount that follows it
            bounded(
                lambda: drive.mount(str(CONTENT / "drive"), timeout_ms=1000 * MOUNT_SECONDS),
                MOUNT_SECONDS,
            )
            _without = None if my_drive() else "it was mounted without MyDrive"
        except (
            Exception
        ) as error:  # ValueError, MessageError, NotImplementedError, pexpect's: none is worth a run
            _without = reason(error).removeprefix("Error: ")
    if _without:
        print(
            f"Without Google Drive ({_without}): this run's files stay on this machine and go when its runtime does, and the other "
            "notebooks, which get machines of their own, will not find them. To have Drive: Runtime > Restart session and run all, and "
            "allow it."
        )


def without_drive() -> str | None:
    """Why this process does without Drive, if that is settled."""
    return _without
