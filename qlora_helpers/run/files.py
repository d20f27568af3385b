"""Files that are there whole or not at all, and manifests that say what a whole set of files is.

A manifest is a JSON file that is written last. It holds the SHA-256 of each file that it names, and
a seal: the SHA-256 of its own content. What is torn or was changed afterwards is found by either.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError

from qlora_helpers.errors import WorkspaceError, reason

# what a write that fails raises: torch.save, for one, a RuntimeError
FAILURES = (OSError, RuntimeError, SafetensorError)
# what reading a damaged file raises
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}
_IN_THE_WAY = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
_digests: dict[tuple[int, ...], str] = {}  # see sha256


def write_file(path: Path, data: bytes) -> None:
    """Write `path`: beside it first, flushed to the disk, then renamed. Raises WorkspaceError."""
    beside = path.with_name(path.name + ".partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(beside)
        beside.write_bytes(data)
        put_in_place(beside, path)


def write_text(path: Path, text: str) -> None:
    """`write_file` of a text, in UTF-8."""
    write_file(path, text.encode())


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder of files, whole or not at all. Raises OSError."""
    beside = target.with_name(target.name + ".partial")
    remove(beside)
    beside.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, beside / path.name)
    put_in_place(beside, target)


def put_in_place(beside: Path, path: Path) -> None:
    """Flush the file or folder `beside` to the disk and rename it to `path`, in place of what is
    there. Raises OSError."""
    for part in [*beside.iterdir(), beside] if beside.is_dir() else [beside]:
        flush(part)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)  # a rename replaces no folder that holds something
    os.replace(beside, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file or folder. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that it holds, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def cannot_write(path: Path, error: Exception) -> WorkspaceError:
    """The error to raise when writing `path` failed."""
    number = getattr(error, "errno", None)
    remedy = "See that its disk is there and has space"
    if number in _FULL:
        remedy = "Free some space there"
    elif number in _CLOSED:
        remedy = "Make its folder writable, or name another one in QLORA_WORKSPACE"
    elif number in _IN_THE_WAY:
        remedy = "Remove what stands in its place"
    return WorkspaceError(
        f"{path} cannot be written ({reason(error)}). {remedy}; then run this notebook again."
    )


@contextlib.contextmanager
def writing(path: Path):
    """Turn whatever a library raises when it cannot write `path` into WorkspaceError with the
    remedy."""
    try:
        yield
    except FAILURES as error:
        raise cannot_write(path, error) from error


def read_file(path: Path) -> bytes:
    """The bytes of an ordinary file. Raises OSError as `ordinary` does, or if it cannot be read."""
    ordinary(path)
    return path.read_bytes()


def ordinary(path: Path) -> int:
    """The size of a file in bytes. Raises OSError for anything else that stands in its place: a
    pipe would be waited for."""
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        folder = stat.S_ISDIR(facts.st_mode)
        what = "Is a directory" if folder else "Not an ordinary file"
        raise OSError(errno.EINVAL, what, str(path))
    return facts.st_size


def sha256(path: Path) -> str:
    """The SHA-256 of an ordinary file, read once in a process while it does not change."""
    ordinary(path)
    facts = os.stat(path)
    key = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    if key not in _digests:
        settled = time.time_ns() - facts.st_mtime_ns > 10**8  # a file system's clock ticks in ms
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not settled:
            return digest
        _digests[key] = digest
    return _digests[key]


def manifest_of(root: Path, names: Iterable[str], **content) -> dict:
    """A manifest: `content`, and the SHA-256 of each of the files `names` of the folder `root`,
    which are flushed to the disk. Raises OSError for one that cannot be read."""
    files = {}
    for name in names:
        files[name] = sha256(root / name)
        flush(root / name)
    return content | {"files": files, "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def sealed(manifest: dict) -> str:
    """The text of a manifest."""
    return json.dumps(manifest | {"seal": _seal(manifest)}, indent=2)


def read_manifest(path: Path) -> dict:
    """The manifest in a file. Raises OSError, or ValueError if it is torn or was changed."""
    manifest = json.loads(read_file(path))
    if not isinstance(manifest, dict) or manifest.pop("seal", None) != _seal(manifest):
        raise ValueError("it is torn, or was changed after it was written")
    return manifest


def check_files(manifest: dict, root: Path) -> None:
    """Raise OSError or ValueError unless `root` holds the files that `manifest` names,
    unchanged."""
    for name, digest in manifest["files"].items():
        if sha256(root / name) != digest:
            raise ValueError(f"{name} is not what its manifest names")


def _seal(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def nearest(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that is there."""
    folders = (folder.absolute(), *folder.absolute().parents)
    return next(path for path in folders if os.path.exists(path))
