"""An adapter's folder from elsewhere is refused before anything of it is loaded."""

import dataclasses
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from qlora_helpers.adapter import load_adapter, save_adapter
from qlora_helpers.config import PROFILES, RunConfig
from qlora_helpers.errors import ModelError
from qlora_helpers.model import attach_lora, load_base_model


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """A base model without an adapter, its config, and the folder of one that fits."""
    config = RunConfig(**(PROFILES["cpu"] | {"profile": "cpu", "base_model": tiny}))
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(attach_lora(load_base_model(config), lora, 0), config, folder)
    return load_base_model(config), config, folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    copy = tmp_path / "adapter"
    copy.mkdir()
    for path in saved[2].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def _config(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _weights(edit):
    def change(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        edit(tensors, sorted(tensors))
        save_file(tensors, path)

    return change


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def _pickled(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))


def _pickled_beside(folder):
    (folder / "training_args.bin").write_bytes(pickle.dumps(Payload()))


def _an_index(folder):
    (folder / "adapter_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "../../../etc/passwd"}})
    )


def _a_header(shape, offsets):
    def change(folder):
        path = folder / "adapter_model.safetensors"
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        header.pop("__metadata__", None)
        header = {
            name: {"dtype": "F32", "shape": shape, "data_offsets": offsets} for name in header
        }
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)

    return change


def _torn(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _code(folder):
    (folder / "modeling_own.py").write_text("import os; os.mkdir('ran')")
    _config(auto_map={"AutoModel": "modeling_own.Own"})(folder)


def _a_pipe(folder):
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")


def _drop(tensors, names):
    del tensors[names[0]]


def _grow(tensors, names):
    tensors[names[0]] = torch.zeros(4, 10_000)


def _widen(tensors, names):
    tensors[names[0]] = tensors[names[0]].to(torch.int32)


def _stray(tensors, names):
    tensors["base_model.model.lm_head.weight"] = torch.zeros(8, 8)


REFUSED = {
    "weights as a pickle": (_pickled, "it holds adapter_model.bin"),
    "a pickle beside": (_pickled_beside, "it holds training_args.bin"),
    "an index that leads out of the folder": (
        _an_index,
        "it holds adapter_model.safetensors.index.json",
    ),
    "code of its own": (_code, "it holds modeling_own.py"),
    "code by its config": (
        _config(auto_map={"AutoModel": "somewhere--own.Own"}),
        "asks for auto_map=",
    ),
    "a class to import": (
        _config(auto_mapping={"base_model_class": "X", "parent_library": "os"}),
        "asks for auto_mapping=",
    ),
    "trusting remote code": (_config(trust_remote_code=True), "asks for trust_remote_code="),
    "another base model": (
        _config(base_model_name_or_path="someone/other-7b"),
        "made for the base model 'someone/other-7b'",
    ),
    "no base model": (_config(base_model_name_or_path=None), "made for the base model 'None'"),
    "another method": (_config(peft_type="IA3"), "is not of LoRA"),
    "a huge rank": (_config(r=10**9), "its rank '1000000000'"),
    "a rank that is not the weights'": (
        _config(r=8),
        r"where the base model needs \[(8, \d+|\d+, 8)\]",
    ),
    "a scale that is not a number": (_config(lora_alpha=float("nan")), "its lora_alpha is 'nan'"),
    "an expression for targets": (_config(target_modules="(a+)+$"), "target_modules is not a list"),
    "other layers": (
        _config(target_modules=["q_proj"]),
        "differ at base_model.model.model.layers.0.mlp",
    ),
    "no such layers": (_config(target_modules=["c_attn"]), "no layers named"),
    "layers multiplied": (_config(layer_replication=[[0, 10**6]]), "asks for layer_replication="),
    "whole modules": (_config(modules_to_save=["lm_head"]), "asks for modules_to_save="),
    "a start that computes": (_config(init_lora_weights="pissa"), "init_lora_weights"),
    "a weight missing": (_weights(_drop), "differ at base_model"),
    "a weight too many": (_weights(_stray), "differ at base_model.model.lm_head.weight"),
    "a weight too wide": (_weights(_grow), r"is F32 \[4, 10000\], where the base model needs"),
    "a weight of integers": (_weights(_widen), "is I32"),
    "a shape of 4 PiB": (_a_header([2**25, 2**25], [0, 2**52]), "is refused"),
    "a shape that overflows": (_a_header([2**62, 2**62], [0, 8]), "is refused"),
    "a torn file": (_torn, "is refused"),
    "a config that is no JSON": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        "is refused",
    ),
    "a config nested without end": (
        lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000),
        "is refused",
    ),
    "a config of another kind": (
        lambda folder: (folder / "adapter_config.json").write_text("[1]"),
        "is not of LoRA",
    ),
    "a config of a gigabyte": (
        lambda folder: os.truncate(folder / "adapter_config.json", 2**30),
        "longer than a mebibyte",
    ),
    "a pipe for a config": (_a_pipe, "Not an ordinary file"),
    "nothing": (lambda folder: [path.unlink() for path in folder.iterdir()], "No such file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_plain_lora_of_this_base_model_is_refused(
    saved, folder, monkeypatch, tmp_path, kind
):
    (base, _, _), (change, said) = saved, REFUSED[kind]
    change(folder)
    monkeypatch.chdir(tmp_path)
    before = {name: id(module) for name, module in base.named_modules()}
    monkeypatch.setattr(
        PeftModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("it was loaded")
    )
    with pytest.raises(
        ModelError,
        match=rf"the adapter in .*/adapter (is refused: .*)?{said}.*Nothing of it was loaded",
    ):
        load_adapter(base, folder)
    assert (
        not (tmp_path / "ran").exists()
        and {name: id(module) for name, module in base.named_modules()} == before
    )


def test_what_fits_is_loaded_with_the_files_that_04_adds(saved, folder):
    _, config, _ = saved
    (folder / "README.md").write_text("a card")
    (folder / "calibration.json").write_text("{}")
    loaded = load_adapter(load_base_model(config), str(folder))
    expected = load_file(folder / "adapter_model.safetensors")
    found = {
        name.replace(".default", ""): p for name, p in loaded.named_parameters() if "lora_" in name
    }
    assert found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def test_a_folder_that_is_not_there_is_named(saved, tmp_path):
    with pytest.raises(
        ModelError,
        match=r"the adapter in .*/none is refused: No such file or directory. .*03_qlora_training",
    ):
        load_adapter(saved[0], tmp_path / "none")


def test_a_base_model_with_code_of_its_own_is_not_run(config, tmp_path):
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    (tmp_path / "own.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base_model(dataclasses.replace(config, base_model=str(tmp_path)))
    assert not (tmp_path / "ran").exists()
