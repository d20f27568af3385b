"""What a workspace gives to its mirror and takes from it.

A run lives on the machine's own disk. The mirror, Google Drive's on Colab, holds a copy of what
each notebook published. Which of two manifests of a notebook is the newer one does not depend on a
clock: a manifest names the versions that it replaces, in `replaces`. The mirror's replaces the one
here only if it names that one. A copy that is older, half-pushed, or was made without knowing of
the work here never does.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from qlora_helpers.run.files import (
    DAMAGE,
    put_in_place,
    read_manifest,
    sealed,
    write_text,
    writing,
)


def version_of(manifest: dict) -> str:
    """The version of a manifest: how many there are with those before it, and what it names."""
    return f"{len(manifest['replaces']) + 1:04d}-{manifest['fingerprint'][:12]}"


def entry_of(manifest: dict) -> str:
    """The mirror's folder for what a manifest names."""
    return f"{manifest['notebook']}/{version_of(manifest)}"


def push_all(workspace) -> None:
    """Have the mirror copy what it lacks of what was published or set aside in `workspace`."""
    for path in sorted((workspace / "manifests").glob("*.json")):
        if manifest := workspace.read(path.stem):
            workspace.mirror.push(path.stem, entry_of(manifest), workspace.path, manifest)
    for path in sorted((workspace / "earlier").glob("*/manifest.json")):
        with contextlib.suppress(*DAMAGE):
            manifest, entry = read_manifest(path), entry_of(read_manifest(path))
            if all((path.parent / name).exists() for name in manifest["files"]):
                workspace.mirror.push(entry, entry, path.parent, manifest)


def adopt(workspace, theirs: dict, fetch: Callable[[Path], None]) -> None:
    """Put in place what `fetch` brings to a folder, which `theirs`, a manifest of the mirror,
    names, if that replaces what is here. Work that was done here without knowing of it is kept and
    replaces it: its manifest then names `theirs`."""
    mine, path = workspace.read(theirs["notebook"]), workspace.manifest_path(theirs["notebook"])
    if mine and mine["fingerprint"] == theirs["fingerprint"]:  # the same work
        if len(mine["replaces"]) < len(theirs["replaces"]):
            write_text(path, sealed(theirs))
        return
    if mine and version_of(mine) not in theirs["replaces"]:
        if version_of(theirs) not in mine["replaces"]:
            known = [*theirs["replaces"], version_of(theirs)]
            mine["replaces"] = known + [one for one in mine["replaces"] if one not in known]
            write_text(path, sealed(mine))
        return
    with _fetched(workspace, fetch) as folder, writing(path):
        if mine:
            workspace.set_aside(theirs["notebook"], list(mine["files"]))
        for name in theirs["files"]:
            (workspace / name).parent.mkdir(parents=True, exist_ok=True)
            put_in_place(folder / name, workspace / name)
        write_text(path, sealed(theirs))


def adopt_earlier(workspace, theirs: dict, name: str, fetch: Callable[[Path], None]) -> None:
    """Put in earlier/ what `fetch` brings of an earlier work of the mirror, whose manifest is
    `theirs`, as the folder `name`, unless it is here."""
    earlier, line = workspace / "earlier", f'"fingerprint": "{theirs["fingerprint"]}"'
    here = [*earlier.glob("*/manifest.json"), *(workspace / "manifests").glob("*.json")]
    if not any(line in path.read_text("utf-8", "replace") for path in here):
        with _fetched(workspace, fetch) as folder, writing(earlier / name):
            write_text(folder / "manifest.json", sealed(theirs))
            earlier.mkdir(exist_ok=True)
            put_in_place(folder, earlier / name)


@contextlib.contextmanager
def _fetched(workspace, fetch: Callable[[Path], None]):
    # a folder of its own: a call that hung, and was given up, may go on to write there
    folder = Path(tempfile.mkdtemp(prefix=".pulled-", dir=workspace.path))
    try:
        fetch(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
