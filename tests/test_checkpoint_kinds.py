"""The two kinds of checkpoint that profile t4 loads, float16 in shards and NF4, as tiny random Mistrals with Mistral v0.1's tokenizer."""

import copy
import dataclasses
import json
import shutil
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import constants
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaTokenizer,
    MistralConfig,
    MistralForCausalLM,
    set_seed,
)

from qlora_helpers.colab.estimates import model_size
from qlora_helpers.colab.reach import reach
from qlora_helpers.config import LABELS, PROFILES, RunConfig
from qlora_helpers.model import compute_dtype, load_base_model, load_tokenizer
from qlora_helpers.prompts import build_prompt, encode_prompts, label_token_ids, label_words
from qlora_helpers.scoring import label_logits

sentencepiece = pytest.importorskip(
    "sentencepiece", reason="sentencepiece, which reads Mistral's tokenizer, is not installed"
)
MISTRAL_COMMON = "mistral-common==1.13.1"  # for one file; imported, it would change which tokenizer Transformers takes
TEXTS = [
    "Rain stops play in Leeds",
    "Oil climbs as the port of Dhaka closes for a third week",
    "Browser closes eleven holes",
]
# as mistralai/Mistral-7B-v0.1 and unsloth/mistral-7b-bnb-4bit say it
TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": None,
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": True,
    "model_max_length": 10**30,
    "sp_model_kwargs": {},
}
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float16",
}


@pytest.fixture(scope="module")
def tokenizer_file(request):
    """Mistral v0.1's sentencepiece model, which a package on PyPI ships."""
    folder = request.config.cache.mkdir(MISTRAL_COMMON)
    file = folder / "mistral_common" / "data" / "tokenizer.model.v1"
    if not file.is_file():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--upgrade",
            "--target",
            folder,
            MISTRAL_COMMON,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            pytest.skip(
                f"{MISTRAL_COMMON} cannot be installed here: {done.stderr.strip().splitlines()[-1]}"
            )
    return file


@pytest.fixture(scope="module")
def sharded(tokenizer_file, tmp_path_factory):
    """Float16 in three shards with an index, and both forms of the tokenizer: the files of mistralai/Mistral-7B-v0.1."""
    folder = tmp_path_factory.mktemp("mistral") / "sharded"
    set_seed(0)
    MistralForCausalLM(
        MistralConfig(
            vocab_size=32000,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    ).half().save_pretrained(folder, max_shard_size="3MB")
    shutil.copy(tokenizer_file, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    LlamaTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"transformers_version": "4.34.0.dev0"})
    )
    assert (
        len(list(folder.glob("model-*-of-00003.safetensors"))) == 3
        and (folder / "model.safetensors.index.json").exists()
    )
    return folder


@pytest.fixture(scope="module")
def quantised(sharded, tmp_path_factory):
    """The same in NF4 as one file, quantised by somebody else: the files of unsloth/mistral-7b-bnb-4bit."""
    folder = tmp_path_factory.mktemp("mistral") / "quantised"
    nf4 = BitsAndBytesConfig(**NF4)
    AutoModelForCausalLM.from_pretrained(
        sharded, dtype=torch.float16, quantization_config=nf4
    ).save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert NF4.items() <= said.items() and said["quant_method"] == "bitsandbytes"
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(sharded / name, folder)
    assert (folder / "model.safetensors").exists()
    return folder


@pytest.fixture(params=["sharded", "quantised"])
def checkpoint(request):
    return request.getfixturevalue(request.param)


def _config(folder) -> RunConfig:
    return RunConfig(profile="t4", **PROFILES["t4"] | {"base_model": str(folder)})


def _dequantised(model, like):
    """`like`, with the weights of `model` taken out of NF4."""
    plain = copy.deepcopy(like).to(model.dtype)
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight, module.weight.quant_state)
            plain.get_submodule(name).weight.data = weight.to(model.dtype)
    return plain


def _logits(model, config):
    tokenizer = load_tokenizer(config)
    return label_logits(
        model, encode_prompts(tokenizer, TEXTS, 256), label_token_ids(tokenizer, LABELS)
    ).float()


