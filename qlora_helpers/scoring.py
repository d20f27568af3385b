"""Label probabilities in one forward pass: the one core that training, evaluation and the widget call."""

import contextlib
import copy
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from qlora_helpers.config import RunConfig
from qlora_helpers.errors import ModelError
from qlora_helpers.fast.packing import pack, use_packed_attention
from qlora_helpers.prompts import encode_prompts, label_token_ids

# The mean change of a probability that rounding explains; the largest may be ten times that. With the same 400 rows in batches of 3 to 400
# rows, a float16 model of Mistral-7B's shape showed a mean of up to 1.0e-3 and at most 1.1e-2, and a float32 one 6e-7 and 2.6e-6; bfloat16
# has eight times float16's rounding. An adapter scaled by 0.9 showed a mean of 2.3e-2, one with a layer left out at least 6.8e-3.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}  # enough to fill the kernels, small enough for a T4


def label_logits(
    model: PreTrainedModel | PeftModel, encoded: Sequence[Sequence[int]], label_ids: list[int]
) -> torch.Tensor:
    """(rows, labels) float32 logits of the label tokens, as the next token after each of the `encoded` prompts.
    The head is applied to each row's last token and to the label tokens' rows alone: a softmax over this is the model's
    next-token distribution, conditioned on the label words. `model` comes from `load_base_model`."""
    causal_lm = _causal_lm(model)
    packed = pack(encoded, causal_lm.device)
    with torch.autocast(
        causal_lm.device.type, enabled=False
    ):  # weights and activations have the dtype that they shall have
        hidden = causal_lm.base_model(**packed, use_cache=False).last_hidden_state[0]
        return _at_labels(causal_lm, hidden[packed["ends"]], label_ids)


def _causal_lm(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _at_labels(
    causal_lm: PreTrainedModel, hidden: torch.Tensor, label_ids: list[int]
) -> torch.Tensor:
    """(rows, labels) float32 logits from (rows, size) hidden states. The product is in float32: in half precision, labels tie."""
    head = causal_lm.get_output_embeddings()
    logits = hidden.float() @ head.weight[label_ids].float().T
    return logits if head.bias is None else logits + head.bias[label_ids].float()


@torch.no_grad()
def label_probabilities(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    config: RunConfig,
    progress: str | Callable[[int], object] | None = None,
    prefix: str = "",
    temperature: float = 1.0,
) -> np.ndarray:
    """(texts, config.labels) float64 probabilities, each row summing to 1, in the order of `texts`.
    Rows are scored in order of length, in smaller batches once one has run out of memory; many of them on a CPU in one thread a core.
    `progress` names a progress bar, or is called with the number of rows of each batch. `prefix` (see `few_shot_prefix`) stands before
    every prompt, tokenised with it as one text; the tokens that all rows begin with are read once,
    and `config.max_length` does not count it. Raises ModelError if a single row runs out of
    memory."""
    label_ids = label_token_ids(tokenizer, config.labels)
    encoded = encode_prompts(tokenizer, list(texts), config.max_length, prefix)
    shared = []
    if prefix and encoded:  # a token of each row is left
        shared = os.path.commonprefix(encoded)[: min(map(len, encoded)) - 1]
    encoded = [ids[len(shared) :] for ids in encoded]
    logits = torch.empty(len(encoded), len(label_ids))
    was_training = model.training
    if any(
        module.training for module in model.modules()
    ):  # setting the mode of every module takes an eighth of a headline's time
        model.eval()
    try:
        read = _read_prefix(model, shared) if shared else None
        # after a prefix, each row of a batch holds a copy of what was read
        tokens = TOKENS_PER_BATCH[model.device.type] // (4 if shared else 1)
        batches = length_batches(encoded, tokens)
        with tqdm(
            total=len(encoded),
            desc=progress,
            unit="row",
            disable=not isinstance(progress, str),
            mininterval=3,
        ) as bar:
            report = progress if callable(progress) else bar.update
            threads = torch.get_num_threads()
            if model.device.type == "cpu" and not shared and len(batches) >= 2 * threads > 2:

                def keep(batch, found):
                    logits[batch] = found
                    report(len(batch))

                _in_threads(
                    lambda batch: label_logits(model, [encoded[i] for i in batch], label_ids),
                    batches,
                    keep,
                    threads,
                )
                batches = []
            while batches:
                batch = batches[0]
                rows = [encoded[i] for i in batch]
                try:
                    found = (
                        _label_logits_after(model, read, rows, label_ids)
                        if shared
                        else label_logits(model, rows, label_ids)
                    )
                except torch.OutOfMemoryError:
                    found = None  # and leave this block: its traceback holds the activations
                if found is None:
                    batches = _halves(batches)
                    continue
                logits[batch] = found.cpu()
                report(len(batches.pop(0)))
    finally:
        if was_training:
            model.train()
    return torch.softmax(logits.double() / temperature, dim=-1).numpy()


def check_same_adapter(
    found: np.ndarray, kept: Sequence[Sequence[float]], dtype: torch.dtype
) -> str:
    """Compare the probabilities of an adapter that was read back with those that training kept.

    Args:
        found: (rows, labels) probabilities of the adapter that was read back.
        kept: (rows, labels) probabilities of the same rows, `best_probabilities` of the history.
        dtype: the model's, whose rounding decides what may differ.

    Returns:
        A sentence with the mean and the largest change of a probability.

    Raises:
        ModelError: if the mean change is above ROUNDING[dtype], or the largest above ten times that.
    """
    change = abs(np.asarray(found) - np.asarray(kept))
    said = f"mean change of a probability {change.mean():.1e}, largest {change.max():.1e}"
    most = ROUNDING[dtype]
    if not (change.mean() <= most and change.max() <= 10 * most):
        raise ModelError(
            f"the adapter on disk is not the one that training kept: {said}, where rounding explains a mean of {most:.0e} "
            f"and {10 * most:.0e} at most. Delete the adapter's folder and run this notebook again."
        )
    return said


def _in_threads(score: Callable, batches: list[list[int]], keep: Callable, threads: int) -> None:
    """`keep(batch, score(batch))` for each, scored on one core: cores that share a product wait for the slowest of them at its end."""

    def begin():  # both are a thread's own
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)

    pool = ThreadPoolExecutor(threads, initializer=begin)
    try:
        found = {pool.submit(score, batch): batch for batch in batches}
        for done in as_completed(found):
            keep(found[done], done.result())
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what threads to come begin with


