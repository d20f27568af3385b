"""Training and scoring speed of this project's own code path on one checkpoint: one line of JSON a setting.

    python tests/benchmarks/bench_training.py CHECKPOINT tokens.json --memory-gib 14.74 --force-t4
    python tests/benchmarks/bench_training.py CHECKPOINT tokens.json --settings plain:8:all fused:16:plan --rows 96 --repeats 1

CHECKPOINT is a folder that Transformers reads: float16, which is quantised to NF4 on loading, or already in NF4, as --save-quantised writes
it. The first line says what loading took: seconds, peak reserved GPU memory, and the peak of this process' anonymous host memory (RssAnon),
with what it held before. tokens.json holds `short` (prompts as lists of token ids), `label` (each row's class) and `label_ids` (the token
ids of each label); if --rows asks for more rows, they repeat. A setting is PATH:ROWS:KEPT. PATH is "fused" (the package's), or "plain", the
loop that one would write first: PEFT's own layers, left-padded batches in random order, `logits_to_keep=1`. ROWS is rows a step, or
ROWS/MICRO to cut it into micro-batches of MICRO rows. KEPT is "all" or "none" of the decoder layers' activations kept for backward, a
number of activations (as a batch plan has it), or "plan" to let the package plan with ROWS as effective batch. A step is forward,
backward, clipping at 1.0 and AdamW, with a GradScaler in float16; the package's batches are sorted by length in windows of eight. A line
says: training and scoring rows/s (medians of --repeats), peak reserved GiB of training and of scoring, `first_step_s` (from attaching LoRA
to the end of a step on the longest rows), `steps`, `mean_loss` (of the last repeat), with --losses each step's loss in the first repeat, or
`out_of_memory`.
"""

