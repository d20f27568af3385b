"""Damage to a workspace ends in a message that names the file and the notebook that makes it again,
or does no harm: never in another result, never in a bare traceback."""

import contextlib
import io
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import stages

from qlora_helpers.errors import QLoraError, TrainingStopped
from qlora_helpers.run.workspace import Workspace
from qlora_helpers.widgets.loss_panel import LossPanel

RUNS = {
    "01_setup": stages.set_up,
    "02_data_subset": lambda config: stages.draw(),
    "03_qlora_training": lambda config: stages.train(),
    "04_evaluation": lambda config: stages.evaluate(),
}


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A finished workspace with an earlier training, one that stopped in the middle, and the same
    two of another seed; and what is right."""
    folder, config, right = tmp_path_factory.mktemp("made"), stages.tiny_config(tiny), None
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        for name, seed in (("finished", 42), ("finished-other", 7)):
            patch.setenv("QLORA_WORKSPACE", str(folder / name))
            for earlier in [8] if seed == 42 else []:
                stages.run_all(stages.tiny_config(tiny, seed=earlier))
            stages.run_all(stages.tiny_config(tiny, seed=seed))
            right = stages.infer() if seed == 42 else right
            patch.setenv("QLORA_WORKSPACE", str(folder / name.replace("finished", "unfinished")))
            stages.set_up(stages.tiny_config(tiny, seed=seed))
            stages.draw()
            workspace, opened = stages.open_workspace("02_data_subset")
            trainer = stages.trainer_for(workspace, opened, checkpoint_steps=2)
            stages.stop_at(trainer, step=9)
            with pytest.raises(TrainingStopped):
                stages.fit(workspace, trainer)
    return folder, config, right, stages.result(folder / "finished")


def _damage(path: Path, kind: str, other: Path, chance: random.Random) -> bool:
    """Damage a file. Returns False where this would change nothing."""
    data = path.read_bytes()
    if kind == "cut":
        path.write_bytes(data[: chance.randrange(len(data))] if data else b"?")
    elif kind == "flipped":
        flipped = bytearray(data or b"\0")
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
    elif kind == "foreign":
        if not other.is_file() or other.read_bytes() == data:
            return False
        shutil.copyfile(other, path)
    else:
        path.unlink()
        if kind == "a directory":
            path.mkdir()
            (path / "inside").touch()
        elif kind == "unreadable":
            path.symlink_to(path.name)  # which also root cannot read
    return True


def _remedied(config, action):
    """Return what `action` returns once every notebook that a message names has run, and those."""
    messages = []
    for _ in range(8):
        try:
            return action(), messages
        except QLoraError as error:
            messages.append(str(error))
            notebook = re.search(r"notebooks/(\w+)\.ipynb", str(error))
            assert notebook, f"no remedy: {error}"
            with contextlib.suppress(QLoraError):  # which names another one
                RUNS[notebook[1]](config)
    raise AssertionError(f"the remedies do not end: {messages}")


def _corrupt(made, folder: Path, seed: int, monkeypatch) -> str:
    source, config, right, result = made
    chance = random.Random(seed)
    while True:
        kind = chance.choice(["cut", "flipped", "foreign", "removed", "a directory", "unreadable"])
        state = chance.choice(["finished", "unfinished"])
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source / state, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        path = chance.choice(files)
        name = path.relative_to(folder).as_posix()
        if _damage(path, kind, source / f"{state}-other" / name, chance):
            break
    monkeypatch.setenv("QLORA_WORKSPACE", str(folder))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if state == "finished":
            answer, said = _remedied(config, stages.infer)
            if name.startswith(("earlier", "training")):
                LossPanel(Workspace(folder)).load()
        else:
            _, said = _remedied(config, stages.train)
            _, more = _remedied(config, stages.evaluate)
            (answer, _), said = _remedied(config, stages.infer), said + more
    case = f"{state}, {name} {kind}: {said} {printed.getvalue()}"
    assert answer == right, f"{answer}: {case}"
    assert stages.result(folder) == result, case
    if name.startswith("checkpoints/checkpoint-9/"):  # the newest
        assert "checkpoint-9 is not complete" in printed.getvalue(), case
    elif name.startswith(("config", "subset", "adapter", "predictions", "training")):
        assert said and os.path.basename(name) in said[0], case
    elif name.startswith("manifests") and kind not in ("removed", "foreign"):
        assert said and name in said[0], case
    return case.partition("\n")[0].replace(str(folder), "")


@pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_damage_is_named_with_its_remedy_and_changes_no_result(made, tmp_path, monkeypatch, count):
    for seed in range(count):
        print(seed, _corrupt(made, tmp_path / "run", 1000 * count + seed, monkeypatch), flush=True)
