"""Training and scoring speed of this project's own code path on one checkpoint: one line of JSON a setting.

    python tests/benchmarks/bench_training.py CHECKPOINT tokens.json --memory-gib 14.74 --force-t4
    python tests/benchmarks/bench_training.py CHECKPOINT tokens.json --settings fused:32:0 plain:32:all --rows 96 --repeats 1

CHECKPOINT is a folder that Transformers reads, quantised to NF4 on loading. tokens.json holds `short` (prompts as lists of token ids),
`label` (each row's class) and `label_ids` (the token ids of each label). A setting is LAYERS:ROWS:CHECKPOINTED: "plain" (PEFT's own
layers) or "fused", rows a step, and how many decoder layers are checkpointed: a number, "all", or by the batch, as few as leave at most
N activations of a token in a layer ("80000t"), so that one batch of long rows does not decide for all. A step is a forward pass, a
backward pass, clipping at 1.0 and AdamW, with a GradScaler in float16, over length-sorted batches in windows of eight. A line says:
training and scoring rows/s (medians of --repeats), peak reserved GiB of training and of scoring, `first_step_s` (from attaching LoRA to
the end of the step on the longest rows), `mean_loss` (of the last repeat), or `out_of_memory`.
"""

import argparse
import contextlib
import gc
import json
import random
import resource
import statistics
import time
from pathlib import Path

import torch
from fused_lora import fuse_lora
from peft import LoraConfig

from qlora_helpers import modeling, scoring
from qlora_helpers.config import RunConfig

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = ["plain:16:all", "plain:32:all", "fused:16:all", "fused:32:all", "fused:64:all",
            "fused:16:60000t", "fused:32:60000t", "fused:32:80000t", "fused:64:60000t", "fused:64:80000t"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("tokens")
    parser.add_argument("--memory-gib", type=float, help="the GPU memory to use; all of it without this")
    parser.add_argument("--force-t4", action="store_true", help="float16, and none of the attention kernels that a T4 lacks")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="LAYERS:ROWS:CHECKPOINTED")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="also print where the GPU's time goes in two steps of each setting")
    args = parser.parse_args()
    tokens = json.loads(Path(args.tokens).read_text())
    if args.memory_gib:
        torch.cuda.set_per_process_memory_fraction(args.memory_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    if args.force_t4:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        modeling.compute_dtype = lambda: (torch.float16, "asked for by --force-t4")
    start = time.perf_counter()
    base = modeling.load_base_model(RunConfig("cpu", args.checkpoint, "sample", 1, 1, 1, learning_rate=2e-4))
    print(json.dumps({"load_s": round(time.perf_counter() - start, 1), "load_peak_gib": peak_gib(), "dtype": str(base.dtype),
                      "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                      "torch": torch.__version__}), flush=True)
    for setting in args.settings:
        print(json.dumps({"setting": setting} | measure(base, tokens, setting, args)), flush=True)


def measure(base, tokens: dict, setting: str, args) -> dict:
    layers, size, checkpointed = setting.split(":")
    result, size, start = {}, int(size), time.perf_counter()
    reset_peak()
    model = modeling.attach_lora(base, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=ALL_LINEAR), seed=0)
    for module in base.modules():
        module.__dict__.pop("forward", None)  # what an earlier setting fused
    if layers == "fused":
        fuse_lora(model)
    model.train()
    try:
        step = training_step(model, tokens, checkpointed)
        batches = sorted_batches(tokens["short"], args.rows, size)
        step(batches[0])  # the longest rows come first
        synchronize()
        result["first_step_s"] = round(time.perf_counter() - start, 2)
        step(batches[-1])
        rates = []
        for _ in range(args.repeats):
            synchronize()
            start = time.perf_counter()
            losses = [step(batch) for batch in batches]
            synchronize()
            rates.append(args.rows / (time.perf_counter() - start))
        result |= {"train_rows_per_s": round(statistics.median(rates), 2), "mean_loss": round(torch.stack(losses).mean().item(), 4)}
        if args.profile:
            print(profile(step, batches[:2]), flush=True)
        result["train_peak_reserved_gib"] = peak_gib()
        model.zero_grad(set_to_none=True)
        del step
        reset_peak()
        result["score_rows_per_s"] = round(statistics.median(score(model, tokens, args.rows) for _ in range(args.repeats)), 2)
        result["score_peak_reserved_gib"] = peak_gib()
    except torch.OutOfMemoryError:
        result["out_of_memory"] = True
    base.gradient_checkpointing_disable()
    model.unload()
    return result


def checkpoint_layers(base, setting: str, tokens: int) -> None:
    """Checkpoint the first decoder layers, as many as `setting` asks for at `tokens` padded tokens a batch."""
    layers = base.base_model.layers
    count = len(layers) if setting == "all" else len(layers) - int(setting[:-1]) // tokens if setting.endswith("t") else int(setting)
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i < count


def sorted_batches(prompts: list[list[int]], rows: int, size: int) -> list[list[int]]:
    """Row numbers in batches of `size`: shuffled, then longest first inside windows of eight batches."""
    order = random.Random(0).sample(range(rows), rows)
    order = sum((sorted(order[i:i + 8 * size], key=lambda j: -len(prompts[j])) for i in range(0, rows, 8 * size)), [])
    return [order[i:i + size] for i in range(0, rows, size)]


def training_step(model, tokens: dict, checkpointed: str):
    """A function that trains on one batch of row numbers, as the Trainer would, and returns its loss."""
    device, half = model.device, model.dtype == torch.float16
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-4, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    labels = torch.tensor(tokens["label"], device=device)
    label_ids = [ids[0] for ids in tokens["label_ids"]]
    autocast = torch.autocast(device.type, model.dtype) if model.dtype != torch.float32 else contextlib.nullcontext()

    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": False})  # gives every layer what it needs for it

    def step(batch: list[int]) -> torch.Tensor:
        inputs = scoring.pad([tokens["short"][j] for j in batch], 0)  # padding is not read: any id will do
        checkpoint_layers(base, checkpointed, inputs["input_ids"].numel())
        with autocast:
            logits = scoring.label_logits(model, *(x.to(device) for x in inputs.values()), label_ids)
            loss = torch.nn.functional.cross_entropy(logits, labels[batch])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    return step


@torch.inference_mode()
def score(model, tokens: dict, rows: int) -> float:
    """Rows a second through the batches of `scoring.label_probabilities`."""
    model.eval()
    prompts, label_ids = tokens["short"][:rows], [ids[0] for ids in tokens["label_ids"]]
    synchronize()
    start = time.perf_counter()
    for batch in scoring.length_batches(prompts, scoring.TOKENS_PER_BATCH[model.device.type]):
        inputs = scoring.pad([prompts[j] for j in batch], 0)  # padding is not read: any id will do
        scoring.label_logits(model, *(x.to(model.device) for x in inputs.values()), label_ids).cpu()
    return rows / (time.perf_counter() - start)


def profile(step, batches) -> str:
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * torch.cuda.is_available()
    with torch.profiler.profile(activities=activities) as found:
        for batch in batches:
            step(batch)
        synchronize()
    return found.key_averages().table(sort_by=f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total", row_limit=40,
                                      max_name_column_width=70)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Reserved GPU memory; without a GPU, resident host memory since the process began."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_reserved() / 2**30, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


if __name__ == "__main__":
    main()
