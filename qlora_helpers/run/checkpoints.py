"""Checkpoints that are complete or absent: each holds all that a training goes on from, under a
manifest that is written last."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from qlora_helpers.errors import WorkspaceError, reason
from qlora_helpers.run.files import (
    DAMAGE,
    FAILURES,
    check_files,
    manifest_of,
    put_in_place,
    read_manifest,
    remove,
    sealed,
    write_text,
    writing,
)

KEPT = 2  # the one before, for a disk that does not keep what it was given


class Checkpoints:
    """The checkpoints of a training, in a folder of the machine's own disk.

    Each is copied to the mirror in the background, if there is one. On a machine that has none, the
    mirror's newest complete one is gone on from.

    Args:
        folder: where they are written.
        hold: returns a context in which no other process writes there.
        mirror: see `qlora_helpers.colab.mirror`.
    """

    def __init__(self, folder: Path, hold: Callable = contextlib.nullcontext, mirror=None):
        self.folder, self.hold, self.mirror = folder, hold, mirror
        self.identity = {}  # what `newest` was asked for
        self.step = None  # of the newest one written

    def newest(self, identity: dict) -> tuple[Path, dict] | None:
        """The newest complete checkpoint and its manifest; None without one.

        Each torn one is skipped with a line that says so. Raises WorkspaceError, which names what
        differs, if it is of a training with another `identity`: its `settings` and its `data`.
        """
        self.identity = json.loads(json.dumps(identity))
        for path in sorted(self.folder.glob("*.partial")):
            print(f"{path} was not finished when the run that wrote it ended: skipped.")
        found = self._newest()
        if not found and self.mirror and self.mirror.bring("checkpoints", self.folder):
            found = self._newest()
        return found

    def _newest(self) -> tuple[Path, dict] | None:
        for step, path in sorted(numbered(self.folder), reverse=True):
            try:
                manifest = _checked(path)
                self._compare(manifest["identity"], path)
            except WorkspaceError:
                raise
            except DAMAGE as error:
                print(f"{path} is not complete ({reason(error)}): skipped.")
                continue
            self.step = step
            return path, manifest
        return None

    def write(self, step: int, fill: Callable[[Path], None], **facts) -> bool:
        """Have `fill` write its files to a folder, and keep it as the checkpoint of `step` with
        `facts` in its manifest. False, with a line that says why, if it cannot be written: those
        before are as they were."""
        path = self.folder / f"checkpoint-{step}"
        beside = path.with_name(path.name + ".partial")
        try:
            remove(beside)
            beside.mkdir(parents=True)
            fill(beside)
            names = sorted(part.name for part in beside.iterdir())
            manifest = manifest_of(beside, names, identity=self.identity, step=step, **facts)
            write_text(beside / "manifest.json", sealed(manifest))
            put_in_place(beside, path)
        except (*FAILURES, WorkspaceError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            last = "none before it" if self.step is None else f"the one of step {self.step} is kept"
            print(
                f"The checkpoint of step {step} cannot be written "
                f"({reason(error.__cause__ or error)}); {last}. Training goes on; meanwhile free "
                f"some space, or see what is wrong, in {self.folder.parent}."
            )
            return False
        self.step = step
        prune(self.folder, step)
        if self.mirror:
            self.mirror.push("checkpoints", f"checkpoints/{path.name}", path, manifest)
        return True

    def prepare(self) -> None:
        """Raise WorkspaceError now, not after hours of training, if nothing can be written here."""
        note = "The checkpoints of an unfinished training. To start it over, delete this folder.\n"
        with writing(self.folder):
            write_text(self.folder / "note.txt", note)

    def copied(self, seconds: float) -> bool:
        """True if the mirror has them, after waiting for that at most so long."""
        return self.mirror is None or self.mirror.done(seconds)

    def finish(self) -> None:
        """Remove them all, here and, once what was published is there, on the mirror."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.mirror:
            self.mirror.clear("checkpoints")

    def _compare(self, found: dict, path: Path) -> None:
        if found == self.identity:
            return
        old, new = found["settings"], self.identity["settings"]
        fields = "; ".join(
            f"{name} was {old.get(name)!r} and is now {new.get(name)!r}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        )
        folders = [str(self.folder)]
        if self.mirror:
            folders.append(str(self.mirror.folder / "checkpoints"))
        raise WorkspaceError(
            f"{path} is of an unfinished training with other {'settings' if fields else 'data'}: "
            f"{fields or 'the rows of subset/ have changed since'}. Set them back, from "
            f"notebooks/01_setup.ipynb on, and it goes on; to train with the new ones, delete "
            f"{' and '.join(folders)}."
        )


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """The step and the path of each checkpoint in `folder`, complete or not."""
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("*")]
    return [(int(match[1]), path) for match, path in named if match]


def _checked(path: Path) -> dict:
    """The manifest of a checkpoint that holds the files it names, unchanged, and no other. Raises
    OSError or ValueError otherwise."""
    manifest = read_manifest(path / "manifest.json")
    check_files(manifest, path)
    extra = {part.name for part in path.iterdir()} - manifest["files"].keys() - {"manifest.json"}
    if extra:
        raise ValueError(f"its manifest does not name {min(extra)}")
    return manifest


def prune(folder: Path, step: int) -> None:
    """Keep the newest ones up to `step`: what has a higher number was torn, and what is partial was
    left by a run that ended."""
    steps = sorted((number for number, _ in numbered(folder) if number <= step), reverse=True)
    kept = {f"checkpoint-{number}" for number in steps[:KEPT]}
    for path in folder.glob("checkpoint-*"):
        if path.name not in kept:
            with contextlib.suppress(OSError):
                remove(path)
