"""LoRA layers that read the same input, as one: their frozen weights, and their adapter of the moment."""

from typing import NamedTuple

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import Linear4bit
from torch import nn

from qlora_helpers.fast.dropout import RowDropout


class Adapter(NamedTuple):
    """The adapter of a group's layers in one pass."""

    scale: float  # of A's product; what dropout keeps is scaled up here
    rate: float  # of dropout; 0 outside training
    parameters: list[nn.Parameter]  # each layer's A (r, inputs), then each layer's B (outputs, r)
    dropout: nn.Module | None

    @property
    def is_off(self) -> bool:
        """Whether it is switched off: it has rank 0 then."""
        return not self.parameters

    def keys(self, x) -> torch.Tensor | None:
        """Return the keys from which the mask of x (tokens, inputs) is drawn; None without dropout."""
        return self.dropout.keys(x) if self.rate else None


def _rate(dropout: nn.Module) -> float | None:
    """Return the present rate of a layer's dropout; None for one that is newer than `fuse_lora`."""
    if type(dropout) is nn.Dropout:
        return None
    # It is an Identity where the rate is zero.
    return dropout.p if isinstance(dropout, RowDropout) and dropout.training else 0.0


class Group:
    """LoRA layers that read the same input, their frozen weights merged into one matrix (outputs of all, inputs)."""

    def __init__(self, layers):
        self.layers, self.sizes, self.state = layers, [layer.out_features for layer in layers], None
        for layer in layers:  # they share their mask, in PEFT's own path too
            for name, dropout in layer.lora_dropout.items():
                if isinstance(dropout, RowDropout):
                    dropout.number = layers[0].lora_dropout[name].number
        weights = [layer.base_layer.weight for layer in layers]
        self.weight = _merge(weights, [weight.data for weight in weights], "data")
        if isinstance(layers[0].base_layer, Linear4bit):
            states = [weight.quant_state for weight in weights]
            scales = [
                dequantize_blockwise(s.absmax, s.state2) + s.offset if s.nested else s.absmax
                for s in states
            ]
            scales, shape = (
                _merge(states, scales, "absmax"),
                torch.Size([sum(self.sizes), states[0].shape[1]]),
            )
            for state in states:
                state.nested, state.state2, state.offset = False, None, None
            dtype = (
                layers[0].base_layer.compute_dtype or state.dtype
            )  # a checkpoint quantised elsewhere may say another
            self.state = QuantState(
                scales, shape, state.code, state.blocksize, state.quant_type, dtype
            )

    def adapter(self) -> "Adapter | None":
        """Return the one adapter, the same in all layers, as it is now; None where there is no such adapter."""
        layers, first = self.layers, self.layers[0]
        if any(layer.merged for layer in layers):
            return None
        if all(layer.disable_adapters for layer in layers):
            return Adapter(0.0, 0.0, [], None)
        active = first.active_adapters
        if len(active) != 1 or any(layer.disable_adapters for layer in layers):
            return None
        name = active[0]
        for layer in layers:
            if layer.active_adapters != active or name not in layer.lora_A:
                return None
        kinds = {(layer.r[name], layer.scaling[name]) for layer in layers}
        rates = {_rate(layer.lora_dropout[name]) for layer in layers}
        if len(kinds) > 1 or len(rates) > 1 or None in rates:
            return None
        parameters = [layer.lora_A[name].weight for layer in layers]
        parameters += [layer.lora_B[name].weight for layer in layers]
        rate = rates.pop()
        return Adapter(first.scaling[name] / (1 - rate), rate, parameters, first.lora_dropout[name])

    def frozen(self, dtype) -> torch.Tensor:
        """(outputs of all, inputs)"""
        return (dequantize_4bit(self.weight, self.state) if self.state else self.weight).to(dtype)

    def tuned(self, adapter: "Adapter") -> torch.Tensor:
        """(outputs of all, inputs) in float32: the frozen weights and each layer's scaled B A added up, to read only."""
        weight, matrices, n = self.frozen(torch.float32), adapter.parameters, len(self.layers)
        if not matrices:
            return weight
        if not self.state:
            weight = weight.clone()
        for rows, a, b in zip(weight.split(self.sizes), matrices[:n], matrices[n:], strict=True):
            rows.addmm_(b, a, alpha=adapter.scale)
        return weight

    def adapted(self, parameters, scale, dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A (n r, inputs) times `scale`, and B (outputs of all, n r), block-diagonal."""
        n = len(self.layers)
        if (
            not parameters
        ):  # rank 0: its product is a matrix of zeros, to which the frozen product is added as ever
            empty = torch.empty(0, device=self.weight.device, dtype=dtype)
            return empty.view(0, self.layers[0].in_features), empty.view(sum(self.sizes), 0)
        return torch.cat(parameters[:n]).mul_(scale).to(dtype), torch.block_diag(
            *parameters[n:]
        ).to(dtype)

    def gradients(self, grad_a, grads_b, scale) -> list[torch.Tensor]:
        """Of `parameters`, in float32, from those of A (n r, inputs) and of each layer's rows of B (outputs, n r)."""
        n = len(self.layers)
        if not len(grad_a):
            return []
        return [
            *grad_a.float().mul_(scale).chunk(n),
            *(grad.chunk(n, 1)[i].float() for i, grad in enumerate(grads_b)),
        ]


def _merge(owners, tensors, attribute) -> torch.Tensor:
    whole = torch.cat(tensors)
    for owner, part in zip(owners, whole.split([len(tensor) for tensor in tensors]), strict=True):
        setattr(owner, attribute, part)
    return whole
