"""One process at a time writes to a folder."""

import contextlib
import fcntl
import os
import time
from pathlib import Path

from qlora_helpers.errors import WorkspaceError
from qlora_helpers.run.files import cannot_write, reason


class Lock:
    """The kernel's lock on a file in `folder`: it goes with the process that holds it, however that ends. Where files cannot be locked
    (on a mounted Drive, which besides knows nothing of other machines' locks) a line says so, and nothing is held."""

    def __init__(self, folder: Path):
        self.folder, self._file, self._depth = folder, None, 0

    @contextlib.contextmanager
    def hold(self, purpose: str):
        """Hold it, if need be within a `hold` of this object. Raises WorkspaceError, with the holder's `purpose`, while another does."""
        if not self._depth:
            self._file = self._locked(purpose)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth and self._file is not None:
                os.close(self._file)
                self._file = None

    def move(self, folder: Path) -> None:
        """Hold it in another folder from now on. Raises what `hold` raises."""
        self.folder, left = folder, self._file
        if self._depth:
            self._file = self._locked("moved here")
            if left is not None:
                with contextlib.suppress(OSError):  # the disk it was on may be gone
                    os.close(left)

    def _locked(self, purpose: str) -> int | None:
        file = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = os.open(
                self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            )
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):  # a full disk: it is locked without a name
                os.ftruncate(file, 0)
                os.write(
                    file,
                    f"{purpose}, process {os.getpid()}, since {time.strftime('%H:%M:%S UTC', time.gmtime())}".encode(),
                )
        except BlockingIOError:
            holder = os.read(file, 200).decode(errors="replace")
            os.close(file)
            raise WorkspaceError(
                f"another notebook is writing to {self.folder} ({holder}). Nothing was written. Wait for it, or stop it; "
                "then run this notebook again."
            ) from None
        except OSError as error:
            if not self.folder.is_dir():
                raise cannot_write(self.folder, error) from error
            print(
                f"{self.folder}/.lock cannot be locked ({reason(error)}): see that no other notebook writes there meanwhile."
            )
        return file
