"""Training and scoring speed of this project on one base model: one line of JSON for each setting.

    python tests/benchmarks/bench_training.py CHECKPOINT tokens.json --memory-gib 14.74 --force-t4
    python tests/benchmarks/bench_training.py CHECKPOINT tokens.json --settings plain:8:all

CHECKPOINT is a folder that Transformers reads: float16, quantised to NF4 on loading, or in NF4.
tokens.json holds `short` (prompts as lists of token ids), `label` (each row's class) and
`label_ids` (the token ids of each label); if --rows asks for more rows, they repeat.

A setting is PATH:ROWS:KEPT. PATH is "fused" (the package's) or "plain", the loop that one would
write first: PEFT's layers, left-padded batches in random order, `logits_to_keep=1`. ROWS is rows a
step. KEPT is "all" or "none" of the decoder layers' activations kept for backward, or "plan" to let
the package plan. A step is forward, backward, clipping at 1.0 and AdamW, with a GradScaler in
float16.

The first line says what loading took. Each other line holds training and scoring rows/s (medians of
--repeats), peak reserved GiB of both, `first_step_s` (from attaching LoRA to the end of a step on
the longest rows), `steps` and `mean_loss` of the last repeat; or `out_of_memory`.
"""

import argparse
import contextlib
import itertools
import json
import random
import resource
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from torch.nn.functional import cross_entropy

from qlora_helpers import model as loading
from qlora_helpers import scoring
from qlora_helpers.config import RunConfig
from qlora_helpers.fast import plan as planning
from qlora_helpers.fast.dropout import masks_of
from qlora_helpers.fast.packing import use_packed_attention

SETTINGS = ["plain:16:none", "fused:16:plan", "fused:32:plan", "fused:64:plan", "fused:128:plan"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("tokens")
    parser.add_argument("--memory-gib", type=float, help="the GPU memory to use; default: all")
    parser.add_argument("--force-t4", action="store_true", help="float16, a T4's attention kernels")
    parser.add_argument("--settings", nargs="*", default=SETTINGS, metavar="PATH:ROWS:KEPT")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    tokens = json.loads(Path(args.tokens).read_text())
    for name in ("short", "label"):
        tokens[name] = list(itertools.islice(itertools.cycle(tokens[name]), args.rows))
    if args.memory_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.memory_gib * 2**30 / total)
    if args.force_t4:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        loading.compute_dtype = lambda: (torch.float16, "asked for by --force-t4")
    start = time.perf_counter()
    config = RunConfig("cpu", args.checkpoint, "sample", 1, 1, 1, learning_rate=2e-4)
    base = loading.load_base_model(config)
    seconds = round(time.perf_counter() - start, 1)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    loaded = {"load_s": seconds, "load_peak_gib": peak_gib(), "dtype": str(base.dtype)}
    print(json.dumps(loaded | {"device": device, "torch": torch.__version__}), flush=True)
    for setting in args.settings:
        result = {"setting": setting} | measure(base, tokens, setting, args.repeats)
        print(json.dumps(result), flush=True)


