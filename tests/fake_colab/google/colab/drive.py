"""FAKE_DRIVE: allowed (the default), declined, failed, unsupported, hangs (until the file
FAKE_DRIVE_ANSWER is there), or empty (mounted, without MyDrive). FAKE_DRIVE_FOLDER is what the
reader's Drive holds."""

import os
import time

from google.colab import _message

asked = []  # the mount points


def mount(mountpoint, force_remount=False, timeout_ms=120000, readonly=False):
    asked.append(mountpoint)
    behaviour = os.environ.get("FAKE_DRIVE", "allowed")
    if behaviour == "declined":
        raise _message.MessageError("Error: credential propagation was unsuccessful")
    if behaviour == "failed":
        raise ValueError("mount failed: timeout during initial read of root folder")
    if behaviour == "unsupported":
        raise NotImplementedError("google.colab.drive is unsupported in this environment.")
    if behaviour == "hangs":  # the dialog stays open: timeout_ms is not for it
        end = time.monotonic() + 300
        while not os.path.exists(os.environ["FAKE_DRIVE_ANSWER"]) and time.monotonic() < end:
            time.sleep(0.02)
    os.makedirs(mountpoint)
    if behaviour != "empty":
        os.symlink(os.environ["FAKE_DRIVE_FOLDER"], os.path.join(mountpoint, "MyDrive"))
    print(f"Mounted at {mountpoint}")


def flush_and_unmount(timeout_ms=24 * 60 * 60 * 1000):
    """Nothing to flush."""
