"""A training from the command line, in two processes on a CPU; and in one, for comparison."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forks
import pandas as pd
import psutil
import pytest
import stages
import transformers
from accelerate.state import AcceleratorState
from packaging.version import Version
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qlora_helpers import (
    RunConfig,
    TrainingStopped,
    Workspace,
    label_probabilities,
    launch,
    load_on_each_gpu,
    load_tokenizer,
    train_in_processes,
)
from qlora_helpers.__main__ import main
from qlora_helpers.config import PROFILES
from qlora_helpers.run.checkpoints import Checkpoints

SETTINGS = {"train_size": 17, "effective_batch_size": 15, "num_epochs": 12}  # batches of 15 and 2


def train_in_two(folder: Path, log: Path) -> None:
    """Run the command `train` in two forked processes.

    PyTorch's agent starts, watches and stops them, as it does for `torch.distributed.run`. Beside
    the file `log`, `<log>.<rank>` has a process's id.
    """

    def train() -> None:
        log.with_suffix(f".{os.environ['RANK']}").write_text(str(os.getpid()))
        AcceleratorState._reset_state(True)  # in pytest's process it is that of one process
        sys.exit(main(["train", "--workspace", str(folder)]))

    os.environ["OMP_NUM_THREADS"] = "1"
    options = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "start_method": "fork"}
    config = LaunchConfig(1, 1, nproc_per_node=2, max_restarts=0, **options)
    elastic_launch(config, train)()


def train_and_wait(folder: Path, log: Path) -> None:
    """As `train_in_two`; after the first checkpoint the first process waits for a signal."""
    write = Checkpoints.write

    def write_and_wait(*args, **facts) -> bool:
        written = write(*args, **facts)
        signal.pause()
        return written

    Checkpoints.write = write_and_wait
    train_in_two(folder, log)


class Forked:
    """A forked process that calls `function`, with what the launcher needs of a Popen."""

    def __init__(self, function: Callable[[], object], log: Path):
        self.pid, self.returncode = forks.start(function, log), None

    def poll(self) -> int | None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


@pytest.fixture
def prepared(tiny, tmp_path, monkeypatch):
    """The folder of a workspace that is filled as 01 and 02 do."""
    monkeypatch.setenv("QLORA_WORKSPACE", str(tmp_path / "run"))
    stages.set_up(stages.tiny_config(tiny, **SETTINGS))
    stages.draw()
    return tmp_path / "run"


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory) -> Path:
    """The folder of a run that one process has trained, without a stop."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_WORKSPACE", str(folder))
        stages.set_up(stages.tiny_config(tiny, **SETTINGS))
        stages.draw()
        stages.train()
    return folder


def assert_same_losses(folder: Path, alone: Path) -> None:
    histories = [json.loads((run / "training.json").read_text()) for run in (folder, alone)]
    for part in ("train", "validation"):
        found, right = ([entry["loss"] for entry in history[part]] for history in histories)
        assert found == pytest.approx(right, abs=1e-4)


def assert_same(folder: Path, alone: Path) -> None:
    assert_same_losses(folder, alone)
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, alone)]
    for name, weight in weights[1].items():
        assert (weights[0][name] - weight).abs().max() < 1e-3, name


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason='on a CPU, processes load a checkpoint to "cpu:0", which torch.load does not know',
)
def test_two_processes_go_on_from_the_checkpoint_of_one_and_publish(prepared, alone, capsys):
    workspace, config = stages.open_workspace("02_data_subset")
    trainer = stages.trainer_for(workspace, config)
    stages.stop_at(trainer, step=4)
    with pytest.raises(TrainingStopped):
        stages.fit(workspace, trainer)
    capsys.readouterr()
    train_in_processes(workspace, 2)
    printed = capsys.readouterr().out.splitlines()
    starts = ["Processes: 2; in each", "Going on from the checkpoint of step 4 of 24"]
    starts += ["What 03_qlora_training", "The adapter is in"]
    assert [line for line in printed if line.startswith(tuple(starts))] == printed
    assert [sum(line.startswith(start) for line in printed) for start in starts[:2]] == [1, 1]
    assert_same(prepared, alone)
    files = {"adapter", "config.json", "manifests", "subset", "training.json"}
    assert {path.name for path in prepared.glob("[!.]*")} == files


def test_a_stop_ends_both_after_the_same_step(tiny, workspace, monkeypatch):
    stages.set_up(stages.tiny_config(tiny, **SETTINGS | {"num_epochs": 1000}))
    run, seen = stages.draw(), []

    def fork(command, stdout, **options) -> Forked:
        assert command[-2:] == ["--workspace", str(workspace)]
        return Forked(lambda: train_in_two(workspace, Path(stdout.name)), Path(stdout.name))

    def stop(history, status):
        seen.append((history()["train"][-1]["step"], status))
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.subprocess, "Popen", fork)
    same_step = r"^Stopped at step (\d+) of 2000. The checkpoint of step \1 is written"
    with pytest.raises(TrainingStopped, match=same_step):
        train_in_processes(run, 2, stop)
    step, status = seen[0]
    assert status.startswith(f"step {step} of 2000, ")
    assert list(workspace.glob("checkpoints/checkpoint-*/manifest.json"))


def test_more_processes_than_rows_of_a_batch_are_refused(tiny, workspace, tmp_path):
    stages.set_up(stages.tiny_config(tiny, effective_batch_size=1))
    stages.draw()
    status, printed = forks.run(lambda: train_in_two(workspace, tmp_path / "log"), tmp_path / "log")
    assert status != 0 and "2 processes cannot share an effective batch of 1: set" in printed
    assert not list(workspace.glob("checkpoints/*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_both_and_one_goes_on(prepared, alone, tmp_path, rank):
    log = tmp_path / "log"
    launched = forks.start(lambda: train_and_wait(prepared, log), log)
    while not list(prepared.glob("checkpoints/checkpoint-*[0-9]")):
        assert os.waitpid(launched, os.WNOHANG) == (0, 0), log.read_text()
        time.sleep(0.02)
    processes = [int(log.with_suffix(f".{n}").read_text()) for n in (0, 1)]
    os.kill(processes[rank], signal.SIGKILL)
    _, status = os.waitpid(launched, 0)
    assert status != 0 and not any(map(psutil.pid_exists, processes))
    assert not (prepared / "adapter").exists(), log.read_text()
    stages.train()
    assert_same(prepared, alone)


@pytest.mark.slow
def test_the_small_model_gives_the_same_losses_and_labels(tmp_path, monkeypatch):
    answers = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        monkeypatch.setenv("QLORA_WORKSPACE", str(folder))
        sizes = {"train_size": 49, "validation_size": 12, "test_size": 20, "num_epochs": 2}
        config = RunConfig(**PROFILES["cpu"] | {"profile": "cpu"} | sizes)
        stages.set_up(config)
        texts = pd.read_parquet(stages.draw() / "subset/test.parquet").text
        train_in_processes(Workspace(folder), count)
        models, tokenizer = load_on_each_gpu(config, folder / "adapter"), load_tokenizer(config)
        answers.append(label_probabilities(models, tokenizer, texts, config))
    assert_same_losses(tmp_path / "2", tmp_path / "1")
    assert (answers[0].argmax(1) == answers[1].argmax(1)).all()
    assert abs(answers[0] - answers[1]).max() < 1e-3
