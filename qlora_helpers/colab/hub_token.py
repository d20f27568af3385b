"""The hub's token: Colab's secret, the environment's or the stored one; never shown or written."""

import os
from dataclasses import dataclass

from huggingface_hub import get_token
from huggingface_hub.utils import _auth

from qlora_helpers.colab.machine import on_colab
from qlora_helpers.colab.threads import bounded
from qlora_helpers.config import AG_NEWS, EMBEDDED_MODEL, RunConfig
from qlora_helpers.errors import reason

SECRET_SECONDS = 20  # for Colab to answer: it may show a dialog of its own
_found: "Token | None" = None  # of this process


@dataclass(frozen=True)
class Token:
    """Where the token comes from, what is known of Colab's secret, and the remedy if it failed."""

    source: str | None = None
    note: str = ""
    remedy: str = ""

    @property
    def warning(self) -> bool:
        return bool(self.remedy)


def use_token(config: RunConfig, again: bool = False) -> Token:
    """Put the token into HF_TOKEN, where the hub's libraries look, and return where it comes from.

    Colab is asked once a process (unless `again`), and only for a run that needs the hub.
    """
    global _found
    own_model = config.base_model == EMBEDDED_MODEL or os.path.isdir(config.base_model)
    if own_model and config.data != AG_NEWS:
        return Token(note="not needed")
    if _found is None or again:
        secret, note, remedy = _colab_secret() if on_colab() else (None, "", "")
        source = "the stored login" if get_token() else None
        if os.environ.get("HF_TOKEN"):
            source = "HF_TOKEN in the environment"
        if secret:
            os.environ["HF_TOKEN"], source = secret, "Colab's secret HF_TOKEN"
        _found = Token(source, note, remedy)
        if remedy and not again:  # the doctor shows it itself
            print(f"{note} {remedy}")
    return _found


def _colab_secret() -> tuple[str | None, str, str]:
    """Return Colab's secret, what to say if there is none, and the remedy if that is a failure."""

    def ask() -> str:
        from google.colab import userdata

        return (userdata.get("HF_TOKEN") or "").strip()

    secret, remedy = None, ""
    try:
        secret = bounded(ask, SECRET_SECONDS) or None
        note = "" if secret else "Colab's secret HF_TOKEN is empty."
    except Exception as error:
        notes = {
            "SecretNotFoundError": "Colab has no secret HF_TOKEN.",
            "NotebookAccessError": "This notebook may not read Colab's secret HF_TOKEN.",
        }
        note = notes.get(type(error).__name__, "")
        if not note:
            why = reason(error).rstrip(".")
            note = f"Colab's secret HF_TOKEN did not come ({why}): going on without it."
            remedy = (
                "If the base model asks for a token: the key in Colab's left margin, add HF_TOKEN, "
                "allow this notebook to read it, then Runtime > Restart session and run all."
            )
    # huggingface_hub would ask again, and wait for ever if the first question hangs
    _auth._IS_GOOGLE_COLAB_CHECKED, _auth._GOOGLE_COLAB_SECRET = True, secret
    return secret, note, remedy