def test_a_checkpoint_answers_as_its_own_weights_do_within_nf4s_error(checkpoint, sharded):
    config, exact = (
        _config(checkpoint),
        MistralForCausalLM.from_pretrained(sharded, dtype=torch.float32).eval(),
    )
    model = load_base_model(config)
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }
    assert len(linear) == 2 * 7
    for name, module in linear.items():
        state = module.weight.quant_state
        assert (module.weight.quant_type, state.nested, state.blocksize, module.compute_dtype) == (
            "nf4",
            True,
            64,
            compute_dtype()[0],
        )
        weight, dequantised = (
            exact.get_submodule(name).weight,
            bnb.functional.dequantize_4bit(module.weight, state).float(),
        )
        # the widest gap of NF4's grid is 0.304 of a block's largest weight; a step of the 8-bit scales adds a little
        largest = weight.reshape(-1, 64).abs().amax(1, keepdim=True)
        assert ((dequantised - weight).reshape(-1, 64).abs() <= 0.17 * largest).all()
        assert 0.05 < (dequantised - weight).norm() / weight.norm() < 0.12
    found, same, full = (
        _logits(model, config),
        _logits(_dequantised(model, exact), config),
        _logits(exact, config),
    )
    torch.testing.assert_close(
        found, same, atol=2e-2 if model.dtype == torch.bfloat16 else 1e-4, rtol=1e-2
    )
    assert {p.dtype for p in model.parameters()} == {torch.uint8, compute_dtype()[0]}
    error, other = (
        ((found - logits).norm() / full.norm()).item() for logits in (full, full.flip(1))
    )
    assert 0 < error < 0.5 < other  # of random weights; those of another label are far away


def test_both_kinds_answer_alike(sharded, quantised):
    torch.testing.assert_close(
        *(
            _logits(load_base_model(_config(folder)), _config(folder))
            for folder in (sharded, quantised)
        )
    )


def test_prompts_and_label_tokens_are_mistrals(checkpoint, tokenizer_file):
    tokenizer = load_tokenizer(_config(checkpoint))
    assert label_words(tokenizer, LABELS) == [" World", " Sports", " Business", " Sci/Tech"]
    assert label_token_ids(tokenizer, LABELS) == [3304, 13184, 7711, 6989]
    (ids,) = encode_prompts(tokenizer, ["Oil climbs"], 256)
    assert ids == [1, 16181, 6423, 1816, 13, 25462, 28747]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<s>",
        "▁Oil",
        "▁clim",
        "bs",
        "<0x0A>",
        "Topic",
        ":",
    ]
    own = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    texts = [*TEXTS, 'Zürich\'s €5 & "quoted" deal -- 3% up', "Ünïcødé 🏆 ..."]
    assert encode_prompts(tokenizer, texts, 256) == [
        [1, *own.encode(build_prompt(text))] for text in texts
    ]
    assert (len(tokenizer), tokenizer.padding_side, tokenizer.pad_token_id) == (32000, "right", 0)


def test_a_batch_of_different_lengths_answers_as_one_row_does(checkpoint):
    config = _config(checkpoint)
    model, tokenizer = load_base_model(config), load_tokenizer(config)
    encoded, ids = encode_prompts(tokenizer, TEXTS, 256), label_token_ids(tokenizer, LABELS)
    alone = torch.cat([label_logits(model, [row], ids) for row in encoded])
    torch.testing.assert_close(
        label_logits(model, encoded, ids),
        alone,
        atol=2e-2 if model.dtype == torch.bfloat16 else 1e-4,
        rtol=1e-3,
    )


def test_the_doctor_knows_the_memory_before_loading(checkpoint):
    size, model = (
        model_size(AutoConfig.from_pretrained(checkpoint)),
        load_base_model(_config(checkpoint)),
    )
    layers = [module.weight for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    stored = sum(
        w.nbytes + w.quant_state.absmax.nbytes + w.quant_state.state2.absmax.nbytes for w in layers
    )
    assert size.gib * 2**30 - 2 * size.other == pytest.approx(stored, rel=0.01)
    assert size.other == sum(p.numel() for p in model.parameters()) - sum(w.numel() for w in layers)


def test_the_doctor_knows_the_download(checkpoint, monkeypatch, tmp_path):
    hub = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("qlora_helpers.colab.hub.ANSWER_SECONDS", 300)
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    hub.repositories["account/mistral"] = files | {
        "consolidated.safetensors": b"x" * 10**6,
        "pytorch_model.bin": b"x" * 10**6,
    }
    found, _ = reach(dataclasses.replace(_config(checkpoint), base_model="account/mistral"))
    assert (found.verdict, found.download) == ("ok", sum(map(len, files.values()))), found
    assert model_size(found.config) == model_size(AutoConfig.from_pretrained(checkpoint))
    assert not list(tmp_path.rglob("*.safetensors"))
    hub.close()
