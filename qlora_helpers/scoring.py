"""Label probabilities in one forward pass: the one core that training, evaluation and the widget call."""

from collections.abc import Sequence

import numpy as np
import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_helpers.packing import pack
from qlora_helpers.prompts import encode_prompts, label_token_ids

TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 16384}  # enough to fill the kernels, small enough for a T4


def label_logits(model: PreTrainedModel | PeftModel, encoded: Sequence[Sequence[int]], label_ids: list[int]) -> torch.Tensor:
    """(rows, labels) float32 logits of the label tokens, as the next token after each of the `encoded` prompts.
    The head is applied to each row's last token and to the label tokens' rows alone: a softmax over this is the model's
    next-token distribution, conditioned on the label words. `model` comes from `load_base_model`."""
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    packed = pack(encoded, causal_lm.device)
    with torch.autocast(causal_lm.device.type, enabled=False):  # weights and activations have the dtype that they shall have
        hidden = causal_lm.base_model(**packed, use_cache=False).last_hidden_state[0]
        head = causal_lm.get_output_embeddings().weight[label_ids]
        return (hidden[packed["ends"]].to(head.dtype) @ head.T).float()


@torch.no_grad()
def label_probabilities(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, texts: list[str],
                        max_length: int, progress: str | None = None) -> np.ndarray:
    """(texts, labels) float64 probabilities, each row summing to 1, in the order of `texts`.
    Rows are scored in order of length, so that a batch pads little. `progress` names a progress bar."""
    label_ids = label_token_ids(tokenizer)
    encoded = encode_prompts(tokenizer, list(texts), max_length)
    logits = torch.empty(len(encoded), len(label_ids))
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(encoded), desc=progress, unit="row", disable=progress is None) as bar:
            for batch in length_batches(encoded, TOKENS_PER_BATCH[model.device.type]):
                logits[batch] = label_logits(model, [encoded[i] for i in batch], label_ids).cpu()
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return torch.softmax(logits.double(), dim=-1).numpy()


def length_batches(encoded: Sequence[Sequence[int]], tokens_per_batch: int) -> list[list[int]]:
    """Indices into `encoded`, longest first, in batches of at most `tokens_per_batch` tokens (and at least one row)."""
    batches, tokens = [], 0
    for i in sorted(range(len(encoded)), key=lambda i: -len(encoded[i])):
        if not batches or tokens + len(encoded[i]) > tokens_per_batch:
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += len(encoded[i])
    return batches
