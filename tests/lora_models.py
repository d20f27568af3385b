"""Small models in NF4, with LoRA or without, as the library and PEFT load them."""

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float16",
}


def save_random(
    config_class, folder, dtype=torch.float32, vocab_size=64, max_shard_size="1GB", **choices
):
    """Write a random model of two layers, whose four heads share two keys and values."""
    torch.manual_seed(0)
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = config_class(vocab_size=vocab_size, **heads, **choices)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(
        folder, max_shard_size=max_shard_size
    )
    return folder


def save_tiny(config_class, tokenizer, folder, **choices) -> str:
    """Write a random model of two layers, with a tokenizer. Return its folder."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    save_random(config_class, folder, **sizes, **tokens, **choices)
    tokenizer.save_pretrained(folder)
    return str(folder)


def library_model(folder, dtype=torch.float32, nf4=True) -> PreTrainedModel:
    """Return the model in `folder` in eval mode, on the GPU if there is one."""
    quantised = BitsAndBytesConfig(**NF4 | {"bnb_4bit_compute_dtype": dtype})
    device = 0 if torch.cuda.is_available() else "cpu"
    options = {"quantization_config": quantised} if nf4 else {}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, **options
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # has no backward
    return model.eval()


def lora_config(**choices) -> LoraConfig:
    choices = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | choices
    return LoraConfig(task_type="CAUSAL_LM", **choices)


def with_random_b(model: PeftModel, std=0.1) -> PeftModel:
    """Make each B random: with B at zero, A would have no gradient and no effect."""
    torch.manual_seed(5)
    for name, weight in model.named_parameters():
        if "lora_B" in name and name.endswith("weight"):
            torch.nn.init.normal_(weight, std=std)
    return model


def lora_model(folder, dropout=0.0, dtype=torch.float32, nf4=True, **choices) -> PeftModel:
    """Return the model in `folder` with PEFT's own LoRA layers, in training mode."""
    base = library_model(folder, dtype, nf4)
    torch.manual_seed(1)
    model = get_peft_model(base, lora_config(lora_dropout=dropout, **choices))
    return with_random_b(model).train()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
