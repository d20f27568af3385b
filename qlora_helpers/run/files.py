"""Files that are written whole or not at all."""

import contextlib
import errno
import functools
import hashlib
import os
import shutil
import stat
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from qlora_helpers.errors import ModelError, WorkspaceError, reason

# what a failed write raises: torch.save, for one, a RuntimeError
FAILURES = (OSError, RuntimeError, SafetensorError)
# what reading damaged content raises, and with OSError what reading a damaged file raises
_CONTENT = (ValueError, LookupError, TypeError, AttributeError, RecursionError, tarfile.TarError)
DAMAGE = (OSError, *_CONTENT)
_LARGEST, _LARGEST_TEXT = 2**34, 2**26  # in bytes: a sparse file can claim any size


def write_file(path: Path, data: bytes) -> None:
    """Write `path` whole or not at all. Raises WorkspaceError."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        partial.write_bytes(data)
        put_in_place(partial, path)


def write_text(path: Path, text: str) -> None:
    """Write `path` in UTF-8, whole or not at all. Raises WorkspaceError."""
    write_file(path, text.encode())


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder of files, whole or not at all. Raises OSError."""
    partial = target.with_name(target.name + ".partial")
    remove(partial)
    shutil.copytree(source, partial, copy_function=shutil.copyfile)
    put_in_place(partial, target)


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder, which becomes `folder` at the end of the block, whole or not at all.

    Raises ModelError if `folder` is there already, WorkspaceError if it cannot be written.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise ModelError(f"{folder} is there already: delete it, or name another folder.")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            partial = Path(temporary) / folder.name
            partial.mkdir()
            yield partial
            os.replace(partial, folder)


def put_in_place(partial: Path, path: Path) -> None:
    """Flush a file or folder to the disk and rename it to `path`, replacing what is there."""
    for file in partial.iterdir() if partial.is_dir() else [partial]:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    if path.is_dir():
        remove(path)  # os.replace replaces no folder that holds something
    os.replace(partial, path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that it holds, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path):
    """Turn what a library raises when it cannot write `path` into a WorkspaceError."""
    try:
        yield
    except FAILURES as error:
        raise WorkspaceError(
            f"{path} cannot be written ({reason(error)}). Free some space there, or name another "
            "folder in QLORA_WORKSPACE; then run this notebook again."
        ) from error


def ordinary(path: Path, largest: int = _LARGEST) -> int:
    """Return the size of a file in bytes. Raises OSError unless it is an ordinary file of at most
    `largest` bytes: reading a pipe would never end."""
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EINVAL, "Not an ordinary file", str(path))
    if facts.st_size > largest:
        raise OSError(errno.EFBIG, f"{path.name} is longer than {largest:,} bytes", str(path))
    return facts.st_size


def read_file(path: Path, largest: int = _LARGEST_TEXT) -> bytes:
    """Return the bytes of an ordinary file of at most `largest` bytes. Raises OSError."""
    ordinary(path, largest)
    return path.read_bytes()


def sha256(path: Path) -> str:
    """Return the SHA-256 of an ordinary file, not of one that a link names. A file that does not
    change is read once. Raises OSError."""
    if path.is_symlink():
        raise OSError(errno.EINVAL, "Not an ordinary file", str(path))
    ordinary(path)
    facts = os.stat(path)
    # file systems count time in milliseconds: another change at this moment would not show
    settled = time.time_ns() - facts.st_mtime_ns > 10**8
    read = _sha256 if settled else _sha256.__wrapped__
    return read(path, facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@functools.cache
def _sha256(path: Path, *facts: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def nearest(folder: Path) -> Path:
    """Return `folder`, or the nearest folder above it that exists."""
    folders = (folder.absolute(), *folder.absolute().parents)
    return next(path for path in folders if os.path.exists(path))
