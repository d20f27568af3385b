"""Both forms of the base model of profile t4: tiny Mistrals in float16 shards, and in NF4."""

import copy
import json
import shutil
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from filelock import FileLock
from lora_models import NF4, save_random
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaTokenizer,
    MistralConfig,
    MistralForCausalLM,
)

from qlora_helpers.config import LABELS, PROFILES, RunConfig
from qlora_helpers.model import compute_dtype, load_base_model, load_tokenizer
from qlora_helpers.prompts import build_prompt, encode_prompts, label_token_ids, label_words
from qlora_helpers.scoring import label_logits

sentencepiece = pytest.importorskip("sentencepiece", reason="it reads Mistral's tokenizer")
# for one file; imported, it would change which tokenizer Transformers takes
MISTRAL_COMMON = "mistral-common==1.13.1"
TEXTS = [
    "Rain stops play in Leeds",
    "Oil climbs as the port of Dhaka closes for a third week",
    "Browser closes eleven holes",
]
# as mistralai/Mistral-7B-v0.1 and unsloth/mistral-7b-bnb-4bit have it
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
ROUNDING = 2e-2 if compute_dtype()[0] == torch.bfloat16 else 1e-4


@pytest.fixture(scope="module")
def tokenizer_file(request):
    """Mistral v0.1's sentencepiece model, which a package on PyPI ships."""
    folder = request.config.cache.mkdir(MISTRAL_COMMON)
    file = folder / "mistral_common" / "data" / "tokenizer.model.v1"
    with FileLock(folder / ".lock"):  # another process may run tests of this file too
        if not file.is_file():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
            command = [*pip, "--target", folder, MISTRAL_COMMON]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if done.returncode:
                said = done.stderr.strip().splitlines()[-1]
                pytest.skip(f"{MISTRAL_COMMON} cannot be installed here: {said}")
    return file


@pytest.fixture(scope="module")
def sharded(tokenizer_file, tmp_path_factory):
    """Float16 in three shards, with both forms of the tokenizer, as mistralai/Mistral-7B-v0.1."""
    folder = tmp_path_factory.mktemp("mistral") / "sharded"
    sizes = {"vocab_size": 32000, "hidden_size": 64, "intermediate_size": 192}
    options = {"max_shard_size": "3MB", "initializer_range": 0.2}
    save_random(MistralConfig, folder, torch.float16, **sizes, **options)
    shutil.copy(tokenizer_file, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    LlamaTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    old = json.loads((folder / "config.json").read_text()) | {"transformers_version": "4.34.0.dev0"}
    (folder / "config.json").write_text(json.dumps(old))
    assert len(list(folder.glob("model-*-of-00003.safetensors"))) == 3
    return folder


@pytest.fixture(scope="module")
def quantised(sharded, tmp_path_factory):
    """The same in NF4 as one file, quantised elsewhere, as unsloth/mistral-7b-bnb-4bit."""
    folder = tmp_path_factory.mktemp("mistral") / "quantised"
    nf4 = BitsAndBytesConfig(**NF4)
    model = AutoModelForCausalLM.from_pretrained(
        sharded, dtype=torch.float16, quantization_config=nf4
    )
    model.save_pretrained(folder)
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
    encoded = encode_prompts(tokenizer, TEXTS, 256)
    return label_logits(model, encoded, label_token_ids(tokenizer, LABELS))


def test_a_checkpoint_answers_as_its_own_weights_do_within_nf4s_error(checkpoint, sharded):
    config = _config(checkpoint)
    exact = MistralForCausalLM.from_pretrained(sharded, dtype=torch.float32).eval()
    model = load_base_model(config)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(linear) == 2 * 7
    for name, module in linear.items():
        state = module.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
        assert module.compute_dtype == compute_dtype()[0]
        weight = exact.get_submodule(name).weight
        error = bnb.functional.dequantize_4bit(module.weight, state).float() - weight
        # the widest gap of NF4's grid is 0.304 of a block's largest weight; a step of the 8-bit
        # scales adds a little
        largest = weight.reshape(-1, 64).abs().amax(1, keepdim=True)
        assert (error.reshape(-1, 64).abs() <= 0.17 * largest).all()
        assert 0.05 < error.norm() / weight.norm() < 0.12
    found, full = _logits(model, config), _logits(exact, config)
    same = _logits(_dequantised(model, exact), config)
    torch.testing.assert_close(found, same, atol=ROUNDING, rtol=1e-2)
    assert {p.dtype for p in model.parameters()} == {torch.uint8, compute_dtype()[0]}
    # the logits of another label are far away
    assert 0 < (found - full).norm() < 0.5 * full.norm() < (found - full.flip(1)).norm()


def test_both_kinds_answer_alike(sharded, quantised):
    answers = [_logits(load_base_model(_config(f)), _config(f)) for f in (sharded, quantised)]
    torch.testing.assert_close(*answers)


def test_prompts_and_label_tokens_are_mistrals(checkpoint, tokenizer_file):
    tokenizer = load_tokenizer(_config(checkpoint))
    assert label_words(tokenizer, LABELS) == [" World", " Sports", " Business", " Sci/Tech"]
    assert label_token_ids(tokenizer, LABELS) == [3304, 13184, 7711, 6989]
    (ids,) = encode_prompts(tokenizer, ["Oil climbs"], 256)
    assert ids == [1, 16181, 6423, 1816, 13, 25462, 28747]
    tokens = ["<s>", "▁Oil", "▁clim", "bs", "<0x0A>", "Topic", ":"]
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    own = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    texts = [*TEXTS, 'Zürich\'s €5 & "quoted" deal -- 3% up', "Ünïcødé 🏆 ..."]
    expected = [[1, *own.encode(build_prompt(text))] for text in texts]
    assert encode_prompts(tokenizer, texts, 256) == expected
    assert (len(tokenizer), tokenizer.padding_side, tokenizer.pad_token_id) == (32000, "right", 0)


def test_a_batch_of_different_lengths_answers_as_one_row_does(checkpoint):
    config = _config(checkpoint)
    model, tokenizer = load_base_model(config), load_tokenizer(config)
    ids = label_token_ids(tokenizer, LABELS)
    encoded = encode_prompts(tokenizer, TEXTS, 256)
    alone = torch.cat([label_logits(model, [row], ids) for row in encoded])
    torch.testing.assert_close(_logits(model, config), alone, atol=ROUNDING, rtol=1e-3)
