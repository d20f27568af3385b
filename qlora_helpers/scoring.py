"""Label probabilities in one forward pass, for training, evaluation and the panels."""

import contextlib
import copy
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_helpers.config import RunConfig
from qlora_helpers.errors import ModelError
from qlora_helpers.fast import processes
from qlora_helpers.fast.packing import pack, use_packed_attention
from qlora_helpers.prompts import encode_prompts, label_token_ids

# The mean change of a probability that rounding explains; the largest may be ten times that. In
# batches of 3 to 400 rows, float16 showed a mean of at most 1.0e-3, float32 6e-7; bfloat16 rounds 8
# times as much as float16. An adapter that lacks a layer showed a mean of 6.8e-3 at least.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}  # enough to fill the kernels, small enough for a T4


def label_logits(
    model: PreTrainedModel | PeftModel, encoded: Sequence[Sequence[int]], label_ids: list[int]
) -> torch.Tensor:
    """Return (rows, labels) float32 logits of the tokens `label_ids` after each prompt.

    The head is applied to each row's last token and the label tokens alone. A softmax over the
    result is the next-token distribution of `model`, conditioned on the label words. `model` comes
    from `load_base_model`, with or without LoRA; `encoded` holds the token ids of each prompt.
    """
    causal_lm = _causal_lm(model)
    packed = pack(encoded, causal_lm.device)
    # The dtypes are right already: the Trainer's autocast would change them.
    with _current(causal_lm.device), torch.autocast(causal_lm.device.type, enabled=False):
        hidden = causal_lm.base_model(**packed, use_cache=False).last_hidden_state[0]
        return _at_labels(causal_lm, hidden[packed["ends"]], label_ids)


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which `device` is the current one, on which Triton starts kernels."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _causal_lm(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _at_labels(causal_lm, hidden: torch.Tensor, label_ids: list[int]) -> torch.Tensor:
    """Return the logits for `hidden` (rows, size), in float32: in half precision, labels tie."""
    head = causal_lm.get_output_embeddings()
    logits = hidden.float() @ head.weight[label_ids].float().T
    return logits if head.bias is None else logits + head.bias[label_ids].float()


