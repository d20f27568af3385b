"""Whether this machine is Google Colab's, and waits that end."""

import errno
import importlib.util
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

CONTENT = Path("/content")  # where Colab's notebooks run


def on_colab() -> bool:
    """True on a Colab machine."""
    try:
        return CONTENT.is_dir() and importlib.util.find_spec("google.colab") is not None
    except (ImportError, ValueError):
        return False


def start(function: Callable) -> Future:
    """Run `function` in a thread that nothing waits for in the end: a Future's own pool would keep the process from ending."""
    future = Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def bounded(function: Callable, seconds: float):
    """What `function` returns or raises. Raises TimeoutError after `seconds`; what it does meanwhile is then left to itself."""
    future = start(function)
    try:
        return future.result(seconds)
    except TimeoutError as error:
        if future.done():  # its own
            raise
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:g} s") from error
