"""Label probabilities in one forward pass: the one core that training, evaluation and the widget call."""

import numpy as np
import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_helpers.prompts import encode_prompts, label_token_ids

TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 16384}  # padded tokens: enough to fill the kernels, small enough for a T4


def pad(encoded: list[list[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, each (rows, longest) int64, padded on the right."""
    width = max(map(len, encoded))
    ids = torch.full((len(encoded), width), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        ids[row, :len(tokens)] = torch.tensor(tokens)
        mask[row, :len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def label_logits(model: PreTrainedModel | PeftModel, input_ids: torch.Tensor, attention_mask: torch.Tensor,
                 label_ids: list[int]) -> torch.Tensor:
    """(rows, labels) float32 logits of the label tokens, as the next token after each right-padded prompt.
    The head is applied to each row's last real token and to the label tokens' rows alone: a softmax over this is the
    model's next-token distribution, conditioned on the label words."""
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = causal_lm.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    last = attention_mask.sum(dim=1) - 1
    hidden = hidden[torch.arange(len(last), device=hidden.device), last]
    head = causal_lm.get_output_embeddings().weight[label_ids]
    return (hidden.to(head.dtype) @ head.T).float()


@torch.inference_mode()
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
                inputs = pad([encoded[i] for i in batch], tokenizer.pad_token_id).values()
                logits[batch] = label_logits(model, *(x.to(model.device) for x in inputs), label_ids).cpu()
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return torch.softmax(logits.double(), dim=-1).numpy()


def length_batches(encoded: list[list[int]], tokens_per_batch: int) -> list[list[int]]:
    """Indices into `encoded`, longest first, in batches of at most `tokens_per_batch` padded tokens (and at least one row)."""
    batches, width = [], 0
    for i in sorted(range(len(encoded)), key=lambda i: -len(encoded[i])):
        if not batches or (len(batches[-1]) + 1) * width > tokens_per_batch:
            batches.append([])
            width = len(encoded[i])
        batches[-1].append(i)
    return batches
