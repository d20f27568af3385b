"""Files and folders that are there whole or not at all, and the seals by which a changed one is found."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from qlora_helpers.colab.drive import check_mounted
from qlora_helpers.errors import WorkspaceError, reason

FAILURES = (
    OSError,
    RuntimeError,
    SafetensorError,
)  # what a write that fails raises: torch.save, for one, a RuntimeError
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}
_IN_THE_WAY = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


def write_file(path: Path, data: bytes) -> None:
    """Write `path` whole or not at all: beside it first, flushed to the disk, then renamed. What fails is tried again, since on a mounted
    Drive it may pass. Raises WorkspaceError with the remedy."""
    beside = path.with_name(path.name + ".partial")

    def write():
        make_folder(path.parent)
        if os.path.isdir(beside):
            shutil.rmtree(beside)
        with open(beside, "wb") as file:
            file.write(data)

    _tried(write, path)
    put_in_place(beside, path)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it. Raises OSError if it cannot be, or if Drive has gone from under it."""
    check_mounted(
        path
    )  # a folder made there now would be on the local disk, and in the way of the next mount
    path.mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_file` of a text, in UTF-8."""
    write_file(path, text.encode())


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder of files, whole or not at all. Raises WorkspaceError if it cannot be written, OSError if it cannot be read."""
    beside = target.with_name(target.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    for path in sorted(source.iterdir()):
        write_file(beside / path.name, path.read_bytes())
    put_in_place(beside, target)


def put_in_place(beside: Path, path: Path) -> None:
    """Flush the file or folder `beside` to the disk and rename it to `path`, in place of what is there. Raises WorkspaceError."""
    for part in [*beside.iterdir(), beside] if beside.is_dir() else [beside]:
        flush(part)
    if path.is_dir() and not path.is_symlink():
        _tried(
            partial(shutil.rmtree, path), path
        )  # a rename replaces no folder that holds something
    _tried(partial(os.replace, beside, path), path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file or folder. Raises WorkspaceError."""
    _tried(partial(_flush, path), path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
            errno.ENOSYS,
        ):  # a mounted Drive may know no such thing for folders
            raise
    finally:
        os.close(descriptor)


def _tried(write: Callable[[], None], path: Path) -> None:
    for wait in (0.05, 0.5, 2, 8, None):
        try:
            return write()
        except OSError as error:
            if wait is None or error.errno in _FULL | _CLOSED | _IN_THE_WAY | {
                errno.ENOENT,
                errno.ENOTCONN,
            }:
                raise cannot_write(path, error) from error
        time.sleep(wait)


def cannot_write(path: Path, error: Exception) -> WorkspaceError:
    """The error to raise when writing `path` failed."""
    number = getattr(error, "errno", None)
    if number in _CLOSED:
        remedy = "Make its folder writable, or name another one in QLORA_WORKSPACE"
    elif number in _IN_THE_WAY:
        remedy = "Remove what stands in its place"
    else:
        remedy = (
            "Free some space there"
            if number in _FULL
            else "See that its disk, or the mounted Drive, is there and has space"
        )
    return WorkspaceError(
        f"{path} cannot be written ({reason(error)}). {remedy}; then run this notebook again."
    )


@contextlib.contextmanager
def writing(path: Path):
    """Turn whatever a library raises when it cannot write `path` into WorkspaceError with the remedy."""
    try:
        yield
    except FAILURES as error:
        raise cannot_write(path, error) from error


def read_file(path: Path) -> bytes:
    """The bytes of an ordinary file. Raises OSError as `ordinary` does, or if it cannot be read."""
    ordinary(path)
    return path.read_bytes()


def ordinary(path: Path) -> int:
    """The size of a file in bytes. Raises OSError for anything else that stands in its place: a pipe would be waited for."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(
            errno.EINVAL,
            "Is a directory" if stat.S_ISDIR(found.st_mode) else "Not an ordinary file",
        )
    return found.st_size


def sha256(path: Path) -> str:
    ordinary(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(content: dict) -> str:
    """JSON that holds `content` and the SHA-256 of it."""
    return json.dumps(content | {"seal": _seal(content)}, indent=2)


def unsealed(data: bytes) -> dict:
    """What `sealed` was given. Raises ValueError for text that is torn or was changed."""
    content = json.loads(data)
    if not isinstance(content, dict) or content.pop("seal", None) != _seal(content):
        raise ValueError("it is torn, or was changed after it was written")
    return content


def _seal(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def nearest(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that is there."""
    return next(
        path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path)
    )  # False if Drive has died
