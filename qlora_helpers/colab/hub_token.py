"""The hub's token: Colab's secret HF_TOKEN, else the environment's, else the stored login, else none. It is never shown or written."""

import contextlib
import os
from dataclasses import dataclass

from huggingface_hub import get_token

from qlora_helpers.colab.machine import on_colab
from qlora_helpers.colab.threads import bounded
from qlora_helpers.config import AG_NEWS, EMBEDDED_MODEL, RunConfig
from qlora_helpers.errors import reason

SECRET_SECONDS = 20  # for Colab to answer; a dialog of its own may be open meanwhile
_REMEDY = (
    "If the base model asks for a token: the key in Colab's left margin, add HF_TOKEN, allow this notebook to read it, then "
    "Runtime > Restart session and run all. Models and data without conditions need none."
)
_found: "Token | None" = None


@dataclass(frozen=True)
class Token:
    """Where the token came from (None if there is none), what there is to say of Colab's secret, and whether that deserves a warning."""

    source: str | None
    note: str = ""
    warning: bool = False
    remedy: str = ""


def use_token(config: RunConfig, again: bool = False) -> Token:
    """Put the token into HF_TOKEN, where the hub's libraries look, and say where it came from. Colab is asked once a process, unless
    `again`, and not at all for a run that needs no hub. A secret that does not come in time is a line and no more."""
    global _found
    if not needs_hub(config):
        return Token(None, "not needed")
    if _found is None or again:
        secret, _found = _colab_secret() if on_colab() else (None, Token(None))
        if secret:
            os.environ["HF_TOKEN"] = secret
        else:
            source = (
                "HF_TOKEN in the environment"
                if os.environ.get("HF_TOKEN")
                else "the stored login"
                if get_token()
                else None
            )
            _found = Token(source, _found.note, _found.warning, _found.remedy)
        if _found.warning and not again:  # the doctor shows it itself
            print(f"{_found.note} {_found.remedy}")
    return _found


def needs_hub(config: RunConfig) -> bool:
    """Whether the base model or the data come from the hub."""
    return (
        config.data == AG_NEWS
        or config.base_model != EMBEDDED_MODEL
        and not os.path.isdir(config.base_model)
    )


def _colab_secret() -> tuple[str | None, Token]:
    def ask() -> str | None:
        from google.colab import userdata

        return (userdata.get("HF_TOKEN") or "").strip() or None

    secret, token = None, Token("Colab's secret HF_TOKEN")
    try:
        secret = bounded(ask, SECRET_SECONDS)
        token = token if secret else Token(None, "Colab's secret HF_TOKEN is empty.")
    except Exception as error:
        kind = type(error).__name__
        if kind == "SecretNotFoundError":
            token = Token(None, "Colab has no secret HF_TOKEN.")
        elif kind == "NotebookAccessError":
            token = Token(None, "This notebook may not read Colab's secret HF_TOKEN.")
        else:  # TimeoutException, and whatever else keeps Colab's page from answering
            token = Token(
                None,
                f"Colab's secret HF_TOKEN did not come ({reason(error).rstrip('.')}): going on without it.",
                True,
                _REMEDY,
            )
    with contextlib.suppress(
        ImportError
    ):  # huggingface_hub would ask again, without an end where the first question still hangs
        from huggingface_hub.utils import _auth

        _auth._IS_GOOGLE_COLAB_CHECKED, _auth._GOOGLE_COLAB_SECRET = True, secret
    return secret, token
