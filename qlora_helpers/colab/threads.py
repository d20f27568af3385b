"""Threads for what may hang: a wait that ends, and work in the background."""

import errno
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial

from tqdm import tqdm

from qlora_helpers.errors import reason


def start(function: Callable) -> Future:
    """Run `function` in a thread that nothing waits for in the end: a Future's own pool would keep
    the process from ending."""
    future = Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def bounded(function: Callable, seconds: float):
    """What `function` returns or raises. Raises TimeoutError after `seconds`; what it does
    meanwhile is then left to itself."""
    future = start(function)
    try:
        return future.result(seconds)
    except TimeoutError as error:
        if future.done():  # its own
            raise
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:g} s") from error


class Background:
    """Jobs in a thread, one after the other.

    Args:
        say: is called with the reason why a job failed, once for each new reason.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say, self.moved = say, 0  # bytes, which the jobs count
        self.failed: dict[str, str] = {}  # the reason, by the key of the job
        self._jobs: dict[str, Callable[[], None]] = {}  # to do, in order
        self._lock, self._worker, self._said = threading.Lock(), None, ""

    def queue(self, key: str, job: Callable[[], None]) -> None:
        """Do `job` after those that wait, and instead of one that waits under the same `key`."""
        with self._lock:
            self._jobs.pop(key, None)
            self._jobs[key] = job
            if self._worker is None:
                self.failed.pop("", None)
                self._worker = Future()  # it is there before the thread asks whose turn it is
                start(partial(self._work, self._worker))

    def done(self, seconds: float) -> bool:
        """True if all jobs are done and none failed, after waiting for them at most so long."""
        if worker := self._worker:
            wait([worker], seconds)
        return self._worker is None and not self.failed

    def finish(self, seconds: float) -> None:
        """Wait until all jobs are done, or for `seconds` no byte moves. One that hangs is then left
        to itself, and counts as failed."""
        try:
            if worker := self._worker:
                self.follow(worker, seconds)
        except TimeoutError as error:
            with self._lock:
                self._worker = None
                self.failed[""] = reason(error)

    def follow(self, future: Future, seconds: float):
        """The result of `future`, with a bar if it takes long. Raises TimeoutError if for `seconds`
        no byte moves."""
        moved, since = self.moved, time.monotonic()
        with tqdm(unit="B", unit_scale=True, delay=3) as bar:
            while not future.done():
                wait([future], 0.5)
                if self.moved != moved:
                    bar.update(self.moved - moved)
                    moved, since = self.moved, time.monotonic()
                elif time.monotonic() - since > seconds and not future.done():
                    raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:g} s")
        return future.result()

    def _work(self, me: Future) -> None:
        while True:
            with self._lock:
                if self._worker is me and not self._jobs:
                    self._worker = None
                if self._worker is not me:
                    break
                key = next(iter(self._jobs))
                job = self._jobs.pop(key)
            try:
                job()
                failure = ""
            except Exception as error:  # the next job must have its turn
                failure = reason(error)
            with self._lock:
                if self._worker is not me or key in self._jobs:
                    continue  # it is left to itself, or there is a newer one
                self.failed.pop(key, None)
                if failure:
                    self.failed[key] = failure
            if failure and failure != self._said:
                self._said = failure
                self.say(failure)
        me.set_result(None)
