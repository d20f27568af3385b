"""A folder whose files are whole, to which one process at a time writes, and which leaves Google Drive when that fails."""

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from qlora_helpers.colab.drive import on_drive
from qlora_helpers.config import project_folder
from qlora_helpers.errors import WorkspaceError
from qlora_helpers.run.drive_copy import DriveCopy, copy_back, drive_failure, within_drives_time
from qlora_helpers.run.files import make_folder, write_file, writing
from qlora_helpers.run.lock import Lock


class RunFolder:
    """The folder `path`. On Google Drive, a write that fails moves it to the machine's own disk, where the run goes on."""

    def __init__(self, path: Path):
        self.path, self._lock = path, Lock(path)
        self._copy = DriveCopy(path) if on_drive(path) else None
        self._left = None  # the folder on Drive that it was moved from

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:  # short where it can be, and then the same on every machine
        return (
            os.path.relpath(self.path, project_folder())
            if self.path.is_relative_to(project_folder())
            else str(self.path)
        )

    def write(self, name: str, data: bytes | str) -> None:
        """Write the file `name`, whole or not at all. Raises WorkspaceError if it cannot be, or if another process is writing here."""
        data = data.encode() if isinstance(data, str) else data
        with self.hold(name):
            self.despite_drive(
                lambda: within_drives_time(self.path, partial(write_file, self / name, data))
            )
            self.keep(name, data)

    @contextlib.contextmanager
    def hold(self, purpose: str):
        """A context in which no other process writes here. Raises WorkspaceError if one does already, which it names."""
        if self._copy:
            self.despite_drive(self._make_folder)
        with self._lock.hold(purpose):
            yield

    def despite_drive(self, write: Callable):
        """What `write` returns; if Google Drive fails it, what it does when called again, once the run has moved to this machine's disk."""
        before = self.path
        try:
            return write()
        except (OSError, WorkspaceError) as error:
            if self.path == before:
                failure = self._copy and drive_failure(before, error)
                if not failure:
                    raise
                self._leave_drive(failure)
            return write()

    def keep(self, name: str, data: bytes | None = None) -> None:
        """On Google Drive, keep the file `name` on this machine's disk as well: Drive may go away before it is needed."""
        if self._copy:
            self._copy.add(name, data)

    def _make_folder(self) -> None:
        with writing(self.path):
            make_folder(self.path)

    def _leave_drive(self, failure: str) -> None:
        left, folder = self.path, self._copy.take_over()
        self.path, self._left, self._copy = folder, left, None
        self._lock.move(folder)
        os.environ["QLORA_WORKSPACE"] = str(
            folder
        )  # what is run again in this kernel goes on there
        print(
            f"Google Drive cannot be written ({failure}). From here on the run is in {self}, on this machine's own disk, and goes "
            "when its runtime does; what was on Drive is still there. Make room on Drive, or mount it again, and before the runtime ends "
            f"bring the run back, in a cell: {copy_back(folder, left)}"
        )
