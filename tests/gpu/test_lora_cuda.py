"""What needs a GPU: float16 with the compiled passes, the masks drawn there, checkpointing, and plans within a memory cap."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralConfig

from qlora_helpers.batching import checkpoint_layers, plan_encoded
from qlora_helpers.lora import fuse_lora
from qlora_helpers.packing import use_packed_attention
from qlora_helpers.passes import keep_mask
from qlora_helpers.scoring import label_logits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ROWS = [[(7 * i + j) % 64 for j in range(3 + 5 * i)] for i in range(8)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.05,
    )
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    return folder


def lora_model(checkpoint, dropout) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float16,
        device_map={"": 0},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float16,
        ),
    )
    torch.manual_seed(1)
    model = get_peft_model(
        base,
        LoraConfig(
            r=8,
            lora_alpha=16,
            lora_dropout=dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model.train()


def gradients(model, seed=0, one_by_one=False) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    with torch.autocast("cuda", torch.float16):
        if one_by_one:
            logits = torch.cat(
                [model(torch.tensor([row]).cuda()).logits[:, -1].float() for row in ROWS]
            )
        else:
            logits = label_logits(model, ROWS, list(range(64)))
        loss = cross_entropy(logits, torch.arange(8).cuda())
    (loss * 1024).backward()
    return {name: p.grad / 1024 for name, p in model.named_parameters() if p.requires_grad}


def test_float16_gradients_are_those_of_pefts_own_layers_row_by_row(checkpoint):
    model = lora_model(checkpoint, 0.0)
    expected = gradients(model, one_by_one=True)
    use_packed_attention(model.get_base_model())
    found = gradients(fuse_lora(model))
    for name in expected:
        assert found[name].dtype == torch.float32
        assert (found[name] - expected[name]).norm() < 0.02 * expected[name].norm(), name


def test_checkpointing_replays_the_masks(checkpoint):
    model = fuse_lora(lora_model(checkpoint, 0.3))
    use_packed_attention(model.get_base_model())
    expected, other = gradients(model, seed=3), gradients(model, seed=4)
    checkpoint_layers(model, 2)
    found = gradients(model, seed=3)
    for name in expected:
        assert not torch.equal(other[name], expected[name])
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_keeps_the_right_share_everywhere_and_depends_on_the_seed_alone(compiled):
    draw = torch.compile(keep_mask, dynamic=True) if compiled else keep_mask
    x = torch.empty(4096, 1024, device="cuda", dtype=torch.float16)
    masks = [draw(x, 0.05, seed).float() for seed in (7, 8, 2**31 - 2)]
    torch.rand(3, device="cuda")
    assert torch.equal(draw(x, 0.05, 7).float(), masks[0])
    for mask in masks:
        assert mask.mean().item() == pytest.approx(0.95, abs=0.0005)
        for lines in (mask.mean(0), mask.mean(1)):  # as a binomial share would scatter
            expected = (0.05 * 0.95 / (mask.numel() / len(lines))) ** 0.5
            assert lines.std().item() == pytest.approx(expected, rel=0.1)
    for one, other in (
        (masks[0], masks[1]),
        (masks[0], masks[2]),
        (masks[0][:, 1:], masks[0][:, :-1]),
        (masks[0][1:], masks[0][:-1]),
    ):
        assert ((1 - one) * (1 - other)).mean().item() == pytest.approx(
            0.05**2, rel=0.05
        )  # independent


def test_a_plan_fits_the_memory_it_is_given(checkpoint):
    """Caps at which nothing, a part, and all of the activations fit: each plan's own longest step runs below its cap."""
    model = fuse_lora(lora_model(checkpoint, 0.05))
    use_packed_attention(model.get_base_model())
    rows = [[1] * (2000 - 10 * i) for i in range(16)]
    total = torch.cuda.get_device_properties(0).total_memory
    seen = set()
    try:
        for gib in (8.0, 1.0, 0.6, 0.4):
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)
            plan = plan_encoded(model, rows, [1, 2, 3, 4], 16)
            assert plan.peak_gib <= 0.9 * gib
            checkpoint_layers(
                model, plan.checkpointed_layers(2, sum(map(len, rows[: plan.micro_batch_size])))
            )
            label_logits(model, rows[: plan.micro_batch_size], [1, 2, 3, 4]).sum().backward()
            model.zero_grad(set_to_none=True)
            seen.add((plan.micro_batch_size, plan.kept_activations))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(seen) >= 3
