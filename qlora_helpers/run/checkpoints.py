"""Checkpoints that are complete or absent: each holds all that a training goes on from, under a manifest that is written last."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from qlora_helpers.colab.drive import on_drive
from qlora_helpers.errors import WorkspaceError
from qlora_helpers.run.drive_copy import within_drives_time
from qlora_helpers.run.files import (
    FAILURES,
    copy_folder,
    put_in_place,
    read_file,
    reason,
    sealed,
    sha256,
    unsealed,
    write_text,
    writing,
)

_FAR = ("fuse", "nfs", "cifs", "smb")  # file systems that may be slow, or away for a while
KEPT = 2  # the one before, for a disk that does not keep what it was given


class Checkpoints:
    """The checkpoints of the training that `identity` describes, by its `settings` and its `data`.

    They are written to `folder`; where that lies on a mounted Drive or another far disk, to the machine's own, and copied from there in
    a thread of their own, so that training does not wait for a slow folder. The newest complete one of both places is gone on from."""

    def __init__(self, folder: str | os.PathLike, identity: dict):
        folder = Path(folder)
        self.identity, self.kept = json.loads(json.dumps(identity)), folder
        self.folder, self.copies = folder, None
        if _is_far(folder):
            self.folder = (
                Path(tempfile.gettempdir())
                / f"qlora_checkpoints_{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
            )
            self.copies = _Copies(folder)
        self.step = None  # of the newest one written

    def newest(self) -> tuple[Path, dict] | None:
        """The newest complete checkpoint and its manifest; None without one. Each torn one is skipped with a line that says so.
        Raises WorkspaceError if it is of a training with other settings, which it names."""
        folders = dict.fromkeys((self.folder, self.kept))
        for path in [
            path for folder in folders for path in _inside(folder) if path.name.endswith(".partial")
        ]:
            print(f"{path} was not finished when the run that wrote it ended: skipped.")
        found = [
            (number, path.parent == self.folder, path)
            for folder in folders
            for number, path in _numbered(folder)
        ]
        for step, _, path in sorted(found, reverse=True):
            try:
                manifest = _checked(path)
                self._compare(manifest["identity"], path)
                if path.parent != self.folder:
                    copy_folder(path, self.folder / path.name)
                    path = self.folder / path.name
                    _checked(path)
            except WorkspaceError:
                raise
            except (
                OSError,
                ValueError,
                LookupError,
                TypeError,
                AttributeError,
                RecursionError,
            ) as error:
                print(f"{path} is not complete ({reason(error)}): skipped.")
                continue
            self.step = step
            return path, manifest
        return None

    def write(self, step: int, fill: Callable[[Path], None], **facts) -> bool:
        """Have `fill` write its files to a folder, and keep it as the checkpoint of `step` with `facts` in its manifest. False, with a
        line that says why, if it cannot be written: those before are as they were."""
        path = self.folder / f"checkpoint-{step}"
        beside = path.with_name(path.name + ".partial")
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            fill(beside)
            files = {part.name: sha256(part) for part in sorted(beside.iterdir())}
            manifest = {
                "identity": self.identity,
                "step": step,
                "files": files,
                **facts,
                "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            write_text(beside / "manifest.json", sealed(manifest))
            put_in_place(beside, path)
        except (*FAILURES, WorkspaceError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            last = "none before it" if self.step is None else f"the one of step {self.step} is kept"
            print(
                f"The checkpoint of step {step} cannot be written ({reason(error.__cause__ or error)}); {last}. Training goes on; "
                f"meanwhile free some space, or see what is wrong, in {self.folder.parent}."
            )
            return False
        self.step = step
        _prune(self.folder, step)
        if self.copies:
            self.copies.copy(path)
        return True

    def prepare(self) -> None:
        """Raise WorkspaceError now, not after hours of training, if nothing can be written here. Of a Drive a line says so: it may be
        full or gone at any time, and the checkpoints are on this machine first."""
        for folder in {self.folder, self.kept}:
            note = "Checkpoints of a training that is not finished. To start it over, delete this folder.\n"
            try:
                with writing(folder):
                    within_drives_time(folder, partial(write_text, folder / "note.txt", note))
            except WorkspaceError as error:
                if not on_drive(folder):
                    raise
                print(
                    f"Google Drive takes no checkpoints ({reason(error.__cause__ or error)}): they stay on this machine, in "
                    f"{self.folder}, and go when its runtime does."
                )

    def copied(self, seconds: float) -> bool:
        """True if the newest checkpoint is where it is to be kept, after waiting for it at most so long."""
        return self.copies is None or self.copies.wait(seconds)

    def finish(self) -> None:
        """Remove them all: the training is published."""
        if self.copies:
            self.copies.close()
        for folder in {self.folder, self.kept}:
            with contextlib.suppress(OSError):  # of a Drive that hangs, or has gone
                within_drives_time(folder, partial(shutil.rmtree, folder, ignore_errors=True))

    def _compare(self, found: dict, path: Path) -> None:
        if found == self.identity:
            return
        old, new = found["settings"], self.identity["settings"]
        fields = "; ".join(
            f"{name} was {old.get(name)!r} and is now {new.get(name)!r}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        )
        folders = " and ".join(
            str(folder) for folder in dict.fromkeys((self.folder, self.kept)) if folder.exists()
        )
        raise WorkspaceError(
            f"{path} is of an unfinished training with other {'settings' if fields else 'data'}: "
            f"{fields or 'the rows of subset/ have changed since'}. Set them back, from notebooks/01_setup.ipynb on, "
            f"and it goes on; to train with the new ones, delete {folders}."
        )


def _is_far(folder: Path) -> bool:
    if on_drive(folder):
        return True
    with contextlib.suppress(OSError):
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        found = [
            (len(where), kind)
            for _, where, kind, *_ in mounts
            if Path(os.path.realpath(folder)).is_relative_to(where)
        ]
        return max(found)[1].startswith(_FAR) and "overlay" not in max(found)[1]
    return False


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        print(f"{folder} cannot be read ({reason(error)}): a checkpoint in it is not seen.")
        return []


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in _inside(folder)]
    return [(int(match[1]), path) for match, path in named if match]


def _checked(path: Path) -> dict:
    """The manifest of a checkpoint that holds the files it names, unchanged, and no other. Raises OSError or ValueError otherwise."""
    manifest = unsealed(read_file(path / "manifest.json"))
    for name, digest in manifest["files"].items():
        if sha256(path / name) != digest:
            raise ValueError(f"{name} is not what its manifest names")
    if (
        extra := {part.name for part in path.iterdir()}
        - manifest["files"].keys()
        - {"manifest.json"}
    ):
        raise ValueError(f"its manifest does not name {min(extra)}")
    return manifest


def _prune(folder: Path, step: int) -> None:
    """Keep the newest ones up to `step`: what has a higher number was torn, and what is partial was left by a run that ended."""
    kept = sorted((number for number, _ in _numbered(folder) if number <= step), reverse=True)[
        :KEPT
    ]
    for path in _inside(folder):
        if path.name.startswith("checkpoint-") and path.name not in {
            f"checkpoint-{number}" for number in kept
        }:
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):  # one that is a file
                path.unlink()


class _Copies:
    """Copies of the newest checkpoint in a slow folder, made in the background; one that fails is tried again with the next."""

    def __init__(self, folder: Path):
        self.folder, self._next, self._done, self._closed = folder, None, True, False
        self._lock, self._idle = threading.Lock(), threading.Event()
        self._idle.set()

    def copy(self, path: Path) -> None:
        with self._lock:
            self._next = path
            if self._idle.is_set():
                self._idle.clear()
                threading.Thread(target=self._run, daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """True if the newest one is copied within `seconds`."""
        return self._idle.wait(seconds) and self._done

    def close(self) -> None:
        """Make no more copies. One that hangs in the folder is waited for half a minute, and removed when it is through."""
        self._closed = True
        self._idle.wait(30)

    def _run(self) -> None:
        while True:
            with self._lock:
                path, self._next = self._next, None
                if path is None or self._closed:
                    if self._closed:
                        shutil.rmtree(self.folder, ignore_errors=True)
                    self._idle.set()
                    return
            try:
                copy_folder(path, self.folder / path.name)
                self._done = True
                _prune(self.folder, int(path.name.partition("-")[2]))
            except (OSError, WorkspaceError) as error:
                self._done = False
                if (
                    self._next is None and not self._closed
                ):  # else a newer one is there, and this one may be gone
                    print(f"{path.name} was not copied: {error} It is still in {path.parent}.")