import argparse
import contextlib
import itertools
import json
import random
import resource
import statistics
import threading
import time
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig

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
    parser.add_argument(
        "--memory-gib", type=float, help="the GPU memory to use; all of it without this"
    )
    parser.add_argument(
        "--force-t4",
        action="store_true",
        help="float16, and none of the attention kernels that a T4 lacks",
    )
    parser.add_argument("--settings", nargs="*", default=SETTINGS, metavar="PATH:ROWS:KEPT")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--losses", action="store_true")
    parser.add_argument("--save-quantised", metavar="FOLDER", help="write the loaded model in NF4")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also print where the time goes in two steps of each setting",
    )
    args = parser.parse_args()
    tokens = json.loads(Path(args.tokens).read_text())
    for name in ("short", "label"):
        tokens[name] = (tokens[name] * -(-args.rows // len(tokens[name])))[: args.rows]
    if args.memory_gib:
        torch.cuda.set_per_process_memory_fraction(
            args.memory_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
        )
    if args.force_t4:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        loading.compute_dtype = lambda: (torch.float16, "asked for by --force-t4")
    if torch.cuda.is_available():
        torch.zeros(1).cuda()  # CUDA's own share of the host memory comes before
    with HostMemory() as host:
        start = time.perf_counter()
        base = loading.load_base_model(
            RunConfig("cpu", args.checkpoint, "sample", 1, 1, 1, learning_rate=2e-4)
        )
        seconds = time.perf_counter() - start
    if args.save_quantised:
        base.save_pretrained(args.save_quantised)
    print(
        json.dumps(
            {
                "load_s": round(seconds, 1),
                "load_peak_gib": peak_gib(),
                "load_host_gib_before": host.before,
                "load_host_gib_peak": host.peak,
                "dtype": str(base.dtype),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "torch": torch.__version__,
            }
        ),
        flush=True,
    )
    for setting in args.settings:
        print(json.dumps({"setting": setting} | measure(base, tokens, setting, args)), flush=True)


def measure(base, tokens: dict, setting: str, args) -> dict:
    path, size, kept = setting.split(":")
    size, _, micro = size.partition("/")
    result, size, fused = {}, int(size), path == "fused"
    micro = int(micro or size)
    prompts, label_ids = tokens["short"], [ids[0] for ids in tokens["label_ids"]]
    reset_peak()
    start = time.perf_counter()
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=args.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = loading.attach_lora(base, lora, seed=0).train()
    logits = scoring.label_logits
    if not fused:
        base.set_attn_implementation("sdpa")
        for module in base.modules():
            module.__dict__.pop("forward", None)  # what attach_lora fused
        logits = plain_logits
    try:
        if kept == "plan":
            plan = planning.plan_encoded(
                model, prompts, partial(scoring.label_logits, model, label_ids=label_ids), size
            )
            result["plan"] = vars(plan)
        else:
            named = {"all": len(planning.decoder_layers(model)) * 10**6, "none": 0}
            plan = planning.BatchPlan(
                micro, size // micro, named[kept] if kept in named else int(kept), None, ""
            )
        step = training_step(model, logits, tokens, label_ids, plan)
        order = random.Random(0).sample(range(len(prompts)), len(prompts))
        if fused:
            order = sum(
                (
                    sorted(order[i : i + 8 * size], key=lambda j: -len(prompts[j]))
                    for i in range(0, len(order), 8 * size)
                ),
                [],
            )
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        step(sorted(range(len(prompts)), key=lambda j: -len(prompts[j]))[:size])
        synchronize()
        result["first_step_s"] = round(time.perf_counter() - start, 2)
        step(batches[-1])
        rates = []
        for _ in range(args.repeats):
            synchronize()
            start = time.perf_counter()
            losses = [step(batch) for batch in batches]
            synchronize()
            rates.append(len(prompts) / (time.perf_counter() - start))
            if args.losses and len(rates) == 1:
                result["losses"] = [round(loss, 5) for loss in torch.stack(losses).tolist()]
        result |= {
            "train_rows_per_s": round(statistics.median(rates), 2),
            "steps": len(batches) * args.repeats,
            "mean_loss": round(torch.stack(losses).mean().item(), 4),
        }
        if args.profile:
            print(profile(step, batches[:2]), flush=True)
        result["train_peak_reserved_gib"] = peak_gib()
        model.zero_grad(set_to_none=True)
        del step
        reset_peak()
        groups = (
            scoring.length_batches(prompts, scoring.TOKENS_PER_BATCH[model.device.type])
            if fused
            else [order[i : i + 16] for i in range(0, len(order), 16)]
        )
        rates = []
        while len(rates) < args.repeats:
            try:
                rates.append(score(model.eval(), logits, prompts, groups, label_ids))
            except torch.OutOfMemoryError:
                groups = scoring._halves(groups)
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


def plain_logits(model, encoded, label_ids: list[int]) -> torch.Tensor:
    """The label tokens' logits by the library alone: left-padded, masked, the whole vocabulary at the last place."""
    width = max(map(len, encoded))
    ids = torch.tensor(
        [[0] * (width - len(row)) + list(row) for row in encoded], device=model.device
    )
    mask = torch.tensor(
        [[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=model.device
    )
    amp = model.device.type == "cuda"
    with torch.autocast("cuda", model.dtype) if amp else contextlib.nullcontext():
        return (
            model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
            .logits[:, -1, label_ids]
            .float()
        )


def training_step(model, logits, tokens: dict, label_ids: list[int], plan: planning.BatchPlan):
    """A function that trains on one effective batch of row numbers, as the Trainer would, and returns its loss."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-4, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16)
    layers, steps = len(planning.decoder_layers(model)), itertools.count()

    def step(batch: list[int]) -> torch.Tensor:
        total, seed = 0.0, [0, next(steps)]
        for i in range(0, len(batch), plan.micro_batch_size):
            rows = batch[i : i + plan.micro_batch_size]
            encoded = [tokens["short"][j] for j in rows]
            planning.checkpoint_layers(
                model, plan.checkpointed_layers(layers, sum(map(len, encoded)))
            )
            labels = torch.tensor([tokens["label"][j] for j in rows], device=model.device)
            with masks_of(seed, rows, list(map(len, encoded)), model.device):
                loss = torch.nn.functional.cross_entropy(
                    logits(model, encoded, label_ids), labels, reduction="sum"
                ) / len(batch)
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
def score(
    model, logits, prompts: list[list[int]], groups: list[list[int]], label_ids: list[int]
) -> float:
    """Rows a second through `groups` of row numbers."""
    synchronize()
    start = time.perf_counter()
    for group in groups:
        logits(model, [prompts[j] for j in group], label_ids).cpu()
    return len(prompts) / (time.perf_counter() - start)


def profile(step, batches) -> str:
    activities = [torch.profiler.ProfilerActivity.CPU] + [
        torch.profiler.ProfilerActivity.CUDA
    ] * torch.cuda.is_available()
    with torch.profiler.profile(activities=activities) as found:
        for batch in batches:
            step(batch)
        synchronize()
    return found.key_averages().table(
        sort_by=f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total",
        row_limit=40,
        max_name_column_width=70,
    )


class HostMemory:
    """The peak of this process' anonymous memory in GiB while the block runs, seen every 5 ms, and what it was `before`."""

    def __enter__(self):
        self.before = self.peak = self.now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.005):
            self.peak = max(self.peak, self.now())

    def __exit__(self, *error):
        self.done.set()
        self.thread.join()

    @staticmethod
    def now() -> float:
        fields = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        return round(int(fields["RssAnon"].split()[0]) / 2**20, 2)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    planning.free_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Reserved GPU memory; without a GPU, resident host memory since the process began."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_reserved() / 2**30, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


if __name__ == "__main__":
    main()
