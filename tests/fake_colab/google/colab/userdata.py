"""FAKE_SECRET: missing (the default), forbidden, late, or `is VALUE`."""

import os

from google.colab import errors

asked = []  # the names of the secrets


class NotebookAccessError(Exception):
    def __init__(self, key):
        super().__init__(f"Notebook does not have access to secret {key}")


class SecretNotFoundError(errors.Error):
    def __init__(self, key):
        super().__init__(f"Secret {key} does not exist.")


class TimeoutException(errors.Error):
    def __init__(self, key):
        super().__init__(
            f"Requesting secret {key} timed out. Secrets can only be fetched when running from the "
            "Colab UI."
        )


def get(key):
    asked.append(key)
    behaviour = os.environ.get("FAKE_SECRET", "missing")
    if behaviour.startswith("is "):
        return behaviour[3:]
    raise {
        "missing": SecretNotFoundError,
        "forbidden": NotebookAccessError,
        "late": TimeoutException,
    }[behaviour](key)