def _halves(batches: list[list[int]]) -> list[list[int]]:
    if len(batches[0]) == 1:
        raise ModelError(
            "a single row runs out of GPU memory: set QLORA_MAX_LENGTH lower, or restart the runtime if an earlier model "
            "still holds the memory."
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [
        half
        for batch in batches
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :])
        if half
    ]


def _read_prefix(model, ids: list[int]) -> Cache:
    """The keys and values of a text, for the rows that come after it."""
    causal_lm = _causal_lm(model)
    with _own_attention(causal_lm):
        return causal_lm.base_model(
            torch.tensor([ids], device=causal_lm.device), use_cache=True
        ).past_key_values


def _label_logits_after(
    model, read: Cache, encoded: list[list[int]], label_ids: list[int]
) -> torch.Tensor:
    """`label_logits` of rows that follow what was read, by the library's own attention over right-padded rows."""
    causal_lm = _causal_lm(model)
    lengths = torch.tensor([len(row) for row in encoded], device=causal_lm.device)
    ids = pad_sequence([torch.tensor(row) for row in encoded], batch_first=True).to(
        causal_lm.device
    )
    mask = (
        torch.arange(read.get_seq_length() + ids.shape[1], device=ids.device)
        < read.get_seq_length() + lengths[:, None]
    )
    copies = copy.deepcopy(read)
    copies.batch_repeat_interleave(len(encoded))
    with _own_attention(causal_lm):
        hidden = causal_lm.base_model(
            ids, attention_mask=mask.long(), past_key_values=copies, use_cache=True
        ).last_hidden_state
    return _at_labels(causal_lm, hidden[torch.arange(len(encoded)), lengths - 1], label_ids)


@contextlib.contextmanager
def _own_attention(causal_lm: PreTrainedModel):
    """Run the library's attention, which keeps to masks and windows, instead of the packed one."""
    causal_lm.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        use_packed_attention(causal_lm)


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
