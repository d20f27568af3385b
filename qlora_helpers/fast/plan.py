"""The batch plan: how an effective batch is cut, and what is kept for backward, to fit the memory at hand."""

import contextlib
import ctypes
import gc
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from peft import PeftModel

from qlora_helpers.errors import ModelError

_SHARE = 0.9  # of the free memory: the rest is for what a probe does not see, the optimizer's state and fragmentation


@dataclass(frozen=True)
class BatchPlan:
    """How an effective batch is cut to fit the memory. The losses do not depend on it beyond
    rounding: dropout's masks belong to the rows.

    `kept_activations` is how many activations of a token in a decoder layer are kept from forward to backward; the layers for which
    there is no room in a batch are checkpointed: run again in backward, which costs a third of a step (arXiv:1604.06174)."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    kept_activations: int
    peak_gib: float | None
    reason: str

    def checkpointed_layers(self, layers: int, tokens: int) -> int:
        """How many of `layers` decoder layers are checkpointed in a micro-batch of `tokens` tokens."""
        return max(0, layers - self.kept_activations // tokens)


def plan_encoded(
    model: PeftModel,
    encoded: list[list[int]],
    forward: Callable[[list[list[int]]], torch.Tensor],
    effective_batch_size: int,
) -> BatchPlan:
    """The largest micro-batch, and then as few checkpointed layers, as let the longest of the `encoded` prompts train in the free memory.
    On a GPU found by running such a step: the gradients of `forward(rows).sum()`, on a CPU by what one row keeps. Raises ModelError if a
    single row does not fit."""
    encoded = sorted(encoded, key=len)[-effective_batch_size:]
    sizes = [
        size for size in range(effective_batch_size, 0, -1) if effective_batch_size % size == 0
    ]
    probe, limit = (
        (_probe_gpu, free_gpu_bytes())
        if model.device.type == "cuda"
        else (_probe_cpu, psutil.virtual_memory().available)
    )
    layers, limit = len(decoder_layers(model)), _SHARE * limit
    for size in sizes:
        rows = encoded[-size:]
        tokens = sum(map(len, rows))
        least = probe(model, rows, forward, 0)
        if least is None or least > limit:
            continue
        few = max(1, layers // 8)
        more = probe(model, rows, forward, few)
        kept = (
            0
            if more is None
            else layers
            if more <= least
            else min(layers, int((limit - least) / (more - least) * few))
        )
        while kept and ((peak := probe(model, rows, forward, kept)) is None or peak > limit):
            kept -= max(1, kept // 8)
        peak = peak if kept else least
        # a batch of shorter rows has room for the activations of more layers
        room = layers * tokens if kept == layers else kept * tokens
        reason = (
            f"the {size} longest rows ({tokens:,} tokens) train in {peak / 2**30:.1f} of the {limit / 2**30:.1f} GiB to use, with "
            f"{layers - kept} of {layers} layers checkpointed"
        )
        return BatchPlan(size, effective_batch_size // size, room, round(peak / 2**30, 2), reason)
    raise ModelError(
        f"not even one row of {len(encoded[-1])} tokens trains within {limit / 2**30:.1f} GiB: set QLORA_MAX_LENGTH lower, "
        "or restart the runtime if an earlier model still holds the memory."
    )


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
    """What this process may use of the GPU memory, in bytes: free, or reserved by it already."""
    free, total = torch.cuda.mem_get_info()
    return min(
        free + torch.cuda.memory_reserved(), total * torch.cuda.get_per_process_memory_fraction()
    )


def _probe_gpu(model, rows, forward, kept_layers) -> int | None:
    """Peak reserved bytes of a step over `rows`, or None if it runs out of memory."""
    was_training = model.training
    model.train()
    checkpoint_layers(model, len(decoder_layers(model)) - kept_layers)
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    try:
        forward(rows).sum().backward()
        return torch.cuda.max_memory_reserved()
    except torch.OutOfMemoryError:
        return None
    finally:
        model.zero_grad(set_to_none=True)
        checkpoint_layers(model, 0)
        model.train(was_training)
        free_memory()


def _probe_cpu(model, rows, forward, kept_layers) -> int:
    """An estimate of the bytes that a step over `rows` needs: what the longest row keeps for backward, and half as much to work in."""
    sizes = {}

    def note(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward(rows[-1:])
    frozen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = (
        sum(size for pointer, size in sizes.items() if pointer not in frozen)
        * sum(map(len, rows))
        / len(rows[-1])
    )
    return int(kept * (0.5 + kept_layers / len(decoder_layers(model))))


def free_memory() -> None:
    """Give back what nothing refers to any more, and what the last failed cell's traceback alone still does."""
    if last := getattr(sys, "last_traceback", None):
        traceback.clear_frames(last)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(
        OSError, AttributeError
    ):  # of glibc alone, which else keeps what it may need again
        ctypes.CDLL(None).malloc_trim(0)
