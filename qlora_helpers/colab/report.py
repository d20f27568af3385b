"""The report of a run: what it took on this machine, to be sent to the authors."""

import os
import platform
import resource
import time

import psutil
import torch

from qlora_helpers.colab.machine import machine_name
from qlora_helpers.config import AG_NEWS, SAMPLE, RunConfig
from qlora_helpers.run.workspace import Workspace, seconds_since_publishing

_NOTEBOOKS = ("01_setup", "02_data_subset", "03_qlora_training", "04_evaluation")
_SCORES = ("accuracy", "low", "high", "macro_f1", "f1_low", "f1_high", "rows", "rows_per_second")


def run_report(workspace: Workspace, config: RunConfig) -> dict:
    """Return the figures of a finished run, as JSON: machine, minutes, training and scores.

    There is no path, no name of the reader's files and no token in it. Memory is in GiB, `low` to
    `high` are 95% intervals. Raises WorkspaceError that names the notebook to run.
    """
    manifests = {name: workspace.require(name) for name in _NOTEBOOKS}
    history = workspace.read_json("03_qlora_training", "training.json")
    board = workspace.read_json("04_evaluation", "metrics.json")["scoreboard"]
    minutes = {name: manifest["seconds"] / 60 for name, manifest in manifests.items()}
    minutes["05_inference"] = seconds_since_publishing() / 60
    tuned, plan = board["tuned model"], history["plan"]
    is_folder, is_known = os.path.exists(config.base_model), config.data in (AG_NEWS, SAMPLE)
    return {
        "machine": _machine(),
        "versions": manifests["03_qlora_training"]["versions"],
        "minutes": {name: round(count, 1) for name, count in minutes.items()},
        "run": {
            "base_model": "a folder" if is_folder else config.base_model,
            "data": config.data if is_known else "rows of the reader's own",
            "training_rows": config.train_size,
            "epochs": config.num_epochs,
        },
        "training": {
            "seconds_to_first_step": history["train"][0]["seconds"],
            "rows_per_second_in_steps": history["step_rows_per_second"],
            "rows_per_second": history["rows_per_second"],
            "steps": len(history["train"]),
            "skipped_steps": history["skipped_steps"],
            "peak_gpu_memory": history["peak_gib"],
            "micro_batch_size": plan["micro_batch_size"],
            "plan": plan["reason"],
        },
        "scores": {name: tuned[name] for name in _SCORES},
        "accuracies": {system: round(row["accuracy"], 4) for system, row in board.items()},
    }


def _machine() -> dict:
    # in kilobytes, but on macOS
    unit = 2**30 if platform.system() == "Darwin" else 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = {
        "kind": machine_name(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory": round(psutil.virtual_memory().total / 2**30, 1),
        "peak_memory_of_this_notebook": round(peak / unit, 1),
        "gpu": None,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        facts["gpu"] = f"{torch.cuda.get_device_name()}, {major}.{minor}, {memory:.2f} GiB"
        facts["gpus"] = torch.cuda.device_count()
    return facts
