"""What a run on Google Drive goes on from when Drive is full, slow or gone."""

import contextlib
import errno
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from qlora_helpers.colab.drive import check_mounted, on_drive
from qlora_helpers.colab.machine import bounded
from qlora_helpers.config import project_folder
from qlora_helpers.errors import WorkspaceError, reason
from qlora_helpers.run.files import read_file, write_file

_NOT_OF_DRIVE = {
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.EINVAL,
}  # of what stands there, or does not
DRIVE_SECONDS = 300  # for one file; an adapter has 84 MB


def within_drives_time(path: Path, write: Callable[[], None]) -> None:
    """`write()`, which writes `path`. On Drive it may hang: raises TimeoutError then."""
    if on_drive(path):
        bounded(write, DRIVE_SECONDS)
    else:
        write()


def drive_failure(path: Path, error: Exception) -> str | None:
    """What `error` says of Drive, where `path` lies; None if it is no failure of Drive's, but of what stands in the place of a file."""
    with_cause = error if isinstance(error, OSError) else error.__cause__
    try:
        check_mounted(path)
    except OSError as gone:
        return reason(gone)
    return (
        reason(with_cause)
        if isinstance(with_cause, OSError) and with_cause.errno not in _NOT_OF_DRIVE
        else None
    )


class DriveCopy:
    """A copy, on the machine's own disk, of what a notebook reads from and writes to its run on Drive."""

    def __init__(self, run: Path):
        self.run, self._folder = run, None

    def add(self, name: str, data: bytes | None = None) -> None:
        """Keep the file `name` of the run: `data`, or what is on Drive. What cannot be read is left out."""
        with contextlib.suppress(OSError, WorkspaceError):
            write_file(self._kept() / name, read_file(self.run / name) if data is None else data)

    def take_over(self) -> Path:
        """A new folder on the machine's own disk that holds all that was kept, and what else can be read on Drive now, but for
        checkpoints, which are written here first. Raises WorkspaceError if it cannot be written."""
        with contextlib.suppress(TimeoutError):
            bounded(self._read_the_rest, DRIVE_SECONDS)
        runs = project_folder() / "runs"
        names = (f"{self.run.name}-off-drive" + (f"-{i}" if i else "") for i in range(1000))
        folder = next(path for path in map(runs.joinpath, names) if not path.exists())
        folder.mkdir(parents=True)
        for path in sorted(path for path in self._kept().rglob("*") if path.is_file()):
            write_file(folder / path.relative_to(self._kept()), path.read_bytes())
        shutil.rmtree(self._kept(), ignore_errors=True)
        return folder

    def _read_the_rest(self) -> None:
        for folder, folders, files in os.walk(self.run):  # which passes over what it cannot list
            folders[:] = [
                name for name in folders if name != "checkpoints" and not name.endswith(".partial")
            ]
            for name in (os.path.relpath(os.path.join(folder, file), self.run) for file in files):
                if not name.endswith((".partial", ".lock")) and not (self._kept() / name).exists():
                    self.add(name)

    def _kept(self) -> Path:
        if self._folder is None:
            Path(tempfile.gettempdir()).mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="qlora_drive_"))
        return self._folder


def copy_back(folder: Path, run: Path) -> str:
    """The cell that brings a run back to Drive."""
    return f"!cp -r {shlex.quote(os.path.abspath(folder))}/. {shlex.quote(str(run))}/"
