"""An adapter's folder from elsewhere is refused before anything of it is loaded."""

import dataclasses
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from qlora_helpers.adapter import load_adapter, save_adapter
from qlora_helpers.classifier import HeadlineClassifier
from qlora_helpers.config import PROFILES, RunConfig
from qlora_helpers.errors import ModelError
from qlora_helpers.model import attach_lora, load_base_model


def save(base_model: str, folder: Path) -> RunConfig:
    """Write an adapter that fits the tiny `base_model`, and return the config."""
    config = RunConfig(profile="cpu", **PROFILES["cpu"] | {"base_model": base_model})
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    save_adapter(attach_lora(load_base_model(config), lora, 0), config, folder)
    return config


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """A base model without an adapter, its config, and the folder of one that fits."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    config = save(tiny, folder)
    return load_base_model(config), config, folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved[2], tmp_path / "adapter")


def _config(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _weights(edit):
    def change(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        edit(tensors, min(tensors))
        save_file(tensors, path)

    return change


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def _a_header(shape, offsets):
    def change(folder):
        path = folder / "adapter_model.safetensors"
        names = sorted(load_file(path))
        part = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        text = json.dumps(dict.fromkeys(names, part)).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)

    return change


def _file(name: str, content):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)

    return change


def _torn(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _a_pipe(folder):
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")


def _numbers(value: float):
    return _weights(lambda tensors, name: tensors[name][0].fill_(value))


# Each change of an adapter's folder, and what the message says of it.
PICKLE = pickle.dumps(Payload())
REFUSED = {
    "a pickle beside": (_file("training_args.bin", PICKLE), "holds training_args.bin"),
    "an index": (_file("adapter_model.safetensors.index.json", b"{}"), "holds .*index.json"),
    "code of its own": (_file("own.py", b"import os; os.mkdir('ran')"), "holds own.py"),
    "a folder": (lambda folder: (folder / "inner").mkdir(), "holds inner"),
    "code by its config": (_config(auto_map={"AutoModel": "a--own.Own"}), "its auto_map"),
    "a class to import": (_config(auto_mapping={"parent_library": "os"}), "its auto_mapping"),
    "trusting remote code": (_config(trust_remote_code=True), "its trust_remote_code"),
    "a link to a device": (
        lambda folder: (folder / "README.md").symlink_to("/dev/zero"),
        "Not an ordinary file",
    ),
    "a terabyte": (
        lambda folder: os.truncate(folder / "adapter_model.safetensors", 2**40),
        "longer than 4,294,967,296 bytes",
    ),
    "a head that classifies": (_config(task_type="SEQ_CLS"), "its task_type"),
    "a scale of words": (_config(use_rslora="no"), "its use_rslora"),
    "not a number": (_numbers(float("nan")), "lora_A.weight holds NaN"),
    "an infinite number": (_numbers(float("inf")), "lora_A.weight holds NaN, or an infinite"),
    "a huge number": (_numbers(1e30), "lora_A.weight holds .* huge number"),
    "another base model": (_config(base_model_name_or_path="a/b"), "was made for 'a/b'"),
    "no base model": (_config(base_model_name_or_path=None), "base_model is None: it must be text"),
    "another method": (_config(peft_type="IA3"), "is not of LoRA"),
    "a huge rank": (_config(r=10**9), "its r is '1000000000'"),
    "another rank": (_config(r=8), r"not \[(8, \d+|\d+, 8)\]"),
    "a scale that is not a number": (_config(lora_alpha=float("nan")), "its lora_alpha is 'nan'"),
    "a dropout above 1": (_config(lora_dropout=1.5), "its lora_dropout is '1.5'"),
    "an expression for targets": (_config(target_modules="(a+)+$"), "its target_modules"),
    "other layers": (_config(target_modules=["q_proj"]), "differ at .*model.layers.0.mlp"),
    "no such layers": (_config(target_modules=["c_attn"]), "no layers named"),
    "no layers": (_config(target_modules=[]), "no layers named"),
    "layers multiplied": (_config(layer_replication=[[0, 10**6]]), "its layer_replication"),
    "whole modules": (_config(modules_to_save=["lm_head"]), "its modules_to_save"),
    "a start that computes": (_config(init_lora_weights="pissa"), "its init_lora_weights"),
    "a weight missing": (_weights(lambda tensors, name: tensors.pop(name)), "differ at base_model"),
    "a weight too many": (
        _weights(lambda tensors, name: tensors.update(lm_head=torch.zeros(8, 8))),
        "differ at lm_head",
    ),
    "a weight too wide": (
        _weights(lambda tensors, name: tensors.update({name: torch.zeros(4, 10_000)})),
        r"is \[4, 10000\], not",
    ),
    "a weight of integers": (
        _weights(lambda tensors, name: tensors.update({name: tensors[name].int()})),
        "is torch.int32, not of floats",
    ),
    "a shape of 4 PiB": (_a_header([2**25, 2**25], [0, 2**52]), ""),
    "a shape that overflows": (_a_header([2**62, 2**62], [0, 8]), ""),
    "a torn file": (_torn, ""),
    "a config that is no JSON": (_file("adapter_config.json", b"{"), "config.json cannot be read"),
    "a config nested without end": (
        _file("adapter_config.json", b"[" * 100_000),
        "config.json cannot be read",
    ),
    "a number without end": (
        _file("adapter_config.json", b"9" * 5000),
        "config.json cannot be read",
    ),
    "a config of another kind": (_file("adapter_config.json", b"[1]"), "is not a JSON object"),
    "a config of a gigabyte": (
        lambda folder: os.truncate(folder / "adapter_config.json", 2**30),
        "longer than 1,048,576 bytes",
    ),
    "a pipe for a config": (_a_pipe, "Not an ordinary file"),
    "nothing": (lambda folder: shutil.rmtree(folder), "qlora_config.json is missing"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_plain_lora_of_this_base_model_is_refused(saved, folder, monkeypatch, kind):
    base, (change, said) = saved[0], REFUSED[kind]
    change(folder)
    monkeypatch.chdir(folder.parent)
    before = {name: id(module) for name, module in base.named_modules()}
    monkeypatch.setattr(PeftModel, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    message = rf"the adapter in .*/adapter is refused: .*{said}.*Nothing of it was loaded"
    with pytest.raises(ModelError, match=message):
        load_adapter(base, folder)
    assert not (folder.parent / "ran").exists()
    assert {name: id(module) for name, module in base.named_modules()} == before


def test_the_same_adapter_gives_the_same_folder_bit_for_bit(saved, tmp_path):
    _, config, folder = saved
    save(config.base_model, tmp_path / "adapter")
    names = ["adapter_config.json", "adapter_model.safetensors", "qlora_config.json"]
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == names
    for name in names:
        assert (tmp_path / "adapter" / name).read_bytes() == (folder / name).read_bytes()
    # PEFT holds sets, whose order follows the process
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert len(settings["target_modules"]) == 14
    assert all(value == sorted(value) for value in settings.values() if isinstance(value, list))


def test_a_folder_of_something_else_is_not_replaced(saved, folder):
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(ModelError, match="thesis.txt is no part of an adapter: name another"):
        save(saved[1].base_model, folder)
    assert (folder / "thesis.txt").read_text() == "mine"
    (folder / "thesis.txt").unlink()
    save(saved[1].base_model, folder)


def test_weights_that_were_not_saved_or_loaded_whole_are_named(
    saved, folder, monkeypatch, tmp_path
):
    """PEFT itself would only warn."""
    _, config, _ = saved
    model = load_adapter(load_base_model(config), folder)
    kept = PeftModel.save_pretrained

    def save_less(self, target, **options):
        kept(self, target, **options)
        _weights(lambda tensors, name: tensors.pop(name))(Path(target))

    monkeypatch.setattr(PeftModel, "save_pretrained", save_less)
    with pytest.raises(ModelError, match="new was not written whole: base_model.* differs"):
        save_adapter(model, config, tmp_path / "new")
    load = PeftModel.from_pretrained

    def load_other(*arguments):
        loaded = load(*arguments)
        next(p for name, p in loaded.named_parameters() if "lora_B" in name).data += 1
        return loaded

    monkeypatch.setattr(PeftModel, "from_pretrained", load_other)
    with pytest.raises(ModelError, match="adapter was not loaded whole: base_model.* differs"):
        load_adapter(load_base_model(config), folder)


def test_an_adapter_that_names_its_own_folder_as_base_model_is_refused(saved, folder):
    _config(base_model_name_or_path=str(folder), modules_to_save=None)(folder)
    shutil.copytree(saved[1].base_model, folder, dirs_exist_ok=True)
    with pytest.raises(ModelError, match="cannot be loaded: it holds adapter_config.json"):
        HeadlineClassifier.from_adapter(folder)


def test_a_base_model_with_code_of_its_own_is_not_run(config, tmp_path):
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    (tmp_path / "own.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base_model(dataclasses.replace(config, base_model=str(tmp_path)))
    assert not (tmp_path / "ran").exists()