def measure(base, tokens: dict, setting: str, repeats: int) -> dict:
    """Return the figures of one setting, and leave `base` as it was."""
    path, size, kept = setting.split(":")
    size, prompts = int(size), tokens["short"]

    def longest_first(row: int) -> int:
        return -len(prompts[row])

    label_ids = [ids[0] for ids in tokens["label_ids"]]
    result = {}
    reset_peak()
    start = time.perf_counter()
    lora = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = loading.attach_lora(base, lora, seed=0).train()
    logits = partial(scoring.label_logits, label_ids=label_ids)
    order = random.Random(0).sample(range(len(prompts)), len(prompts))
    if path == "plain":
        base.set_attn_implementation("sdpa")
        for module in base.modules():
            module.__dict__.pop("forward", None)  # what attach_lora fused
        logits = partial(plain_logits, label_ids=label_ids)
    else:  # sorted by length in windows of eight batches
        windows = [sorted(rows, key=longest_first) for rows in batched(order, 8 * size)]
        order = list(itertools.chain(*windows))
    try:
        plan = make_plan(model, prompts, logits, size, kept)
        result["plan"] = vars(plan)
        step = training_step(model, logits, tokens, plan)
        batches = batched(order, size)
        step(sorted(order, key=longest_first)[:size])
        synchronize()
        result["first_step_s"] = round(time.perf_counter() - start, 2)
        step(batches[-1])
        rates = []
        for _ in range(repeats):
            synchronize()
            start = time.perf_counter()
            losses = [step(batch) for batch in batches]
            synchronize()
            rates.append(len(prompts) / (time.perf_counter() - start))
        result |= {
            "train_rows_per_s": round(statistics.median(rates), 2),
            "steps": len(batches) * repeats,
            "mean_loss": round(torch.stack(losses).mean().item(), 4),
            "train_peak_reserved_gib": peak_gib(),
        }
        model.zero_grad(set_to_none=True)
        del step
        reset_peak()
        rates, budget = [], scoring.TOKENS_PER_BATCH[model.device.type]
        while len(rates) < repeats:
            fused = path == "fused"
            groups = scoring.length_batches(prompts, budget) if fused else batched(order, 16)
            groups = [[prompts[i] for i in group] for group in groups]
            try:
                rates.append(score(model.eval(), logits, groups))
            except torch.OutOfMemoryError:
                if not fused or budget < 1024:
                    raise
                budget //= 2  # as the package does
        result |= {
            "score_rows_per_s": round(statistics.median(rates), 2),
            "score_peak_reserved_gib": peak_gib(),
        }
    except torch.OutOfMemoryError:
        result["out_of_memory"] = True
    planning.checkpoint_layers(model, 0)
    use_packed_attention(base)
    model.unload()
    return result


def batched(rows: list, size: int) -> list[list]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def make_plan(model, prompts: list, logits, size: int, kept: str) -> planning.BatchPlan:
    if kept == "plan":
        return planning.plan_encoded(model, prompts, partial(logits, model), size)
    activations = {"all": len(planning.decoder_layers(model)) * 10**6, "none": 0}[kept]
    return planning.BatchPlan(size, 1, activations, None, "")


def plain_logits(model, encoded: list, label_ids: list[int]) -> torch.Tensor:
    """Return the label tokens' logits by the library alone: left-padded, masked, the whole
    vocabulary at the last place."""
    width = max(map(len, encoded))
    ids = [[0] * (width - len(row)) + list(row) for row in encoded]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in encoded]
    ids, mask = (torch.tensor(rows, device=model.device) for rows in (ids, mask))
    amp = model.device.type == "cuda"
    with torch.autocast("cuda", model.dtype) if amp else contextlib.nullcontext():
        output = model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
    return output.logits[:, -1, label_ids].float()


def training_step(model, logits, tokens: dict, plan: planning.BatchPlan):
    """Return a function that trains on one effective batch of row numbers, as the Trainer would,
    and returns its loss."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-4, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16)
    layers, steps = len(planning.decoder_layers(model)), itertools.count()

    def step(batch: list[int]) -> torch.Tensor:
        total, seed = 0.0, [0, next(steps)]
        for rows in batched(batch, plan.micro_batch_size):
            encoded = [tokens["short"][i] for i in rows]
            lengths = list(map(len, encoded))
            planning.checkpoint_layers(model, plan.checkpointed_layers(layers, sum(lengths)))
            labels = torch.tensor([tokens["label"][i] for i in rows], device=model.device)
            with masks_of(seed, rows, lengths, model.device):
                loss = cross_entropy(logits(model, encoded), labels, reduction="sum") / len(batch)
                scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


@torch.no_grad()
def score(model, logits, batches: list[list[list[int]]]) -> float:
    """Return rows a second through `batches` of encoded prompts."""
    synchronize()
    start = time.perf_counter()
    for batch in batches:
        logits(model, batch).cpu()
    return sum(map(len, batches)) / (time.perf_counter() - start)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    planning.free_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Return the reserved GPU memory; without a GPU, the peak resident host memory."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_reserved() / 2**30, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


if __name__ == "__main__":
    main()
