"""LoRA layers that read the same input, as one: their frozen weights and their present adapter."""

from typing import NamedTuple

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from peft.tuners.lora import LoraLayer
from torch import nn

from qlora_helpers.fast.dropout import RowDropout


class Group:
    """LoRA layers that read the same input. Their frozen weights become views of one matrix."""

    def __init__(self, layers: list[LoraLayer]):
        self.layers, self.sizes, self.state = layers, [layer.out_features for layer in layers], None
        for layer in layers:  # they share their mask, on PEFT's own path too
            for name, dropout in layer.lora_dropout.items():
                if isinstance(dropout, RowDropout):
                    dropout.number = layers[0].lora_dropout[name].number
        weights = [layer.base_layer.weight for layer in layers]
        self.weight = _merge(weights, [weight.data for weight in weights], "data")
        if hasattr(weights[0], "quant_state"):
            states = [weight.quant_state for weight in weights]
            s = states[0]
            shape = torch.Size([sum(self.sizes), s.shape[1]])
            scales = _merge(states, [_float32_scales(state) for state in states], "absmax")
            self.state = QuantState(scales, shape, s.code, s.blocksize, s.quant_type, s.dtype)

    def adapter(self) -> "Adapter | None":
        """Return the present adapter; None where PEFT's own layers have to run."""
        states = {_state(layer) for layer in self.layers}
        if len(states) > 1 or None in states:
            return None
        name, scale, _, rate = states.pop()
        if not name:
            return Adapter(self, 0.0, 0.0, [], None)
        parameters = [layer.lora_A[name].weight for layer in self.layers]
        parameters += [layer.lora_B[name].weight for layer in self.layers]
        dropout = self.layers[0].lora_dropout[name]
        return Adapter(self, scale / (1 - rate), rate, parameters, dropout)

    def frozen(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the frozen weights (outputs of all, inputs)."""
        return (dequantize_4bit(self.weight, self.state) if self.state else self.weight).to(dtype)


class Adapter(NamedTuple):
    """The adapter of a group in one pass. One that is switched off has rank 0."""

    group: Group
    scale: float  # alpha / r, and the scaling up of what dropout keeps
    rate: float  # of dropout; 0 outside training
    parameters: list[nn.Parameter]  # A (r, inputs) of each layer, then B (outputs, r) of each
    dropout: nn.Module | None

    def keys(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return the keys of the mask of x (tokens, inputs); None without dropout."""
        return self.dropout.keys(x) if self.rate else None

    def matrices(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A (n r, inputs) times `scale`, and B (outputs of all, n r), block-diagonal."""
        n = len(self.group.layers)
        if not self.parameters:
            empty, inputs = self.group.weight.new_empty, self.group.layers[0].in_features
            return empty(0, inputs, dtype=dtype), empty(sum(self.group.sizes), 0, dtype=dtype)
        a = torch.cat(self.parameters[:n]).mul_(self.scale)
        return a.to(dtype), torch.block_diag(*self.parameters[n:]).to(dtype)

    def gradients(self, grad_a: torch.Tensor, grads_b) -> list[torch.Tensor]:
        """Return those of `parameters`, from that of A and those of each layer's rows of B."""
        if not self.parameters:
            return []
        n = len(self.group.layers)
        blocks = [grad.chunk(n, 1)[i].float() for i, grad in enumerate(grads_b)]
        return [*grad_a.float().mul_(self.scale).chunk(n), *blocks]

    def tuned(self) -> torch.Tensor:
        """Return frozen weights plus scaled B A (outputs of all, inputs), float32, to read only."""
        weight, n = self.group.frozen(torch.float32), len(self.group.layers)
        if self.parameters and not self.group.state:
            weight = weight.clone()
        pairs = zip(self.parameters[:n], self.parameters[n:], strict=True)
        for rows, (a, b) in zip(weight.split(self.group.sizes), pairs, strict=False):
            rows.addmm_(b, a, alpha=self.scale)
        return weight


def _state(layer: LoraLayer) -> tuple | None:
    """Return name (empty if switched off), scale, rank and dropout rate of the active adapter.

    None stands for a merged adapter, several, or one that was added after `fuse_lora`.
    """
    if layer.merged:
        return None
    if layer.disable_adapters:
        return "", 0.0, 0, 0.0
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    if name not in layer.lora_A or type(layer.lora_dropout[name]) is nn.Dropout:
        return None
    dropout = layer.lora_dropout[name]  # an Identity, if its rate is 0
    rate = dropout.p if isinstance(dropout, RowDropout) and dropout.training else 0.0
    return name, layer.scaling[name], layer.r[name], rate


def _float32_scales(state: QuantState) -> torch.Tensor:
    """Return the scales of an NF4 weight, which are then no longer quantised themselves."""
    if not state.nested:
        return state.absmax
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    state.nested, state.state2, state.offset = False, None, None
    return scales


def _merge(owners: list, tensors: list[torch.Tensor], attribute: str) -> torch.Tensor:
    """Join `tensors` along their first dimension; the attribute of each owner becomes its view."""
    whole = torch.cat(tensors)
    for owner, part in zip(owners, whole.split([len(tensor) for tensor in tensors]), strict=True):
        setattr(owner, attribute, part)
    return whole
