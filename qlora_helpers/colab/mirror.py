"""The copy of a run on Google Drive.

Each publication and each checkpoint gets a folder of its own, which nothing changes afterwards:
`03_qlora_training/0002-1f0c63a9d2b7/` has the files of the second training, and its manifest, which
is written last. A folder without one, or whose files differ from it, is passed over for the one
before. So a copy that breaks off at any instant leaves the older or the newer work, whole. Older
publications stay; of checkpoints the newest two do.

Drive may hang, for hours. Only threads touch it, and nothing waits for one that moves no byte.
"""

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from qlora_helpers.colab.threads import Background, start
from qlora_helpers.errors import WorkspaceError, reason
from qlora_helpers.run.checkpoints import prune
from qlora_helpers.run.exchange import adopt, adopt_earlier
from qlora_helpers.run.files import (
    DAMAGE,
    ordinary,
    put_in_place,
    read_manifest,
    sealed,
    write_text,
)
from qlora_helpers.run.workspace import Workspace

SECONDS = 120  # without a byte: Drive hangs


class Mirror:
    """A run's copy in the folder qlora_ag_news/`name` of `drive`, which is where Drive is
    mounted."""

    def __init__(self, drive: Path, name: str):
        self.drive, self.folder = drive, drive / "qlora_ag_news" / name
        self.unread: str | None = None  # why `pull` could not read it
        self._background = Background(_say)

    def push(self, key: str, entry: str, root: Path, manifest: dict) -> None:
        """Copy the files that `manifest` names from `root` to the folder `entry`, in the
        background. This replaces what waits under the same `key`."""
        self._background.queue(key, partial(self._copy_out, entry, root, manifest))

    def clear(self, group: str) -> None:
        """Remove the folder `group` in the background, once all that was pushed is on Drive."""
        self._background.queue(group, partial(self._remove, group))

    def done(self, seconds: float) -> bool:
        """True if all is on Drive, after waiting for it at most so long."""
        return self._background.done(seconds)

    def wait(self) -> None:
        """Wait until all is on Drive, or it hangs, and say how it ended."""
        self._background.finish(SECONDS)
        if failed := self._background.failed:
            _say("; ".join(sorted(set(failed.values()))))
        else:
            print(f"On Google Drive: {self.folder.relative_to(self.drive.parent)}")

    def pull(self, workspace: Workspace) -> None:
        """Have `workspace` adopt what each notebook published here. A line says so if Drive cannot
        be read."""
        try:
            for notebook in self._names(""):
                if notebook != "checkpoints":
                    self._pull(workspace, notebook)
        except OSError as error:
            self.unread = reason(error)
            print(
                f"Google Drive cannot be read ({self.unread}): what is there stays there, and "
                f"this run goes on with what is in {workspace}."
            )

    def _pull(self, workspace: Workspace, notebook: str) -> None:
        newest = True
        for entry, manifest, skipping in self._entries(notebook):
            with skipping:
                if newest:
                    adopt(workspace, manifest, partial(self._fetch, entry, manifest["files"]))
                    newest = False
                if "training.json" not in manifest["files"]:
                    return
                # an earlier training is there to be compared with: its adapter stays on Drive
                fetch = partial(self._fetch, entry, ["training.json"])
                adopt_earlier(workspace, manifest, entry.replace("/", "-"), fetch)

    def bring(self, group: str, folder: Path) -> bool:
        """Bring the newest whole entry of `group` to a folder inside `folder`. False if there is
        none; a line says so if Drive cannot be read."""
        try:
            for entry, manifest, skipping in self._entries(group):
                beside = folder / f"{Path(entry).name}.{_unique()}"
                with skipping:
                    self._fetch(entry, manifest["files"], beside)
                    write_text(beside / "manifest.json", sealed(manifest))
                    put_in_place(beside, folder / Path(entry).name)
                    return True
                shutil.rmtree(beside, ignore_errors=True)
        except OSError as error:
            print(f"Google Drive cannot be read ({reason(error)}): no {group} come from there.")
        return False

    # what touches Drive, in threads alone

    def _names(self, group: str) -> list[str]:
        """The folders in `group`, the highest number first."""

        def names():
            self._check_mounted()
            with contextlib.suppress(FileNotFoundError):
                return [path.name for path in (self.folder / group).iterdir() if path.is_dir()]
            return []

        found = [name for name in self._call(names) if not name.endswith(".partial")]
        return sorted(found, key=lambda n: (int(re.search(r"\d+|$", n)[0] or 0), n), reverse=True)

    def _entries(self, group: str) -> Iterator[tuple]:
        """Each entry of `group` with its manifest, the newest first, and a context that leaves it
        with a line if it is not whole."""
        for name in self._names(group):
            entry = f"{group}/{name}"
            with self._skipping(entry):
                manifest = self._call(read_manifest, self.folder / entry / "manifest.json")
                yield entry, manifest, self._skipping(entry)

    def _fetch(self, entry: str, names: Iterable[str], folder: Path) -> None:
        """Bring files of `entry` to `folder`. Raises OSError or ValueError for one that is not what
        the manifest names."""

        def fetch():
            manifest = read_manifest(self.folder / entry / "manifest.json")
            for name in names:
                self._copy(self.folder / entry / name, folder / name, manifest["files"][name])

        self._call(fetch)

    def _copy_out(self, entry: str, root: Path, manifest: dict) -> None:
        self._check_mounted()
        folder, old = self.folder / entry, None
        with contextlib.suppress(*DAMAGE):
            old = read_manifest(folder / "manifest.json")
        if old and old["files"] != manifest["files"]:
            shutil.rmtree(folder)  # a checkpoint of another training
            old = None
        if not old or not self._is_there(folder, root, manifest):
            try:
                for name, digest in manifest["files"].items():
                    self._copy(root / name, folder / name, digest)
            except DAMAGE as error:
                if old and isinstance(error, ValueError):
                    return  # it is on Drive; here something newer is being written
                if not old:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            if not self._is_there(folder, root, manifest):
                raise OSError(errno.EIO, f"{entry} has lost a file")
        if old != manifest:
            self._write(io.BytesIO(sealed(manifest).encode()), folder / "manifest.json")
        if entry.startswith("checkpoints/"):
            prune(folder.parent, manifest["step"])

    def _is_there(self, folder: Path, root: Path, manifest: dict) -> bool:
        sizes = {name: ordinary(root / name) for name in manifest["files"]}
        return all(
            (folder / name).is_file() and ordinary(folder / name) == size
            for name, size in sizes.items()
        )

    def _remove(self, group: str) -> None:
        if not self._background.failed.keys() - {group}:
            shutil.rmtree(self.folder / group, ignore_errors=True)

    def _copy(self, source: Path, target: Path, digest: str | None = None) -> None:
        ordinary(source)
        with open(source, "rb") as file:
            self._write(file, target, digest)

    def _write(self, source: BinaryIO, target: Path, digest: str | None = None) -> None:
        """Write `target`, whole or not at all. Raises ValueError, and leaves what is there, if what
        comes has not the SHA-256 `digest`."""
        self._make_folder(target.parent)
        beside, found = target.with_name(f"{target.name}.{_unique()}"), hashlib.sha256()
        try:
            with open(beside, "wb") as file:
                while chunk := source.read(2**20):
                    file.write(chunk)
                    found.update(chunk)
                    self._background.moved += len(chunk)
                file.flush()
                os.fsync(file.fileno())
            if digest and found.hexdigest() != digest:
                raise ValueError(f"{target.name} is not what its manifest names")
            os.replace(beside, target)
        except (OSError, ValueError):
            with contextlib.suppress(OSError):
                beside.unlink()
            raise

    def _make_folder(self, folder: Path) -> None:
        """Make `folder`, but never the place where Drive is mounted: the next mount needs it."""
        if not folder.is_relative_to(self.drive):
            folder.mkdir(parents=True, exist_ok=True)
            return
        path = self.drive
        for part in folder.relative_to(self.drive).parts:
            path = path / part
            with contextlib.suppress(FileExistsError):
                path.mkdir()

    def _check_mounted(self) -> None:
        if not os.path.isdir(self.drive):  # False for a mount that has died, too
            raise ConnectionError(errno.ENOTCONN, f"{self.drive.name} is no longer mounted")

    def _call(self, function: Callable, *arguments):
        """What `function` returns, called in a thread. Raises TimeoutError if Drive hangs,
        ConnectionError if it is gone, and what `function` raises."""

        def call():
            try:
                return function(*arguments)
            except DAMAGE:
                self._check_mounted()
                raise

        return self._background.follow(start(call), SECONDS)

    @contextlib.contextmanager
    def _skipping(self, entry: str):
        """A context that an entry which is not whole leaves with a line."""
        try:
            yield
        except (TimeoutError, ConnectionError, WorkspaceError):
            raise
        except DAMAGE as error:
            missing = isinstance(error, FileNotFoundError) and Path(error.filename).name
            if missing != "manifest.json":  # else it is on its way, or broke off
                print(f"{entry} on Google Drive is not complete ({reason(error)}): skipped.")


def _say(why: str) -> None:
    print(
        f"Google Drive does not take this run ({why}). It goes on, whole on this machine's own "
        "disk, which goes with the runtime. Make room on Drive, or mount it again; then run a cell "
        "with workspace.push()."
    )


def _unique() -> str:
    return f"{uuid.uuid4().hex[:8]}.partial"
