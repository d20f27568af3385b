"""The report of the run that the notebooks left."""

import json

from qlora_helpers import RunConfig, Workspace, run_report

PARTS = ["machine", "versions", "minutes", "run", "training", "scores", "accuracies"]


def test_it_has_the_figures_of_the_run(notebook_workspace):
    report = json.loads((notebook_workspace / "report.json").read_text())
    history = json.loads((notebook_workspace / "training.json").read_text())
    metrics = json.loads((notebook_workspace / "metrics.json").read_text())
    tuned = metrics["scoreboard"]["tuned model"]
    assert list(report) == PARTS
    assert report["scores"]["accuracy"] == tuned["accuracy"] >= report["scores"]["low"]
    assert report["training"]["steps"] == 54 == len(history["train"])
    assert report["training"]["rows_per_second"] == history["rows_per_second"]
    minutes = report["minutes"]
    assert len(minutes) == 5 and minutes["03_qlora_training"] >= history["seconds"] / 60 - 0.1
    assert sum(minutes.values()) < 24 * 60 and min(minutes.values()) > 0
    assert report["machine"]["kind"] == "other" and report["machine"]["memory"] > 1


def test_it_names_nothing_of_the_readers(notebook_workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    config = RunConfig.from_json((notebook_workspace / "config.json").read_text())
    own = {"base_model": str(tmp_path), "data": str(tmp_path / "mine.csv")}
    report = run_report(Workspace(notebook_workspace), RunConfig(**vars(config) | own))
    assert report["run"]["base_model"] == "a folder"
    assert report["run"]["data"] == "rows of the reader's own"
    text = json.dumps(report)
    for secret in ("hf_secret", str(tmp_path), str(notebook_workspace), "/root", "/home"):
        assert secret not in text
