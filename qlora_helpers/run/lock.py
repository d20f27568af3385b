"""The lock of a run's folder, and what that folder may not hold."""

import contextlib
import os
import time
from pathlib import Path

from filelock import FileLock, Timeout

from qlora_helpers.errors import WorkspaceError
from qlora_helpers.run.files import remove, writing


class Lock:
    """Keeps other processes from writing to a run's folder."""

    def __init__(self, folder: Path):
        self.folder, self.path, self.note = folder, folder / ".lock", folder / ".lock.txt"
        self._lock = FileLock(self.path, timeout=0)

    @contextlib.contextmanager
    def hold(self, purpose: str):
        """Return a context in which no other process writes here; it may be nested. Raises
        WorkspaceError that names the process which does."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            refuse_links(self.folder)
            if self.path.is_symlink() or not self.path.is_file():
                remove(self.path)
            try:
                held = self._lock.acquire()
            except Timeout:
                raise WorkspaceError(
                    f"another notebook is writing to {self.folder} ({self._holder()}). Nothing was "
                    "written. Wait for it, or stop it; then run this notebook again."
                ) from None
        with held:
            if self._lock.lock_counter == 1:
                since = time.strftime("%H:%M:%S UTC", time.gmtime())
                with contextlib.suppress(OSError):  # the note is not worth an error
                    remove(self.note)
                    self.note.write_text(f"{purpose}, process {os.getpid()}, since {since}")
            number = self._number()
            yield
            if self._number() != number:
                print(
                    f"{self.path} was deleted while {purpose} wrote here. If another notebook "
                    "wrote meanwhile, run this one again from its start."
                )

    def _holder(self) -> str:
        return self.note.read_text("utf-8", "replace") if self.note.is_file() else "not known which"

    def _number(self) -> int | None:
        """Return the number of the file that is locked; None if it was deleted."""
        return self.path.lstat().st_ino if os.path.lexists(self.path) else None


def refuse_links(folder: Path) -> None:
    """Raise WorkspaceError if a run's folder holds a link to another folder."""
    for path in [*folder.glob("*"), *folder.glob("earlier/*")]:
        if path.is_symlink() and path.is_dir():
            raise WorkspaceError(
                f"{path} is a link to another folder, where a run does not write. Delete it; then "
                "run this notebook again."
            )


def refuse_foreign(folder: Path) -> None:
    """Raise WorkspaceError if a folder holds something, and neither a lock nor a manifest."""
    # an executed notebook may come before the first lock; hidden files are never touched
    names = {path.name for path in folder.glob("[!.]*")} - {"notebooks"}
    is_run = os.path.lexists(folder / ".lock.txt") or any(folder.glob("manifests/0*.json"))
    if names and not is_run:
        raise WorkspaceError(
            f"{folder} is the folder of no run, and holds {', '.join(sorted(names)[:3])}. Nothing "
            "was written. Name a new folder in QLORA_WORKSPACE; then run this notebook again."
        )
