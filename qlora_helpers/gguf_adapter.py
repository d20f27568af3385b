"""The adapter for llama.cpp and Ollama: a GGUF file, a Modelfile and a script that classifies."""

import os
import re
from pathlib import Path
from string import Template

import gguf
import numpy as np
from safetensors.torch import load_file
from transformers import PreTrainedConfig

from qlora_helpers.adapter import WEIGHTS, read_adapter, refusing
from qlora_helpers.errors import ModelError
from qlora_helpers.model import base_weights_folder, load_model_config, load_tokenizer
from qlora_helpers.prompts import TEMPLATE, label_token_ids, label_words
from qlora_helpers.run.files import new_folder
from qlora_helpers.run.workspace import Workspace

# What GGUF calls a family. Others may need more than new names: their rows in another order.
_ARCHITECTURES = {"mistral": "llama"} | {n: n for n in ("llama", "qwen2", "qwen3", "gemma")}
_WEIGHT = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_MODELFILE = """\
# base.gguf: the base model. The answer is the likeliest of all tokens, also of those of no label.
FROM ./base.gguf
ADAPTER ./adapter.gguf
TEMPLATE \"\"\"$prompt\"\"\"
PARAMETER temperature 0
PARAMETER num_predict 1
"""
_SCRIPT = """\
# Label headlines: pip install llama-cpp-python; python classify.py BASE.gguf "a headline" ...
import math
import sys
from pathlib import Path

from llama_cpp import Llama, llama_get_logits_ith

$constants


def encode(text, word=""):
    return llm.tokenize((PROMPT.format(text=text) + word).encode(errors="replace"))


def probabilities(text):
    while len(ids := encode(text)) > MAX_LENGTH:
        text = text.rpartition(" ")[0] or text[:-1]
    llm.reset()
    llm.eval(ids)
    logits = llama_get_logits_ith(llm.ctx, -1)
    scores = [logits[i] / TEMPERATURE for i in LABEL_IDS]
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


path, *texts = sys.argv[1:]
adapter = str(Path(__file__).with_name("adapter.gguf"))
llm = Llama(path, lora_path=adapter, n_ctx=MAX_LENGTH, n_batch=MAX_LENGTH, verbose=False)
start = len(encode("A headline"))
if [encode("A headline", word)[start] for word in WORDS] != LABEL_IDS:
    sys.exit(f"{path} is no GGUF file of {BASE}: it has other tokens for {WORDS}.")
print("label", *LABELS, "headline", sep="\\t")
for text in texts:
    answer = probabilities(" ".join(text.split()))
    label = LABELS[answer.index(max(answer))]
    print(label, *(f"{p:.4f}" for p in answer), text, sep="\\t")
"""


def export_gguf(workspace: Workspace, folder: str | os.PathLike) -> Path:
    """Write the adapter of `workspace` to the new `folder`, for llama.cpp and Ollama.

    `adapter.gguf` goes with a GGUF file of the base model; `classify.py` asks both, `Modelfile` is
    for `ollama create`. Raises ModelError for a family of models that cannot be exported, and
    WorkspaceError if the disk is full. Nothing half-written stays.
    """
    workspace.open("03_qlora_training")
    source = workspace / "adapter"
    config, temperature, lora = read_adapter(source)
    base = load_model_config(base_weights_folder(config.base_model), config).get_text_config()
    if base.model_type not in _ARCHITECTURES:
        raise ModelError(
            f"{config.base_model!r} is of the family {base.model_type!r}, whose adapters cannot be "
            f"exported to GGUF: {', '.join(_ARCHITECTURES)} can. Call merge_adapter instead."
        )
    with refusing(source):
        tensors = _tensors(base, source / WEIGHTS)
    tokenizer, labels = load_tokenizer(config), list(config.labels)
    constants = {
        "BASE": config.base_model,
        "PROMPT": TEMPLATE,
        "LABELS": labels,
        "WORDS": label_words(tokenizer, labels),
        "LABEL_IDS": label_token_ids(tokenizer, labels),
        "MAX_LENGTH": config.max_length,
        "TEMPERATURE": temperature,
    }
    # !a: whatever an adapter's settings say stays a text, on one line
    lines = "\n".join(f"{name} = {value!a}" for name, value in constants.items())
    prompt = TEMPLATE.format(text="{{ .Prompt }}")
    with new_folder(folder) as partial:
        _write(tensors, base, lora, partial / "adapter.gguf")
        (partial / "classify.py").write_text(Template(_SCRIPT).substitute(constants=lines))
        (partial / "Modelfile").write_text(Template(_MODELFILE).substitute(prompt=prompt))
    return Path(folder)


def _tensors(base: PreTrainedConfig, weights: Path) -> dict[str, np.ndarray]:
    """Return the weights under GGUF's names, in float32 as they were trained: in float16, llama.cpp
    would round each layer's input too."""
    family, tensors = _ARCHITECTURES[base.model_type], {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], base.num_hidden_layers)
    for name, tensor in load_file(weights).items():
        match = _WEIGHT.fullmatch(name)
        layer = match and names.get_name(match[1])
        if not layer:
            raise ValueError(f"{name[:200]} is no layer of a {base.model_type} in GGUF")
        array = tensor.float().numpy()
        if family == "llama" and match[2] == "B":
            array = _paired(array, layer, base)
        tensors[f"{layer}.weight.lora_{match[2].lower()}"] = array
    return tensors


def _paired(b: np.ndarray, layer: str, base: PreTrainedConfig) -> np.ndarray:
    """Return B with the rows of queries and keys as GGUF's llama has them: the two that are rotated
    together are neighbours, where Transformers has them half a head apart."""
    heads = {"attn_q": base.num_attention_heads, "attn_k": base.num_key_value_heads}
    count = heads.get(layer.rpartition(".")[2])
    if count is None:
        return b
    return b.reshape(count, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


def _write(tensors: dict[str, np.ndarray], base: PreTrainedConfig, lora: dict, path: Path) -> None:
    # llama.cpp divides alpha by the rank, not by its root, and takes 0 for a scale of 1.
    alpha = lora["lora_alpha"] * (lora["r"] ** 0.5 if lora["use_rslora"] else 1)
    writer = gguf.GGUFWriter(path, _ARCHITECTURES[base.model_type])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha or 1e-30)
    for name, tensor in tensors.items():
        writer.add_tensor_info(name, tensor.shape, tensor.dtype, tensor.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for tensor in tensors.values():
        file.write(tensor.tobytes())  # numpy's tofile, which gguf calls, is silent on a full disk
        writer.write_padding(file, tensor.nbytes)
    writer.close()
