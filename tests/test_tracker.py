"""QLORA_REPORT_TO: what a tracker gets of a training is what the history holds."""

from importlib.util import find_spec

import pytest
import stages

from qlora_helpers import ConfigError, RunConfig

OUTSIDE = ["loss", "learning_rate", "grad_norm"]


@pytest.fixture
def trained(tiny, workspace, monkeypatch):
    """A function that trains with a tracker, and returns the history."""

    def train(tracker: str) -> dict:
        monkeypatch.setenv("QLORA_REPORT_TO", tracker)
        stages.set_up(stages.tiny_config(tiny))
        stages.draw()
        return stages.train()

    return train


def right(history: dict) -> dict[str, list[float]]:
    """Return the values of each curve in a history."""
    curves = {f"train/{name}": [step[name] for step in history["train"]] for name in OUTSIDE}
    validation = history["validation"]
    return curves | {
        f"eval/{name}": [epoch[name] for epoch in validation]
        for name in ("loss", "accuracy", "macro_f1")
    }


def test_tensorboard_files_are_in_the_runs_folder(trained, workspace):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = right(trained("tensorboard"))
    (file,) = workspace.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    for name, values in curves.items():
        assert [e.value for e in events.Scalars(name)] == pytest.approx(values, rel=1e-6), name


@pytest.mark.skipif(find_spec("trackio") is None, reason="pip install trackio")
def test_trackio_keeps_them_on_this_machine(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # it reads this when imported
    curves = right(trained("trackio"))
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("huggingface")
    logs = SQLiteStorage.get_logs("huggingface", run)
    for name, values in curves.items():
        assert [log[name] for log in logs if name in log] == pytest.approx(values), name


@pytest.mark.parametrize("name", ["no-such-tracker", "../x"])
def test_an_unknown_tracker_is_named_before_anything_runs(monkeypatch, name):
    monkeypatch.setenv("QLORA_REPORT_TO", name)
    with pytest.raises(ConfigError, match=f"QLORA_REPORT_TO is '{name}', which is not installed"):
        RunConfig.from_environment()
