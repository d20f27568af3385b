"""A stand-in for the package of Kaggle's runtimes. FAKE_SECRET: missing, or `is VALUE`."""

import os


class BackendError(Exception):
    pass


class UserSecretsClient:
    def get_secret(self, label):
        behaviour = os.environ.get("FAKE_SECRET", "missing")
        if behaviour.startswith("is "):
            return behaviour[3:]
        raise BackendError("No user secrets exist for kernel id 1 and label HF_TOKEN.")
