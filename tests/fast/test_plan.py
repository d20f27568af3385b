import dataclasses
from types import SimpleNamespace

import psutil
import pytest
import torch
from peft import LoraConfig

from qlora_helpers.errors import ModelError
from qlora_helpers.fast.plan import BatchPlan, checkpoint_layers, decoder_layers
from qlora_helpers.model import attach_lora, load_base_model
from qlora_helpers.scoring import label_logits
from qlora_helpers.training import plan_batches

TEXTS = ["rain stops play " * n for n in range(1, 30)]


@pytest.fixture
def model(tiny, config):
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return attach_lora(load_base_model(dataclasses.replace(config, base_model=tiny)), lora, seed=0)


def test_checkpointed_layers_grow_with_the_batch():
    plan = BatchPlan(16, 1, 24_000, None, "")
    assert [
        plan.checkpointed_layers(32, tokens) for tokens in (1, 750, 751, 1000, 3000, 24_001)
    ] == [0, 0, 1, 8, 24, 32]


def test_the_first_layers_are_checkpointed_and_give_the_same_gradients(model, tokenizer):
    def gradients(count):
        checkpoint_layers(model.train(), count)
        assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == [
            i < count for i in range(2)
        ]
        torch.manual_seed(0)
        label_logits(model, tokenizer(TEXTS[:3])["input_ids"], [1, 2, 3]).sum().backward()
        found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        return found

    none = gradients(0)
    for count in (1, 2, 0):
        assert all(map(torch.equal, gradients(count), none))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the plan depends on its memory")
@pytest.mark.parametrize("effective", [16, 6, 11])
def test_with_memory_to_spare_nothing_is_cut(model, tokenizer, config, effective):
    plan = plan_batches(
        model, tokenizer, TEXTS, dataclasses.replace(config, effective_batch_size=effective)
    )
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps) == (effective, 1)
    longest = sum(len(tokenizer(text + "\nTopic:")["input_ids"]) for text in TEXTS[-effective:])
    assert plan.checkpointed_layers(2, longest) == 0
    assert "0 of 2 layers checkpointed" in plan.reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the plan depends on its memory")
def test_with_less_memory_layers_are_checkpointed_then_batches_cut_then_it_says_what_to_do(
    model, tokenizer, config, monkeypatch
):
    plans = []
    for mebibytes in (400, 8, 6, 4, 2, 1):
        monkeypatch.setattr(
            psutil,
            "virtual_memory",
            lambda mebibytes=mebibytes: SimpleNamespace(available=mebibytes * 2**20),
        )
        plan = plan_batches(model, tokenizer, TEXTS, config)
        assert plan.micro_batch_size * plan.gradient_accumulation_steps == 16
        assert plan.peak_gib * 2**10 <= mebibytes + 5
        plans.append((plan.micro_batch_size, plan.kept_activations))
    assert plans[0][0] == 16 and plans[-1][0] < 16
    assert plans == sorted(plans, reverse=True) and len(set(plans)) > 3
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**16))
    with pytest.raises(ModelError, match="not even one row of .* QLORA_MAX_LENGTH"):
        plan_batches(model, tokenizer, TEXTS, config)
