"""Manifests, which say what a set of files is, and archives, in which the set travels.

A manifest is a JSON file that is written after the files that it names. It holds their SHA-256, and
a seal, the SHA-256 of its own content, so that any later change is noticed. An archive is a tar
file without compression: a manifest, then its files.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from tqdm.utils import CallbackIOWrapper

from qlora_helpers.run.files import ordinary, read_file, sha256

_LARGEST = 2**26  # bytes of a manifest in an archive, which may claim any size
_CHECKPOINT = {"files": dict, "written": str, "step": int, "identity": dict, "facts": dict}
_PUBLICATION = {"files": dict, "written": str, "notebook": str, "fingerprint": str}
_PUBLICATION |= {"config": dict, "inputs": dict, "replaces": list}


def manifest_of(root: Path, names: Iterable[str], **content) -> dict:
    """Return the manifest of the files `names` in `root`, with `content`. Raises OSError."""
    written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return content | {"files": {name: sha256(root / name) for name in names}, "written": written}


def version_of(manifest: dict) -> str:
    """Return the version of a publication: a number that counts up, and what it holds."""
    return f"{len(manifest['replaces']) + 1:04d}-{manifest['fingerprint'][:12]}"


def digest_of(content: dict) -> str:
    """Return the SHA-256 of a dict that can be written as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(manifest: dict) -> str:
    """Return the text of a manifest."""
    return json.dumps(manifest | {"seal": digest_of(manifest)}, indent=2)


def read_manifest(source: Path | bytes) -> dict:
    """Return the manifest in a file or in its bytes. Raises OSError or ValueError."""
    manifest = json.loads(source if isinstance(source, bytes) else read_file(source))
    if not isinstance(manifest, dict) or manifest.pop("seal", None) != digest_of(manifest):
        raise ValueError("it is torn, or was changed after it was written")
    _check_form(manifest)
    return manifest


def _check_form(manifest: dict) -> None:
    """Raise ValueError unless a manifest holds what ours do. Its names become paths: none may lead
    out of its folder. The seal does not tell who wrote it."""
    for name, kind in (_CHECKPOINT if "step" in manifest else _PUBLICATION).items():
        if type(manifest.get(name)) is not kind:
            raise ValueError(f"its {name} is not a {kind.__name__}")
    for name in manifest["files"]:
        path = PurePosixPath(name)
        if "\0" in name or not path.parts or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"its files name {name!r}, which is not inside its folder")
    if "step" in manifest:
        return
    if not all(isinstance(version, str) for version in manifest["replaces"]):
        raise ValueError("its replaces are not all versions")
    if not re.fullmatch("[0-9a-f]{64}", manifest["fingerprint"]):
        raise ValueError("its fingerprint is not a SHA-256")
    if not re.fullmatch(r"\w+", manifest["notebook"]):
        raise ValueError("its notebook is not the name of one")
    for name in manifest["inputs"]:
        # checking an input checks its own ones: this would not end, were one not earlier
        if not re.fullmatch(r"\w+", name) or name >= manifest["notebook"]:
            raise ValueError(f"its inputs name {name!r}, which is no earlier notebook")


def check_files(files: dict[str, str], root: Path) -> None:
    """Raise OSError or ValueError unless the files in `root` have these SHA-256."""
    for name, digest in files.items():
        if sha256(root / name) != digest:
            raise ValueError(f"{name} is not what its manifest names")


def write_archive(path: Path, root: Path, manifest: dict, count: Callable[[int], None]) -> None:
    """Write an archive of the files that `manifest` names in `root`, and flush it to the disk.

    `count` gets the size of each piece. Raises OSError, or ValueError if a file has changed.
    """
    text = sealed(manifest).encode()
    head = tarfile.TarInfo("manifest.json")
    head.size = len(text)
    with open(path, "wb") as file:
        with tarfile.open(fileobj=CallbackIOWrapper(count, file, "write"), mode="w") as tar:
            tar.addfile(head, io.BytesIO(text))
            for name in manifest["files"]:
                tar.add(root / name, name)
        file.flush()
        os.fsync(file.fileno())
    check_files(manifest["files"], root)


def read_archive(
    path: Path,
    count: Callable[[int], None],
    folder: Path | None = None,
    select: Callable[[dict], Iterable[str]] = lambda manifest: manifest["files"],
) -> dict:
    """Return the manifest of an archive. It and the files that `select` chooses go to `folder`.

    Raises OSError if the archive cannot be read, another of `files.DAMAGE` if it is damaged.
    """
    ordinary(path)
    with contextlib.ExitStack() as stack:
        file = CallbackIOWrapper(count, stack.enter_context(open(path, "rb")))
        tar = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
        manifest = read_manifest(tar.extractfile("manifest.json").read(_LARGEST))
        if folder and (names := select(manifest)):
            members = [tar.getmember(name) for name in ["manifest.json", *names]]
            tar.extractall(folder, members, filter="data")
            check_files({name: manifest["files"][name] for name in names}, folder)
    return manifest
