"""fuse_lora on a GPU: float16 below autocast as the Trainer runs it, checkpointing, and no waiting for the device."""

import pytest
import torch
from fused_lora import _mask, fuse_lora
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, initializer_range=0.05)
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    return folder


def lora_model(checkpoint, dropout) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16, device_map={"": 0}, quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float16))
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=ALL_LINEAR))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model.train()


def gradients(model, seed=0) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(0)).cuda()
    torch.manual_seed(seed)
    model.zero_grad()
    with torch.autocast("cuda", torch.float16):
        loss = cross_entropy(model(ids).logits[:, -1].float(), ids[:, 0])
    (loss * 1024).backward()
    return {name: p.grad / 1024 for name, p in model.named_parameters() if p.requires_grad}


def test_float16_gradients_equal_pefts_own(checkpoint):
    model = lora_model(checkpoint, 0.0)
    expected = gradients(model)
    found = gradients(fuse_lora(model))
    for name in expected:
        assert found[name].dtype == torch.float32
        assert (found[name] - expected[name]).norm() < 0.02 * expected[name].norm(), name


def test_checkpointing_replays_the_masks(checkpoint):
    model = fuse_lora(lora_model(checkpoint, 0.3))
    expected, other = gradients(model, seed=3), gradients(model, seed=4)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, seed=3)
    for name in expected:
        assert not torch.equal(other[name], expected[name])
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6)


def test_a_mask_keeps_the_right_share_and_depends_on_the_seed_alone():
    x = torch.empty(4096, 1024, device="cuda", dtype=torch.float16)
    mask = _mask(x, 0.05, 7)
    assert mask.float().mean().item() == pytest.approx(0.95, abs=0.001)
    torch.rand(3, device="cuda")
    assert torch.equal(mask, _mask(x, 0.05, 7)) and not torch.equal(mask, _mask(x, 0.05, 8))


def test_no_layer_waits_for_the_device(checkpoint):
    mlp = fuse_lora(lora_model(checkpoint, 0.05)).get_base_model().model.layers[0].mlp
    x = torch.randn(2, 16, 256, device="cuda", dtype=torch.float16, requires_grad=True)
    mlp(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mlp(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