@torch.no_grad()
def label_probabilities(
    model: PreTrainedModel | PeftModel | list[PeftModel],
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    config: RunConfig,
    progress: str | Callable[[int], object] | None = None,
    prefix: str = "",
    temperature: float = 1.0,
) -> np.ndarray:
    """Return the label probabilities of each text: (texts, labels) in float64.

    Rows of like length share a batch. Batches are halved when memory runs out, and a single row
    that does not fit raises ModelError. On a CPU, many batches run in one thread a core. Of several
    processes, each scores a share, and all return all rows: all of them have to call this.

    Args:
        model: the model, or the same on several GPUs, which then share the batches.
        progress: the name of a progress bar, or a function that gets the size of each batch.
        prefix: solved examples before each prompt (see `few_shot_prefix`), not counted by
            `config.max_length`. The tokens that all rows share are read once.
        temperature: divides the logits.
    """
    models = model if isinstance(model, list) else [model]
    device, was_training = models[0].device, models[0].training
    label_ids = label_token_ids(tokenizer, config.labels)
    encoded = encode_prompts(tokenizer, list(texts), config.max_length, prefix)
    shared = []
    if prefix and encoded:  # each row keeps at least one token
        shared = os.path.commonprefix(encoded)[: min(map(len, encoded)) - 1]
        encoded = [ids[len(shared) :] for ids in encoded]
    # Each row of a batch holds a copy of what was read.
    batches = length_batches(encoded, TOKENS_PER_BATCH[device.type] // (4 if shared else 1))
    batches = list(processes.share(batches))
    threads = torch.get_num_threads()
    if device.type == "cpu" and len(batches) >= 2 * threads > 2 and not shared:
        models = models[:1] * threads
    logits, quiet = torch.zeros(len(encoded), len(label_ids)), not isinstance(progress, str)
    bar = tqdm(total=len(encoded), desc=progress, unit="row", disable=quiet, mininterval=3)
    report = progress if callable(progress) else bar.update

    def keep(batch: list[int], result: torch.Tensor) -> None:
        logits[batch] = result.cpu()
        report(len(batch))

    if was_training:  # switching the mode takes an eighth of a headline's time
        models[0].eval()
    try:
        with bar, contextlib.ExitStack() as stack:
            scores = []
            for one in models:
                logits_of = partial(label_logits, one, label_ids=label_ids)
                if shared:
                    logits_of = stack.enter_context(_score_after(one, shared, label_ids))
                scores.append(partial(_score, logits_of, encoded))
            if len(models) > 1:
                batches = _in_threads(models, scores, batches, keep)
            _in_turn(scores[0], batches, keep)
    finally:
        if was_training:
            models[0].train()
    logits = processes.summed(logits, device)
    return torch.softmax(logits.double() / temperature, dim=-1).numpy()


def check_same_adapter(found: np.ndarray, history: dict, dtype: torch.dtype) -> str:
    """Compare the probabilities of an adapter that was read back with those that training kept.

    `found` is (rows, labels), by a model in `dtype`; `history` is the `training.json`. Returns a
    sentence with the mean and the largest change. Raises ModelError if rounding in `dtype` or in
    the dtype of the training does not explain them.
    """
    change = abs(np.asarray(found) - np.asarray(history["best_probabilities"]))
    said = f"mean change of a probability {change.mean():.1e}, largest {change.max():.1e}"
    most = max(ROUNDING[dtype], ROUNDING[getattr(torch, history["dtype"])])
    if not (change.mean() <= most and change.max() <= 10 * most):
        raise ModelError(
            f"the adapter on disk is not the one that training kept: {said}, where rounding "
            f"explains a mean of {most:.0e} and {10 * most:.0e} at most. Delete the adapter's "
            "folder and run this notebook again."
        )
    return said


def _score(logits_of: Callable, encoded: list[list[int]], batch: list[int]) -> torch.Tensor:
    return logits_of([encoded[i] for i in batch])


def _in_turn(score: Callable, batches: list[list[int]], keep: Callable) -> None:
    """Call `keep(batch, score(batch))` for each batch; halve those left when memory runs out."""
    while batches:
        try:
            result = score(batches[0])
        except torch.OutOfMemoryError:
            result = None  # and leave this block: its traceback holds the activations
        if result is None:
            batches = _halves(batches)
        else:
            keep(batches.pop(0), result)


def _halves(batches: list[list[int]]) -> list[list[int]]:
    if len(batches[0]) == 1:
        raise ModelError(
            "a single row runs out of GPU memory: set QLORA_MAX_LENGTH lower, or restart the "
            "runtime if an earlier model still holds the memory."
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    halves = [(batch[: len(batch) // 2], batch[len(batch) // 2 :]) for batch in batches]
    return [half for pair in halves for half in pair if half]


def _in_threads(
    models: list[PeftModel], scores: list[Callable], batches: list[list[int]], keep: Callable
) -> list[list[int]]:
    """Call `keep(batch, score(batch))` for each batch, with a thread for each model and its score.

    Returns the batches for which memory ran out. On a CPU a thread has a core: cores that share a
    product wait for the slowest of them.
    """
    threads, own = torch.get_num_threads(), threading.local()
    waiting = deque(zip(models, scores, strict=True))

    def begin():  # these settings are a thread's own
        model, own.score = waiting.popleft()
        torch.set_grad_enabled(False)
        if model.device.type == "cpu":
            torch.set_num_threads(1)

    def attempt(batch):
        try:
            return own.score(batch)
        except torch.OutOfMemoryError:
            return None

    too_large, pool = [], ThreadPoolExecutor(len(models), initializer=begin)
    try:
        for batch, result in zip(batches, pool.map(attempt, batches), strict=True):
            if result is None:
                too_large.append(batch)
            else:
                keep(batch, result)  # here, since only the main thread may draw a bar
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # for threads that start later
    return too_large


@contextlib.contextmanager
def _score_after(model, shared: list[int], label_ids: list[int]) -> Iterator[Callable]:
    """Yield `label_logits` for rows after the ids `shared`, by the library's own attention."""
    causal_lm = _causal_lm(model)
    device, start = causal_lm.device, len(shared)

    def logits(encoded: list[list[int]]) -> torch.Tensor:
        lengths = torch.tensor([len(row) for row in encoded], device=device)
        ids = pad_sequence([torch.tensor(row, device=device) for row in encoded], batch_first=True)
        mask = torch.arange(start + ids.shape[1], device=device) < start + lengths[:, None]
        cache = copy.deepcopy(read.past_key_values)
        cache.batch_repeat_interleave(len(encoded))
        choices = {"attention_mask": mask.long(), "past_key_values": cache, "use_cache": True}
        with _current(device):
            hidden = causal_lm.base_model(ids, **choices).last_hidden_state
        return _at_labels(causal_lm, hidden[torch.arange(len(encoded)), lengths - 1], label_ids)

    causal_lm.set_attn_implementation("sdpa")
    try:
        with _current(device):
            read = causal_lm.base_model(torch.tensor([shared], device=device), use_cache=True)
        yield logits
    finally:
        use_packed_attention(causal_lm)


def length_batches(encoded: Sequence[Sequence[int]], tokens_per_batch: int) -> list[list[int]]:
    """Return indices into `encoded`, longest row first; a row over the budget is alone."""
    batches, tokens = [], 0
    for i in sorted(range(len(encoded)), key=lambda i: -len(encoded[i])):
        if not batches or tokens + len(encoded[i]) > tokens_per_batch:
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += len(encoded[i])
    return batches
