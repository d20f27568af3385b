"""The hub's token: a secret of Colab or Kaggle, the environment's or the stored one."""

import os
from dataclasses import dataclass

from huggingface_hub import get_token
from huggingface_hub.utils import _auth

from qlora_helpers.colab.machine import machine_name, on_colab, on_kaggle
from qlora_helpers.config import AG_NEWS, EMBEDDED_MODEL, RunConfig
from qlora_helpers.errors import reason

_found: "Token | None" = None  # of this process


@dataclass(frozen=True)
class Token:
    """Where the token comes from, what is known of the secret, and the remedy if it failed."""

    source: str | None = None
    note: str = ""
    remedy: str = ""

    @property
    def warning(self) -> bool:
        return bool(self.remedy)


def use_token(config: RunConfig, again: bool = False) -> Token:
    """Put the token into HF_TOKEN, where the hub's libraries look, and return where it comes from.

    The secret is asked for once a process (unless `again`), and only for a run that needs the hub.
    """
    global _found
    own_model = config.base_model == EMBEDDED_MODEL or os.path.isdir(config.base_model)
    if own_model and config.data != AG_NEWS:
        return Token(note="not needed")
    if _found is None or again:
        secret, note, remedy = _secret() if on_colab() or on_kaggle() else (None, "", "")
        source = "the stored login" if get_token() else None
        if os.environ.get("HF_TOKEN"):
            source = "HF_TOKEN in the environment"
        if secret:
            os.environ["HF_TOKEN"], source = secret, f"{machine_name()}'s secret HF_TOKEN"
        _found = Token(source, note, remedy)
        if remedy and not again:  # the doctor shows it itself
            print(f"{note} {remedy}")
    return _found


def _secret() -> tuple[str | None, str, str]:
    """Return the secret HF_TOKEN, what to say if there is none, and the remedy if that is a
    failure. Colab answers the main thread alone, within 10 seconds."""
    secret, remedy, place = None, "", machine_name()
    try:
        if on_kaggle():
            from kaggle_secrets import UserSecretsClient

            secret = UserSecretsClient().get_secret("HF_TOKEN")
        else:
            from google.colab import userdata

            secret = userdata.get("HF_TOKEN")
        secret = (secret or "").strip() or None
        note = "" if secret else f"{place}'s secret HF_TOKEN is empty."
    except Exception as error:
        notes = {
            "SecretNotFoundError": "Colab has no secret HF_TOKEN.",
            "NotebookAccessError": "This notebook may not read Colab's secret HF_TOKEN.",
            "BackendError": "Kaggle has no secret HF_TOKEN for this notebook.",
        }
        note = notes.get(type(error).__name__, "")
        if not note:
            why = reason(error).rstrip(".")
            note = f"{place}'s secret HF_TOKEN did not come ({why}): going on without it."
            where = "Add-ons > Secrets" if on_kaggle() else "the key in Colab's left margin"
            remedy = (
                f"If the base model asks for a token: {where}, add HF_TOKEN, "
                "allow this notebook to read it, then restart the session and run all."
            )
    # huggingface_hub would ask Colab again, and wait for ever if the first question hangs
    _auth._IS_GOOGLE_COLAB_CHECKED, _auth._GOOGLE_COLAB_SECRET = True, secret
    return secret, note, remedy
