"""Checkpoints that are whole or absent: each holds the state of a training under a manifest."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from qlora_helpers.errors import WorkspaceError, reason
from qlora_helpers.run.files import DAMAGE, FAILURES, put_in_place, remove, write_text
from qlora_helpers.run.manifest import check_files, manifest_of, read_manifest, sealed

KEPT = 2  # the one before the newest, in case that is damaged
_NAME = re.compile(r"checkpoint-(\d+)(\.tar)?(\.partial)?")
_NOTE = "note.txt"  # marks the folder as ours


class Checkpoints:
    """The checkpoints of a training, each of which is copied to the mirror in the background.

    Args:
        folder: where they are written, on the machine's own disk.
        hold: returns a context in which no other process writes there.
        mirror: see `qlora_helpers.colab.mirror`.
    """

    def __init__(self, folder: Path, hold: Callable = contextlib.nullcontext, mirror=None):
        self.folder, self.hold, self.mirror = folder, hold, mirror
        self.identity = {}
        self.step = None  # of the newest one

    def newest(self, identity: dict) -> tuple[Path, dict] | None:
        """Return the newest whole checkpoint, here or else in the mirror, and its manifest.

        Each damaged one is skipped with a line. Raises WorkspaceError that names what differs, if
        it is of a training with another `identity`: its `settings` and its `data`.
        """
        self.identity = json.loads(json.dumps(identity))
        newest = self._newest()
        if newest is None and self.mirror:
            self.mirror.bring_checkpoint(self.folder)
            newest = self._newest()
        return newest

    def _newest(self) -> tuple[Path, dict] | None:
        for step, path in reversed(_numbered(self.folder)):
            try:
                manifest = read_manifest(path / "manifest.json")
                check_files(manifest["files"], path)
                stored, known = manifest["identity"], {"manifest.json", *manifest["files"]}
                settings = dict(stored["settings"])
                if manifest["step"] != step:
                    raise ValueError(f"its manifest is that of step {manifest['step']}")
                if extra := {part.name for part in path.iterdir()} - known:
                    raise ValueError(f"its manifest does not name {min(extra)}")
            except DAMAGE as error:
                print(f"{path} is not complete ({reason(error)}): skipped.")
                continue
            if stored != self.identity:
                raise self._other_training(path, settings)
            self.step = step
            return path, manifest
        return None

    def _other_training(self, path: Path, old: dict) -> WorkspaceError:
        new = self.identity["settings"]
        changed = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
        fields = [f"{name} was {old.get(name)!r} and is now {new.get(name)!r}" for name in changed]
        what = "settings" if fields else "data"
        why = "; ".join(fields) or "the rows of subset/ have changed since"
        mirrored = f" and {self.mirror.folder}/checkpoint-*.tar" if self.mirror else ""
        return WorkspaceError(
            f"{path} is of an unfinished training with other {what}: {why}. Set them back, from "
            "notebooks/01_setup.ipynb on, and it goes on; to train with the new ones, delete "
            f"{self.folder}{mirrored}."
        )

    def write(self, step: int, fill: Callable[[Path], None], **facts) -> bool:
        """Write the checkpoint of `step`, whole or not at all. Returns False, with a line that says
        why, if it cannot be written. `fill` writes its files to a folder; `facts` go into its
        manifest."""
        path = self.folder / f"checkpoint-{step}"
        partial = path.with_name(path.name + ".partial")
        try:
            remove(partial)
            partial.mkdir(parents=True)
            fill(partial)
            names = sorted(part.name for part in partial.iterdir())
            manifest = manifest_of(partial, names, identity=self.identity, step=step, **facts)
            write_text(partial / "manifest.json", sealed(manifest))
            put_in_place(partial, path)
        except (*FAILURES, WorkspaceError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            kept = "none before it" if self.step is None else f"the one of step {self.step} is kept"
            print(
                f"The checkpoint of step {step} cannot be written "
                f"({reason(error.__cause__ or error)}); {kept}. Training goes on; meanwhile free "
                f"some space, or see what is wrong, in {self.folder.parent}."
            )
            return False
        self.step = step
        prune(self.folder, step)
        if self.mirror:
            self.mirror.push("checkpoint", path.name, path, manifest)
        return True

    def prepare(self) -> None:
        """Raise WorkspaceError now, not after hours of training, if nothing can be written here, or
        if something else is here."""
        if foreign := self._foreign():
            raise WorkspaceError(
                f"{foreign} is not of this run, which keeps its checkpoints there. Nothing was "
                "changed. Move it elsewhere; then run this notebook again."
            )
        note = "The checkpoints of an unfinished training. To start it over, delete this folder.\n"
        write_text(self.folder / _NOTE, note)

    def _foreign(self) -> Path | None:
        """Return what is in the folder and not of a training, unless the folder has our note."""
        if os.path.lexists(self.folder / _NOTE):
            return None
        for path in self.folder.glob("*"):
            name = _NAME.fullmatch(path.name)
            is_ours = name and (name[3] or os.path.lexists(path / "manifest.json"))
            if not is_ours and not path.name.startswith(_NOTE):
                return path
        return None

    def copied(self, seconds: float) -> bool:
        """Return True if there is no mirror, or within `seconds` it has all checkpoints."""
        return self.mirror is None or self.mirror.done(seconds)

    def finish(self) -> None:
        """Remove them all, here and, once what was published is there, from the mirror. Something
        else that is here stays."""
        if not self._foreign():
            prune(self.folder, -1)
            with contextlib.suppress(OSError):
                remove(self.folder / _NOTE)
                self.folder.rmdir()
        if self.mirror:
            self.mirror.clear_checkpoints()


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    named = [(_NAME.fullmatch(path.name), path) for path in folder.glob("*")]
    return sorted((int(name[1]), path) for name, path in named if name and not name[3])


def prune(folder: Path, step: int) -> None:
    """Keep the newest checkpoints up to `step`. Remove older ones, later ones, which were damaged,
    and partial ones of a run that was killed."""
    kept = [path for number, path in _numbered(folder) if number <= step][-KEPT:]
    for path in folder.glob("checkpoint-*"):
        if path not in kept and _NAME.fullmatch(path.name):
            with contextlib.suppress(OSError):
                remove(path)
