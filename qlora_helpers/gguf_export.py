"""The adapter for llama.cpp and Ollama: a GGUF file, a Modelfile, and a script that asks it.

Names, metadata and the order of rows are those of llama.cpp's convert_lora_to_gguf.py.
"""

import errno
import os
from pathlib import Path

import gguf
import torch
from peft.tuners.lora import LoraLayer

from qlora_helpers.classifier import HeadlineClassifier
from qlora_helpers.errors import ModelError
from qlora_helpers.prompts import TEMPLATE, encode_prompts, label_token_ids
from qlora_helpers.run.files import new_folder

_SCRIPT = '''\
"""Label headlines by llama.cpp: python classify.py BASE.gguf "a headline" ...

It needs llama-cpp-python. BASE.gguf is the base model in GGUF, of any precision.
"""

import math
import sys
from pathlib import Path

from llama_cpp import Llama, llama_get_logits_ith

BASE_MODEL = {base_model!r}
LABELS = {labels!r}  # and the token that begins each one's word
TEMPERATURE, MAX_TOKENS = {temperature!r}, {max_length!r}


def prompt_tokens(text):
    """Return the tokens of a prompt. A long text loses its last words."""
    words = text.split()
    while True:
        prompt = {template!r}.format(text=" ".join(words))
        tokens = model.tokenize(prompt.encode(), add_bos={add_bos!r}, special=False)
        if len(tokens) <= MAX_TOKENS or not words:
            return tokens
        words.pop()


base, *texts = sys.argv[1:]
adapter = Path(__file__).with_name("adapter.gguf")
model = Llama(base, lora_path=str(adapter), n_ctx=MAX_TOKENS, n_batch=MAX_TOKENS, verbose=False)
for text in texts:
    model.reset()
    model.eval(prompt_tokens(text))
    logits = llama_get_logits_ith(model.ctx, -1)
    logits = {{label: logits[token] / TEMPERATURE for label, token in LABELS.items()}}
    best = max(logits, key=logits.get)
    weights = {{label: math.exp(logit - logits[best]) for label, logit in logits.items()}}
    shares = [f"{{label}} {{w / sum(weights.values()):.4f}}" for label, w in weights.items()]
    print(best, ", ".join(shares), text, sep="\\t")
'''
_MODELFILE = """\
# ollama create news -f Modelfile; ollama run news "a headline"
# base.gguf is {base_model} in GGUF. The answer is a word, without a probability.
FROM ./base.gguf
ADAPTER ./adapter.gguf
TEMPLATE \"\"\"{template}\"\"\"
PARAMETER temperature 0
PARAMETER num_predict 3
"""


def export_gguf(classifier: HeadlineClassifier, folder: str | os.PathLike) -> Path:
    """Write the adapter to the new `folder`, for llama.cpp to put it beside a base model in GGUF.

    The folder gets adapter.gguf (float32), Modelfile (for Ollama) and classify.py, which prints the
    label probabilities of its arguments. Raises ModelError for a base model that is neither a Llama
    nor a Mistral, WorkspaceError if `folder` is there or cannot be written. Nothing half-written
    stays.
    """
    base = classifier.model.get_base_model()
    if base.config.model_type not in ("llama", "mistral"):
        raise ModelError(
            f"only adapters of Llama and Mistral can be exported to GGUF, and the base model is of "
            f"the family {base.config.model_type!r}. Merge the adapter instead, and convert that."
        )
    tokenizer, labels, config = classifier.tokenizer, classifier.labels, classifier.config
    (ids,) = encode_prompts(tokenizer, [""], config.max_length)
    tokens = dict(zip(labels, label_token_ids(tokenizer, labels), strict=True))
    facts = {"base_model": config.base_model, "labels": tokens, "max_length": config.max_length}
    facts |= {"temperature": classifier.temperature, "add_bos": ids[0] == tokenizer.bos_token_id}
    prompt = TEMPLATE.format(text="{{ .Prompt }}")
    with new_folder(folder) as partial:
        _write_adapter(base, partial / "adapter.gguf")
        script = _SCRIPT.format(template=TEMPLATE, **facts)
        (partial / "classify.py").write_text(script, encoding="utf-8")
        modelfile = _MODELFILE.format(template=prompt, base_model=config.base_model)
        (partial / "Modelfile").write_text(modelfile, encoding="utf-8")
    return Path(folder)


def _write_adapter(base: torch.nn.Module, path: Path) -> None:
    layers = {name: m for name, m in base.named_modules() if isinstance(m, LoraLayer)}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, base.config.num_hidden_layers)
    heads = {"q_proj": base.config.num_attention_heads, "k_proj": base.config.num_key_value_heads}
    first = next(iter(layers.values()))
    name = first.active_adapters[0]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp scales by this over the rank
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, first.scaling[name] * first.r[name])
    for module, layer in layers.items():
        a, b = (part[name].weight.detach().float().cpu() for part in (layer.lora_A, layer.lora_B))
        if count := heads.get(module.rpartition(".")[2]):
            b = _interleaved(b, count)
        target = f"{names.get_name(module)}.weight"
        writer.add_tensor(f"{target}.lora_a", a.numpy())
        writer.add_tensor(f"{target}.lora_b", b.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    try:  # numpy, which writes the tensors, does not tell of a disk that is full
        gguf.GGUFReader(path)
    except ValueError as error:
        raise OSError(errno.ENOSPC, "No space left on device") from error


def _interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the rows of queries or keys in the order of GGUF, where two numbers that a position
    turns together are neighbours. Here one is in each half of a head."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape).contiguous()
