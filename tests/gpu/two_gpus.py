"""Train and score on two GPUs beside one, under a T4's terms, and print two tables.

    python tests/gpu/two_gpus.py                  AG News from the hub
    python tests/gpu/two_gpus.py --data FOLDER    or from train.csv and test.csv

It needs two NVIDIA GPUs, and what rehearse.py needs; each GPU comes with two CPU cores. The model
has Mistral-7B's shape and random weights. Losses are compared with those of one GPU, where the same
batches cut in two show what rounding does. Then a training of the real small model loses a process
after its first epoch, and goes on with one GPU. `rehearse.py --gpus 2` runs the five notebooks.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import rehearse

STEPS, ROWS = 50, 3200  # of a training, at most
LAUNCH = ["-m", "accelerate.commands.launch", "-m", "qlora_helpers", "train", "--workspace"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
REPEATS = 3  # of each scoring; the median counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rehearse.add_arguments(parser)
    parser.add_argument("--in-worker", nargs=2, help=argparse.SUPPRESS)  # a function, its argument
    arguments = parser.parse_args()
    if arguments.in_worker:
        name, folder = arguments.in_worker
        WORKERS[name](Path(folder))
        return
    arguments.cores = [0, 1]
    rehearse.set_environment(arguments)
    work = (arguments.work or Path(tempfile.mkdtemp(prefix="qlora_two_gpus_"))).absolute()
    rehearse.prepare_mistral(work, arguments.tokenizer)
    worker = [__file__, "--in-worker"]
    table, first = {}, None
    for name, gpus, command, rows_a_step in (
        ("1 GPU", 1, LAUNCH, 16),
        ("2 GPUs", 2, LAUNCH, 16),
        ("1 GPU, batches cut in two", 1, [*worker, "cut_in_two"], 16),
        ("1 GPU for 2 processes, by gloo", 1, [*TORCHRUN, "--in-worker", "by_gloo"], 16),
        ("2 GPUs, as many rows on each", 2, LAUNCH, 32),
        ("1 GPU, 64 rows", 1, LAUNCH, 64),
        ("2 GPUs, as many rows on each, 128 rows", 2, LAUNCH, 128),
    ):
        folder = work / name.replace(" ", "_")
        rows = min(rows_a_step * STEPS, ROWS)
        draw(folder, "mistral", effective_batch_size=rows_a_step, train_size=rows, num_epochs=1)
        peak = run([*command, str(folder)], gpus)
        history = json.loads((folder / "training.json").read_text())
        table[name] = {
            "rows a step": rows_a_step,
            "training rows/s, steps alone": history["step_rows_per_second"],
            "peak GPU memory of a process, GiB": round(peak, 2),
        }
        losses = [entry["loss"] for entry in history["train"]]
        first = first or losses
        if rows_a_step == 16:
            changes = [abs(one - other) for one, other in zip(losses, first, strict=True)]
            table[name]["loss, mean change of a step"] = round(statistics.mean(changes), 5)
            table[name]["largest"] = round(max(changes), 5)
        print(json.dumps({name: table[name]}), flush=True)
    run([*worker, "score", str(folder)], 2)  # the last one has the most rows
    small = work / "small"
    draw(small, "smollm2")
    run([*worker, "lose_a_process", str(small)], 2)
    run([*LAUNCH, str(small)], 1)
    history = json.loads((small / "training.json").read_text())
    print(f"Validation: {history['validation'][-1]}")
    columns = {name: {key: str(value) for key, value in one.items()} for name, one in table.items()}
    print(f"\n{rehearse.description()}\n\n{rehearse.as_table(columns)}")


def draw(folder: Path, model: str, **choices) -> None:
    """Fill the workspace `folder` for a `model` of rehearse.py, as 01 and 02 do."""
    sys.path.insert(0, str(rehearse.ROOT / "tests"))
    import stages

    from qlora_helpers import RunConfig

    os.environ |= rehearse.MODELS[model] | {"QLORA_WORKSPACE": str(folder)}
    stages.set_up(RunConfig.from_environment(**choices))
    stages.draw()


def run(command: list[str], gpus: int) -> float:
    """Run a Python `command` on so many GPUs, and return the peak GPU memory of a process."""
    os.sched_setaffinity(0, range(2 * gpus))
    visible = ",".join(map(str, range(gpus)))
    with tempfile.TemporaryDirectory() as peaks:
        environment = {"CUDA_VISIBLE_DEVICES": visible, "REHEARSAL_PEAKS": peaks}
        subprocess.run([sys.executable, *command], env=os.environ | environment, check=True)
        files = [json.loads(file.read_text()) for file in Path(peaks).glob("*.json")]
    return max(one["gpu_gib"] for one in files)


def cut_in_two(folder: Path) -> None:
    """Train with half the micro-batch that the package would choose."""
    from qlora_helpers import launch

    plan_batches = launch.plan_batches

    def halved(*arguments):
        plan = plan_batches(*arguments)
        return dataclasses.replace(plan, micro_batch_size=plan.micro_batch_size // 2)

    launch.plan_batches = halved
    launch.train_run(folder)


def by_gloo(folder: Path) -> None:
    """Train as one of several processes that may share a GPU, which NCCL refuses."""
    from accelerate import PartialState

    from qlora_helpers import launch

    PartialState(backend="gloo")
    launch.train_run(folder)


def score(folder: Path) -> None:
    """Print rows a second through the training rows, by one model and by one on each GPU."""
    import pandas as pd

    from qlora_helpers import (
        label_probabilities,
        load_on_each_gpu,
        load_tokenizer,
        open_workspace,
    )

    os.environ["QLORA_WORKSPACE"] = str(folder)
    workspace, config = open_workspace("02_data_subset", "03_qlora_training")
    texts = pd.read_parquet(workspace / "subset/train.parquet").text
    models, tokenizer = load_on_each_gpu(config, workspace / "adapter"), load_tokenizer(config)
    answers = {}
    for model in models:
        label_probabilities(model, tokenizer, texts[:8], config)
    for used in (models[:1], models):
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            answers[len(used)] = label_probabilities(used, tokenizer, texts, config)
            seconds.append(time.perf_counter() - start)
        rate = len(texts) / statistics.median(seconds)
        print(f"{len(used)} GPUs: {rate:.1f} rows scored/s", flush=True)
    change = abs(answers[1] - answers[len(models)])
    print(f"mean change of a probability {change.mean():.1e}, largest {change.max():.1e}")


def lose_a_process(folder: Path) -> None:
    """Kill the second of two training processes once there is a checkpoint."""
    from qlora_helpers import ModelError, Workspace, gpu_count, train_in_processes

    killed = []

    def kill(history, status):
        if killed or not list(folder.glob("checkpoints/checkpoint-*[0-9]")):
            return
        for process in psutil.Process().children(recursive=True):
            if "train" in process.cmdline() and process.environ().get("RANK") == "1":
                print(f"Killed at {status}", flush=True)
                process.kill()
                killed.append(time.perf_counter())
                return

    try:
        train_in_processes(Workspace(folder), gpu_count(), kill)
    except ModelError as error:
        print(f"After {time.perf_counter() - killed[0]:.1f} s: {error}")
    else:
        raise SystemExit("the training did not notice that it had lost a process")


WORKERS = {one.__name__: one for one in (cut_in_two, by_gloo, score, lose_a_process)}

if __name__ == "__main__":
    main()
