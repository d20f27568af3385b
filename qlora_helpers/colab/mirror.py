"""The copy of a run on Google Drive: an archive for each publication and for each checkpoint.

`03_qlora_training-0002-1f0c63a9d2b7.tar` holds what the second training published. An archive is
written under another name, flushed and renamed: it is there whole or not at all. If Drive damages
it, the one before is taken. All publications stay, and the newest two checkpoints.

Which publication is newer does not depend on a clock: a manifest names the versions it replaces.
Only threads touch Drive, and none is waited for when no byte moves: Drive may hang for hours.
"""

import contextlib
import functools
import os
import re
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from qlora_helpers.colab.threads import Background, bounded
from qlora_helpers.errors import reason
from qlora_helpers.run.checkpoints import prune
from qlora_helpers.run.files import DAMAGE, put_in_place, write_text, writing
from qlora_helpers.run.manifest import read_archive, sealed, version_of, write_archive
from qlora_helpers.run.workspace import Workspace

SECONDS = 120  # without a byte: Drive hangs
_NAME = re.compile(r"(\w+)-(\d+)(-\w+)?\.tar")  # a notebook or "checkpoint", and a number


@functools.cache
def _jobs(folder: Path) -> Background:
    """Return the jobs of this process for a folder, which no two threads write to."""
    return Background()


class Mirror:
    """A run's copy in the folder qlora_ag_news/`name` of `drive`, where Drive is mounted."""

    def __init__(self, drive: Path, name: str):
        self.drive, self.folder = drive, drive / "qlora_ag_news" / name
        self.unread: str | None = None  # why `pull` could not read it
        self._jobs, self._said = _jobs(self.folder), ""
        self.done = self._jobs.done

    def push(self, key: str, name: str, root: Path, manifest: dict) -> None:
        """Write the archive `name` of the files that `manifest` names in `root`, in the background.
        It replaces a push with the same `key` that still waits. Prints why earlier ones failed."""
        failures = self._jobs.failures()
        if failures not in ("", self._said):
            self._say(failures)
        self._jobs.queue(key, self._push, name, root, manifest)

    def wait(self) -> None:
        """Wait until all is on Drive, or Drive hangs, and print how it ended."""
        if failures := self._jobs.finish(SECONDS):
            self._say(failures)
        else:
            print(f"On Google Drive: {self.folder.relative_to(self.drive.parent)}")

    def _say(self, why: str) -> None:
        self._said = why
        print(
            f"Google Drive does not take this run ({why}). The run goes on, and is whole on this "
            "machine's own disk, which goes with the runtime. Make room on Drive, or mount it "
            "again; then run a cell with workspace.push()."
        )

    def clear_checkpoints(self) -> None:
        """Remove the checkpoints in the background, if all that was pushed before is on Drive."""
        self._jobs.queue("checkpoint", self._clear_checkpoints)

    def _clear_checkpoints(self) -> None:
        if not self._jobs.failures():
            prune(self.folder, -1)

    def pull(self, workspace: Workspace) -> None:
        """Bring to `workspace` what is newer here, and the histories of earlier trainings."""
        with self._reading(workspace.path) as temporary:
            archives = self._archives()
            for notebook in sorted(archives.keys() - {"checkpoint"}):
                mine = workspace.read(notebook)
                wanted = partial(_wanted, mine)
                if theirs := self._extract(archives[notebook], temporary, wanted):
                    _adopt(workspace, mine, *theirs)
            self._pull_earlier(workspace, archives.get("03_qlora_training", []), temporary)

    def _pull_earlier(self, workspace: Workspace, names: list[str], temporary: Path) -> None:
        current, history = workspace.read("03_qlora_training"), "training.json"
        for name in names:
            version = Path(name).stem
            fingerprint = version.rpartition("-")[2]
            here = any((workspace / "earlier").glob(f"*-{fingerprint}/{history}"))
            if here or (current and current["fingerprint"].startswith(fingerprint)):
                continue
            if theirs := self._extract([name], temporary, lambda manifest: [history]):
                workspace.write(f"earlier/{version}/{history}", (theirs[1] / history).read_bytes())

    def bring_checkpoint(self, folder: Path) -> None:
        """Bring the newest whole checkpoint to `folder`, if there is one."""
        with self._reading(folder.parent) as temporary:
            if theirs := self._extract(self._archives().get("checkpoint", []), temporary):
                folder.mkdir(exist_ok=True)
                put_in_place(theirs[1], folder / theirs[1].stem)

    @contextlib.contextmanager
    def _reading(self, folder: Path):
        """A context with a temporary folder in `folder`, which prints a line if Drive fails."""
        try:
            # of this read alone: a thread that was given up may still write there
            with TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as name:
                yield Path(name)
        except OSError as error:
            self.unread = reason(error)
            print(
                f"Google Drive cannot be read ({self.unread}). Nothing there is changed, and this "
                "run goes on with what is on this machine."
            )

    def _archives(self) -> dict[str, list[str]]:
        """Return the names of the archives by notebook, or "checkpoint", the newest first."""

        def names():
            os.stat(self.drive)  # raises OSError if it is no longer mounted
            return os.listdir(self.folder) if self.folder.is_dir() else []

        archives = {}
        matches = filter(None, map(_NAME.fullmatch, self._call(names)))
        for match in sorted(matches, key=lambda match: (int(match[2]), match[0]), reverse=True):
            archives.setdefault(match[1], []).append(match[0])
        return archives

    def _extract(self, names: list[str], folder: Path, *select) -> tuple[dict, Path] | None:
        """Return the manifest of the first whole archive, and the folder with its files."""
        for name in names:
            read = partial(read_archive, self.folder / name, self._jobs.count, folder / name)
            try:
                return self._call(partial(read, *select)), folder / name
            except OSError:
                raise
            except DAMAGE as error:
                print(f"{name} on Google Drive is not complete ({reason(error)}): skipped.")
        return None

    def _call(self, function):
        return bounded(function, SECONDS, self._jobs.moved)

    def _push(self, name: str, root: Path, manifest: dict) -> None:
        path, count = self.folder / f"{name}.tar", self._jobs.count
        with contextlib.suppress(*DAMAGE):
            if read_archive(path, count) == manifest:
                return
        for folder in (self.folder.parent, self.folder):  # never the one where Drive is mounted
            folder.mkdir(exist_ok=True)
        unfinished = self.folder / f"{name}.partial"
        try:
            write_archive(unfinished, root, manifest, count)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        if name.startswith("checkpoint-"):
            prune(self.folder, manifest["step"])


def _wanted(mine: dict | None, theirs: dict) -> list[str]:
    """Return the files of a manifest on Drive, if it replaces the one here."""
    replaces = mine is None or version_of(mine) in theirs["replaces"]
    return list(theirs["files"]) if replaces else []


def _adopt(workspace: Workspace, mine: dict | None, theirs: dict, extracted: Path) -> None:
    """Put in place what replaces the work here. Work that was done here without knowing of
    `theirs` is kept, and replaces it from now on."""
    path = workspace.manifest_path(theirs["notebook"])
    if _wanted(mine, theirs):
        with writing(path):
            for name in theirs["files"]:
                (workspace / name).parent.mkdir(parents=True, exist_ok=True)
                put_in_place(extracted / name, workspace / name)
        write_text(path, sealed(theirs))
    elif version_of(theirs) not in (version_of(mine), *mine["replaces"]):
        known = {*mine["replaces"], version_of(mine), *theirs["replaces"], version_of(theirs)}
        write_text(path, sealed(mine | {"replaces": sorted(known)}))
