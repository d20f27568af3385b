"""The adapter in GGUF: its content always, and llama.cpp's answers where llama_cpp is installed."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pandas as pd
import pytest
import torch
from lora_models import lora_config, save_tiny, with_random_b
from safetensors import safe_open
from transformers import CONFIG_MAPPING

from qlora_helpers import (
    HeadlineClassifier,
    ModelError,
    WorkspaceError,
    attach_lora,
    clean_text,
    export_gguf,
    load_base_model,
    load_tokenizer,
)
from qlora_helpers.config import PROFILES, RunConfig
from qlora_helpers.gguf_export import _interleaved
from qlora_helpers.model import _embedded_gguf, embedded_checkpoint
from qlora_helpers.texts import read_ag_news_csv

AG_NEWS = Path(os.environ.get("AG_NEWS_FOLDER", "no/such/folder"))


def tuned(base_model: str, **choices) -> HeadlineClassifier:
    """Return a base model with a random adapter, which moves every answer."""
    config = RunConfig(profile="cpu", **PROFILES["cpu"] | {"base_model": base_model})
    model = with_random_b(attach_lora(load_base_model(config), lora_config(**choices), 1)).eval()
    return HeadlineClassifier(model, load_tokenizer(config), config, temperature=1.5)


def rows_of(tensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize(("family", "rank"), [("llama", 8), ("mistral", 16)])
def test_the_file_holds_the_adapter_as_llama_cpp_reads_it(tokenizer, tmp_path, family, rank):
    base = save_tiny(CONFIG_MAPPING[family], tokenizer, tmp_path / "base")
    classifier = tuned(base, r=rank, lora_alpha=24, use_rslora=rank == 16)
    folder = export_gguf(classifier, tmp_path / "gguf")
    assert sorted(path.name for path in folder.iterdir()) == [
        "Modelfile",
        "adapter.gguf",
        "classify.py",
    ]
    reader = gguf.GGUFReader(folder / "adapter.gguf")
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert [facts[f"{n}.type"] for n in ("general", "adapter")] == ["adapter", "lora"]
    assert facts["general.architecture"] == "llama"
    # llama.cpp scales B A by alpha / rank
    scale = 24 / rank**0.5 if rank == 16 else 24 / rank
    assert facts["adapter.lora.alpha"] / rank == pytest.approx(scale)
    tensors = {tensor.name: rows_of(tensor) for tensor in reader.tensors}
    assert len(tensors) == 2 * 2 * 7  # A and B of seven layers in two blocks
    weights = {name: p for name, p in classifier.model.named_parameters() if "lora_" in name}
    for short, long in {"ffn_down": "mlp.down_proj", "attn_output": "self_attn.o_proj"}.items():
        for part in "AB":
            weight = weights[f"base_model.model.model.layers.1.{long}.lora_{part}.default.weight"]
            found = tensors[f"blk.1.{short}.weight.lora_{part.lower()}"]
            assert np.array_equal(found, weight.detach().numpy())
    for short, heads in {"q": 4, "k": 2}.items():  # of 16 numbers, turned in pairs (i, i + 8)
        name = f"base_model.model.model.layers.0.self_attn.{short}_proj.lora_B.default.weight"
        found = tensors[f"blk.0.attn_{short}.weight.lora_b"].reshape(heads, 8, 2, rank)
        right = weights[name].detach().numpy().reshape(heads, 2, 8, rank)
        assert np.array_equal(found[:, :, 0], right[:, 0])
        assert np.array_equal(found[:, :, 1], right[:, 1])


def test_queries_and_keys_have_the_order_of_the_embedded_models_own_file():
    """Nine heads of queries share three of keys; the file was written by llama.cpp's own tools."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(_embedded_gguf()).tensors}
    with safe_open(embedded_checkpoint() / "model.safetensors", "pt") as checkpoint:
        for short, heads in {"q": 9, "k": 3}.items():
            own = checkpoint.get_tensor(f"model.layers.3.self_attn.{short}_proj.weight").float()
            theirs = torch.tensor(rows_of(tensors[f"blk.3.attn_{short}.weight"]))
            assert (_interleaved(own, heads) - theirs).norm() < 0.01 * theirs.norm()
            assert (own - theirs).norm() > theirs.norm()


def test_what_cannot_be_exported_is_named_and_nothing_half_stays(classifier, tokenizer, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(WorkspaceError, match="mine is there already: delete it"):
        export_gguf(classifier, tmp_path / "mine")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (33_000, hard))  # bytes of each file
    try:
        with pytest.raises(WorkspaceError, match=r"gguf cannot be written \(No space left"):
            export_gguf(classifier, tmp_path / "gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    other = tuned(save_tiny(CONFIG_MAPPING["qwen2"], tokenizer, tmp_path / "base"))
    with pytest.raises(ModelError, match="only adapters of Llama and Mistral .*'qwen2'"):
        export_gguf(other, tmp_path / "gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "mine"]


# llama.cpp itself, beside the embedded model's own file: pip install llama-cpp-python


def ask_llama_cpp(folder: Path, texts: list[str]) -> np.ndarray:
    """Return the label probabilities that the exported script prints."""
    pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    command = [sys.executable, folder / "classify.py", _embedded_gguf(), *texts]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shares = [line.split("\t")[1] for line in done.stdout.splitlines()]
    return np.array([[float(p) for p in re.findall(r" (\d\.\d{4})", share)] for share in shares])


def compare(found: np.ndarray, right: np.ndarray, name: str) -> float:
    """Return the share of rows with the same label, of those where one has more than .6."""
    sure, same = right.max(1) > 0.6, found.argmax(1) == right.argmax(1)
    difference = abs(found - right)
    print(
        f"{name}: {same[sure].sum()} of {sure.sum()} sure rows alike, {same.sum()} of {len(same)}; "
        f"mean difference {difference.mean():.4f}, largest {difference.max():.3f}"
    )
    return same[sure].mean()


@pytest.mark.parametrize("rank", [8, 16])
def test_llama_cpp_applies_a_random_adapter_as_transformers_does(base, tmp_path, rank):
    texts = ["Striker signs record contract", "Oil falls", "Rain " * 300]
    classifier = tuned("SmolLM2-135M-Instruct", r=rank)
    found = ask_llama_cpp(export_gguf(classifier, tmp_path / "gguf"), texts)
    right = classifier.probabilities(texts)
    assert abs(right - classifier.probabilities(texts, base_model=True)).mean() > 0.1
    assert abs(found - right).mean() < 0.03


def test_llama_cpp_labels_as_the_classifier_does(notebook_workspace, tmp_path):
    classifier = HeadlineClassifier.from_workspace(notebook_workspace)
    folder = export_gguf(classifier, tmp_path / "gguf")
    rows = {"sample": pd.read_parquet(notebook_workspace / "subset/test.parquet").text.tolist()}
    if AG_NEWS.is_dir():
        rows["AG News"] = read_ag_news_csv(AG_NEWS / "test.csv").raw[:400].map(clean_text).tolist()
    for name, texts in rows.items():
        found = ask_llama_cpp(folder, texts)
        assert compare(found, classifier.probabilities(texts), name) >= 0.99
