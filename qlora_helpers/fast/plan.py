"""The batch plan: how an effective batch is cut to fit the memory."""

import contextlib
import ctypes
import gc
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import psutil
import torch
from peft import PeftModel

from qlora_helpers.errors import ModelError

_SHARE = 0.9  # of the free memory; the rest is for the optimizer's state and fragmentation


@dataclass(frozen=True)
class BatchPlan:
    """How an effective batch is cut. The losses do not depend on it beyond rounding.

    `kept_activations` counts a token's activations in one decoder layer as 1. Layers that have no
    room are checkpointed: run again in backward, which costs a third of a step (arXiv:1604.06174).
    """

    micro_batch_size: int
    gradient_accumulation_steps: int
    kept_activations: int
    peak_gib: float | None
    reason: str

    def checkpointed_layers(self, layers: int, tokens: int) -> int:
        """Return how many of `layers` are checkpointed in a micro-batch of `tokens` tokens."""
        return max(0, layers - self.kept_activations // tokens)


def plan_encoded(
    model: PeftModel,
    encoded: list[list[int]],
    forward: Callable[[list[list[int]]], torch.Tensor],
    effective_batch_size: int,
) -> BatchPlan:
    """Return the plan with the largest micro-batch, then the fewest checkpointed layers, that fits.

    On a GPU, steps with the longest of the `encoded` prompts are run: `forward(rows).sum()` and its
    gradients. On a CPU they are estimated. Raises ModelError if a single row does not fit.
    """
    encoded = sorted(encoded, key=len)[-effective_batch_size:]
    probe, free = _probe_cpu, psutil.virtual_memory().available
    if model.device.type == "cuda":
        free_memory()
        probe, free = _probe_gpu, free_gpu_bytes()
    layers, limit = len(decoder_layers(model)), _SHARE * free
    for size in range(effective_batch_size, 0, -1):
        rows = encoded[-size:]
        peak_of = cache(partial(probe, model, rows, forward))
        if effective_batch_size % size or peak_of(0) > limit:
            continue
        kept = _most_kept_layers(peak_of, layers, limit)
        tokens, gib = sum(map(len, rows)), peak_of(kept) / 2**30
        reason = (
            f"the {size} longest rows ({tokens:,} tokens) train in {gib:.1f} of the "
            f"{limit / 2**30:.1f} GiB to use, with {layers - kept} of {layers} layers checkpointed"
        )
        steps = effective_batch_size // size
        return BatchPlan(size, steps, kept * tokens, round(gib, 2), reason)
    raise ModelError(
        f"not even one row of {len(encoded[-1])} tokens trains within {limit / 2**30:.1f} GiB: set "
        "QLORA_MAX_LENGTH lower, or restart the runtime if an earlier model still holds the memory."
    )


def _most_kept_layers(peak_of: Callable[[int], float], layers: int, limit: float) -> int:
    """Return how many layers' activations fit: a guess from a straight line, then tried.

    A checkpointed layer has its activations in memory while it runs again, so the first kept layer
    costs nothing, and each further one costs the same.
    """
    kept = layers
    some = max(1, layers // 4)
    while some > 1 and peak_of(some) > limit:
        kept = some - 1
        some //= 2
    if some > 1:
        cost = max(1, (peak_of(some) - peak_of(0)) / (some - 1))
        kept = min(kept, some + int((limit - peak_of(some)) / cost))
    while kept and peak_of(kept) > limit:
        kept -= 1
    return kept


def decoder_layers(model: PeftModel) -> torch.nn.ModuleList:
    return model.get_base_model().base_model.layers


def checkpoint_layers(model: PeftModel, count: int) -> None:
    """Checkpoint the first `count` decoder layers of `model` in training, and no other."""
    base = model.get_base_model()
    if count and not base.is_gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    for i, layer in enumerate(decoder_layers(model)):
        layer.gradient_checkpointing = i < count


def free_gpu_bytes() -> float:
    """Return the bytes of GPU memory that are free, or that this process has reserved already."""
    free, total = torch.cuda.mem_get_info()
    share = total * torch.cuda.get_per_process_memory_fraction()
    return min(free + torch.cuda.memory_reserved(), share)


def _probe_gpu(model, rows, forward, kept_layers) -> float:
    """Return the peak reserved bytes of a step over `rows`; infinity if memory runs out."""
    model.train()
    checkpoint_layers(model, len(decoder_layers(model)) - kept_layers)
    torch.cuda.reset_peak_memory_stats()
    try:
        forward(rows).sum().backward()
        return torch.cuda.max_memory_reserved()
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        model.zero_grad(set_to_none=True)
        checkpoint_layers(model, 0)
        torch.cuda.empty_cache()


def _probe_cpu(model, rows, forward, kept_layers) -> float:
    """Estimate the bytes of a step from what forward keeps of the longest row, by its tokens: half
    of that without the layers' activations, and as much again for all layers'."""
    sizes = {}

    def note(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward(rows[-1:])
    for parameter in model.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    kept = sum(sizes.values()) * sum(map(len, rows)) / len(rows[-1])
    return int(kept * (0.5 + max(1, kept_layers) / len(decoder_layers(model))))


def free_memory() -> None:
    """Give back the memory that nothing needs; the last failed cell's errors may hold some."""
    errors = [getattr(sys, "last_value", None)]
    for error in errors:  # and those that it came from
        if error is not None:
            traceback.clear_frames(error.__traceback__)
            origins = (error.__cause__, error.__context__)
            errors += [origin for origin in origins if origin not in errors]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
