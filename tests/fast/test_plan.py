"""The batch plan, and checkpointing of the layers that it leaves out."""

import dataclasses
import sys
import weakref
from types import SimpleNamespace

import psutil
import pytest
import torch
from lora_models import gradients, lora_config

from qlora_helpers.errors import ModelError, TrainingStopped
from qlora_helpers.fast.plan import (
    BatchPlan,
    checkpoint_layers,
    decoder_layers,
    free_memory,
    plan_encoded,
)
from qlora_helpers.model import attach_lora, load_base_model
from qlora_helpers.scoring import label_logits

ROWS = [[5] * (3 * n) for n in range(1, 30)]
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has its own memory")


@pytest.fixture
def model(tiny, config):
    base = load_base_model(dataclasses.replace(config, base_model=tiny))
    return attach_lora(base, lora_config(), seed=0)


def plan(model, effective=16):
    return plan_encoded(model, ROWS, lambda rows: label_logits(model, rows, [1, 2, 3]), effective)


def test_checkpointed_layers_grow_with_the_batch():
    plan, tokens = BatchPlan(16, 1, 24_000, None, ""), (1, 750, 751, 1000, 3000, 24_001)
    assert [plan.checkpointed_layers(32, n) for n in tokens] == [0, 0, 1, 8, 24, 32]


def test_the_first_layers_are_checkpointed_and_give_the_same_gradients(model):
    def gradients_with(count):
        checkpoint_layers(model.train(), count)
        checkpointed = [layer.gradient_checkpointing for layer in decoder_layers(model)]
        assert checkpointed == [i < count for i in range(2)]
        torch.manual_seed(0)
        model.zero_grad()
        label_logits(model, ROWS[:3], [1, 2, 3]).sum().backward()
        return gradients(model)

    none = gradients_with(0)
    for count in (1, 2, 0):
        found = gradients_with(count)
        assert all(torch.equal(found[name], none[name]) for name in none)


@ON_CPU
@pytest.mark.parametrize("effective", [16, 6, 11])
def test_with_memory_to_spare_nothing_is_cut(model, effective):
    found = plan(model, effective)
    assert (found.micro_batch_size, found.gradient_accumulation_steps) == (effective, 1)
    assert found.kept_activations == 2 * sum(map(len, ROWS[-effective:]))
    assert "0 of 2 layers checkpointed" in found.reason


@ON_CPU
def test_with_less_memory_layers_are_checkpointed_then_batches_cut_then_it_says_what_to_do(
    model, monkeypatch
):
    def with_memory(mebibytes):
        free = SimpleNamespace(available=mebibytes * 2**20)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
        return plan(model)

    plans = []
    for mebibytes in (400, 8, 6, 4, 2, 1):
        found = with_memory(mebibytes)
        assert found.micro_batch_size * found.gradient_accumulation_steps == 16
        assert found.peak_gib * 2**10 <= mebibytes + 5
        plans.append((found.micro_batch_size, found.kept_activations))
    assert plans[0][0] == 16 and plans[-1][0] < 16
    assert plans == sorted(plans, reverse=True) and len(set(plans)) > 3
    with pytest.raises(ModelError, match="not even one row of 87 tokens .* QLORA_MAX_LENGTH"):
        with_memory(1 / 16)


def test_memory_that_a_stopped_training_held_comes_back(monkeypatch):
    """Its frames are those of the error that the last error came from."""

    def train():
        held = torch.zeros(8)
        references.append(weakref.ref(held))
        raise KeyboardInterrupt

    references = []
    try:
        try:
            train()
        except KeyboardInterrupt:
            raise TrainingStopped("Stopped at step 1.") from None
    except TrainingStopped as error:
        monkeypatch.setattr(sys, "last_value", error, raising=False)
    assert references[0]() is not None
    free_memory()
    assert references[0]() is None
