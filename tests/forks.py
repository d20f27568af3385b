"""Functions in forked processes, which need no ten seconds to import all packages once more."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

MOST_SECONDS = 1800  # of a forked process, so that one that hangs ends, also on a busy machine


def start(function: Callable[[], object], log: Path) -> int:
    """Fork a process that calls `function` and prints to the file `log`, and return its id.

    Its exit code is 1 after an exception, what `function` returns if that is a number, else 0.
    """
    if torch.cuda.is_initialized():
        pytest.skip("a process that has used a GPU cannot be forked")
    if pid := os.fork():
        return pid
    code = 1
    try:
        signal.alarm(MOST_SECONDS)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)  # pytest has replaced both
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        answer = function()
        sys.stdout.flush()
        code = answer if isinstance(answer, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def changes_a_file(event: str, arguments: tuple) -> bool:
    """Return whether an audit event opens a file to write, or renames, removes or makes one."""
    if event == "open":
        return isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
    return event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def run(function: Callable[[], object], log: Path) -> tuple[int, str]:
    """Call `function` as `start` does; return the exit code of its process and what it printed."""
    _, status = os.waitpid(start(function, log), 0)
    return os.waitstatus_to_exitcode(status), log.read_text()
