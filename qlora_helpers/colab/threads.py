"""Threads for what may hang: calls that are given up, and jobs in the background."""

import errno
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait

from tqdm import tqdm

from qlora_helpers.errors import reason


def start(function: Callable) -> Future:
    """Call `function` in a daemon thread: an executor's would keep the process from ending."""
    future = Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def bounded(function: Callable, seconds: float, moved: Callable[[], int] = int):
    """Return what `function` returns. Raises what it raises, and TimeoutError as `follow` does."""
    future = start(function)
    follow([future], seconds, moved)
    return future.result()


def follow(futures: Iterable[Future], seconds: float, moved: Callable[[], int] = int) -> None:
    """Wait for futures. Raises TimeoutError after `seconds` in which no byte has moved.

    `moved` returns the bytes so far, which a progress bar shows.
    """
    before, since = moved(), time.monotonic()
    with tqdm(unit="B", unit_scale=True, delay=3) as bar:
        while wait(futures, min(0.5, seconds)).not_done:
            if (now := moved()) != before:
                bar.update(now - before)
                before, since = now, time.monotonic()
            elif time.monotonic() - since > seconds:
                raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:g} s")


class Background:
    """Jobs in threads, one after the other."""

    def __init__(self):
        self._newest, self._futures = {}, {}  # by key
        self._bytes = 0

    def count(self, size: int) -> None:
        """Add to the bytes that have moved."""
        self._bytes += size

    def moved(self) -> int:
        """Return the bytes that have moved."""
        return self._bytes

    def queue(self, key: str, function: Callable[..., None], *arguments) -> None:
        """Call `function` after the others, unless a newer one with the same `key` comes before.

        If the same one has not ended, it stays: a job after it may count on it.
        """
        last, job = self._futures.get(key), (function, arguments)
        if last and not last.done() and self._newest[key] == job:
            return
        before, self._newest[key] = list(self._futures.values()), job

        def run():
            wait(before)
            if self._newest[key] is job:
                function(*arguments)

        self._futures[key] = start(run)

    def failures(self) -> str:
        """Return why jobs have failed, of those that no newer one replaced."""
        errors = [future.exception() for future in self._futures.values() if future.done()]
        return "; ".join(sorted({reason(error) for error in errors if error}))

    def finish(self, seconds: float) -> str:
        """Wait until all jobs end, or no byte moves for `seconds`. Return why some failed."""
        try:
            follow(self._futures.values(), seconds, self.moved)
        except TimeoutError as error:
            return reason(error)
        return self.failures()

    def done(self, seconds: float) -> bool:
        """Return True if all jobs ended well, after waiting at most `seconds`."""
        return not wait(self._futures.values(), seconds).not_done and not self.failures()
