"""Base models of other families: right in packed batches to 1e-5, or refused by name."""

import dataclasses

import pytest
import torch
from lora_models import gradients, library_model, lora_config, with_random_b
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from qlora_helpers.adapter import save_adapter
from qlora_helpers.config import PROFILES, RunConfig
from qlora_helpers.errors import ModelError
from qlora_helpers.fast.plan import checkpoint_layers
from qlora_helpers.model import attach_lora, load_base_model
from qlora_helpers.scoring import _score_after, label_logits

# bitsandbytes reads NF4 on a CPU rightly where a layer's inputs are a multiple of 64
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
# families that need nothing beside TINY, and what others need; None takes a field away
PLAIN = (
    "llama mistral qwen2 qwen3 gemma phi phi3 olmo olmo2 smollm3 starcoder2 gpt_neox glm glm4 "
    "helium arcee ernie4_5 hunyuan_v1_dense ministral3"
)
RIGHT = dict.fromkeys(PLAIN.split(), {}) | {
    "gemma3_text": SLIDING | {"sliding_window": 256},
    "olmo3": SLIDING | {"sliding_window": 256},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "ministral": {"sliding_window": 256},
    "exaone4": SLIDING | {"sliding_window": 256},
}
DIFFER = "logits of two rows in one batch differ by"
LAYERS = "no attribute 'layers'"
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
LINEAR = {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
SHARED = {"shared_expert_intermediate_size": 64}
# and what the message says of it
REFUSED = {
    # rows of a packed batch read each other
    "stablelm": ({}, DIFFER),
    "nemotron": ({}, DIFFER),
    "lfm2": (
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        DIFFER,
    ),
    "mamba": ({"state_size": 8}, "does not run"),
    "mamba2": ({"state_size": 8, "num_heads": 8, "n_groups": 1}, DIFFER),
    "jamba": ({}, DIFFER),
    "falcon_h1": (MAMBA | {"mamba_n_groups": 1}, DIFFER),
    "qwen3_next": (
        EXPERTS
        | SHARED
        | LINEAR
        | {"linear_num_value_heads": 2, "layer_types": ["linear_attention", "full_attention"]},
        DIFFER,
    ),
    "recurrent_gemma": ({}, DIFFER),
    # the head is not all that stands between hidden states and logits
    "granite": ({"logits_scaling": 8.0}, DIFFER),
    "cohere": ({"logit_scale": 0.25}, DIFFER),
    "cohere2": (SLIDING | {"logit_scale": 0.25}, DIFFER),
    # attention is more than a softmax over the tokens before
    "gemma2": ({"sliding_window": 256}, "softcap or sinks"),
    "gpt_oss": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 256},
        "softcap or sinks",
    ),
    # decoder layers have another place
    "falcon": ({"head_dim": None, "num_key_value_heads": None}, LAYERS),
    "bloom": ({}, LAYERS),
    "gptj": ({"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, LAYERS),
    "gpt2": ({}, LAYERS),
    "opt": ({"word_embed_proj_dim": 64, "ffn_dim": 64}, LAYERS),
    "rwkv": ({}, LAYERS),
    # its experts are not linear layers
    "mixtral": ({"num_local_experts": 4}, "experts"),
    "qwen2_moe": (EXPERTS | SHARED, "experts"),
    "qwen3_moe": (EXPERTS, "experts"),
    "olmoe": (EXPERTS, "experts"),
    # the decoder is not at `base_model`
    "llama4_text": ({}, "does not run"),
}
CONFIG = RunConfig(profile="cpu", **PROFILES["cpu"])
LABEL_IDS = [5, 70, 33, 101]
EVERYTHING = list(range(128))
_GENERATOR = torch.Generator().manual_seed(3)
# four rows of token ids, one of them a single token
ROWS = [torch.randint(3, 128, (n,), generator=_GENERATOR).tolist() for n in (14, 5, 9, 1)]


def save_tiny(family: str, choices: dict, folder) -> RunConfig:
    """Write a random model of `family`, with weights so large that every part of it is felt."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no family {family!r}")
    fields = {name: value for name, value in (TINY | choices).items() if value is not None}
    config = AutoConfig.for_model(family, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.state_dict().values():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    model.save_pretrained(folder)
    return dataclasses.replace(CONFIG, base_model=str(folder))


@pytest.fixture(scope="module", params=RIGHT)
def right(request, tmp_path_factory) -> RunConfig:
    """The config of a run with a tiny model of a family that is right."""
    return save_tiny(request.param, RIGHT[request.param], tmp_path_factory.mktemp(request.param))


def library_logits(model, rows) -> torch.Tensor:
    """(rows, vocabulary): of each row alone, at its last token, by the library's own forward."""
    rows = [torch.tensor([row], device=model.device) for row in rows]
    return torch.cat([model(row, use_cache=False).logits[:, -1] for row in rows])


def assert_same_probabilities(found, logits):
    torch.testing.assert_close(found.softmax(1), logits.float().softmax(1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_family_is_right_packed_alone_and_after_a_prefix(right):
    model, library = load_base_model(right), library_model(right.base_model)
    expected = library_logits(library, ROWS)
    assert_same_probabilities(label_logits(model, ROWS, EVERYTHING), expected)
    for row, logits in zip(ROWS, expected, strict=True):
        assert_same_probabilities(label_logits(model, [row], EVERYTHING), logits[None])
    prefix = (ROWS[0] + ROWS[2]) * 12  # 276 tokens, more than the window
    expected = library_logits(library, [prefix + row for row in ROWS])
    with _score_after(model, prefix, EVERYTHING) as logits_of:
        assert_same_probabilities(logits_of(ROWS), expected)


def test_lora_gives_pefts_values_and_gradients(right, tmp_path):
    model = with_random_b(attach_lora(load_base_model(right), lora_config(r=4), seed=1))
    save_adapter(model, right, tmp_path / "adapter")
    library = library_model(right.base_model)
    plain = PeftModel.from_pretrained(library, tmp_path / "adapter", is_trainable=True)
    targets = torch.tensor([1, 0, 3, 2], device=model.device)
    logits = library_logits(plain.train(), ROWS)[:, LABEL_IDS]
    cross_entropy(logits, targets).backward()
    expected = gradients(plain)
    assert len(expected) >= 2 * 2 * 2  # A and B beside two linear layers or more, in two layers
    for checkpointed in (0, 2):
        checkpoint_layers(model.train(), checkpointed)
        model.zero_grad()
        found = label_logits(model, ROWS, LABEL_IDS)
        cross_entropy(found, targets).backward()
        assert_same_probabilities(found, logits)
        assert gradients(model).keys() == expected.keys()
        for name, gradient in gradients(model).items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_is_refused_by_name(family, tmp_path):
    choices, why = REFUSED[family]
    run = save_tiny(family, choices, tmp_path)
    with pytest.raises(ModelError, match=f"is of the family '{family}', .*{why}"):
        load_base_model(run)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_prompt_may_be_as_long_as_the_models_window(family, tmp_path):
    run = save_tiny(family, RIGHT[family] | {"sliding_window": 64}, tmp_path)
    load_base_model(dataclasses.replace(run, max_length=64))
    with pytest.raises(ModelError, match=f"'{family}'.* 64 tokens.* set QLORA_MAX_LENGTH to 64"):
        load_base_model(dataclasses.replace(run, max_length=65))
