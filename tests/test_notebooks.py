"""The notebooks: what their run by nbval left in the workspace, what is committed, and how run_all.py fails."""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from qlora_helpers import LABELS, reliability, with_temperature

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ["01_setup", "02_data_subset", "03_qlora_training", "04_evaluation", "05_inference"]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
SYSTEMS = ["majority class", "TF-IDF + logistic regression", "base model, zero-shot", "base model, 4 examples", "tuned model"]
each = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def run_all(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "notebooks" / "run_all.py", *arguments], env=os.environ | environment,
                          capture_output=True, text=True, timeout=300, cwd=ROOT)


# What the run left


def test_tuned_model_beats_the_base_model(notebook_workspace):
    board = json.loads((notebook_workspace / "metrics.json").read_text())["scoreboard"]
    assert list(board) == SYSTEMS
    assert {entry["rows"] for entry in board.values()} == {80}
    assert board["majority class"]["accuracy"] == 0.25
    assert board["tuned model"]["accuracy"] >= 0.85
    assert board["tuned model"]["accuracy"] - board["base model, zero-shot"]["accuracy"] >= 0.15
    assert board["tuned model"]["macro_f1"] >= 0.85


def test_predictions_are_complete_and_match_the_scoreboard(notebook_workspace):
    rows = pd.read_parquet(notebook_workspace / "predictions.parquet")
    test = pd.read_parquet(notebook_workspace / "subset" / "test.parquet")
    assert rows.text_sha256.tolist() == [hashlib.sha256(text.encode()).hexdigest() for text in test.text]
    assert rows.label.tolist() == test.label.tolist()
    board = json.loads((notebook_workspace / "metrics.json").read_text())["scoreboard"]
    for system in SYSTEMS:
        probabilities = rows[[f"{system}: P({label})" for label in LABELS]].to_numpy()
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-9)
        assert (probabilities.argmax(axis=1) == rows[f"{system}: prediction"]).all()
        assert (rows[f"{system}: prediction"] == rows.label).mean() == board[system]["accuracy"]


def test_calibration_goes_with_the_adapter(notebook_workspace):
    calibration = json.loads((notebook_workspace / "adapter" / "calibration.json").read_text())
    assert calibration == json.loads((notebook_workspace / "metrics.json").read_text())["calibration"]
    rows = pd.read_parquet(notebook_workspace / "predictions.parquet")
    probabilities = rows[[f"tuned model: P({label})" for label in LABELS]].to_numpy()
    assert reliability(probabilities, rows.label)[1] == pytest.approx(calibration["ece_before"])
    softened = with_temperature(probabilities, calibration["temperature"])
    assert reliability(softened, rows.label)[1] == pytest.approx(calibration["ece_after"])
    assert "temperature" in (notebook_workspace / "adapter" / "README.md").read_text()


def test_history_shows_learning(notebook_workspace):
    history = json.loads((notebook_workspace / "training.json").read_text())
    losses = [entry["loss"] for entry in history["validation"]]
    assert [entry["epoch"] for entry in history["validation"]] == [0, 1, 2, 3]
    assert losses[0] > np.log(4) > 0.7 > min(losses)
    assert history["best_epoch"] == np.argmin(losses)
    assert np.isfinite([entry["loss"] for entry in history["train"]]).all()


@pytest.mark.parametrize(("name", "missing"), [("04_evaluation", "03_qlora_training"), ("05_inference", "03_qlora_training"),
                                               ("03_qlora_training", "02_data_subset"), ("02_data_subset", "01_setup")])
def test_a_notebook_before_its_turn_names_the_one_to_run(notebook_workspace, tmp_path, name, missing):
    """In a workspace where every notebook before `missing` ran; it stops in its first cell that does anything."""
    workspace, folder = tmp_path / "workspace", tmp_path / "notebooks"
    shutil.copytree(notebook_workspace, workspace, ignore=shutil.ignore_patterns("checkpoints", "notebooks"))
    for later in NAMES[NAMES.index(missing):]:
        (workspace / "manifests" / f"{later}.json").unlink(missing_ok=True)
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", folder)
    result = run_all("--folder", str(folder), QLORA_WORKSPACE=str(workspace))
    assert result.returncode == 1
    assert f"{name}.ipynb, cell 2 of" in result.stderr
    assert f"WorkspaceError: workspace holds nothing from {missing} yet. Run notebooks/{missing}.ipynb first." in result.stderr


# How run_all.py fails


def test_a_failing_cell_stops_the_run_and_is_named(tmp_path):
    cells = [nbformat.v4.new_markdown_cell("# Broken"), nbformat.v4.new_code_cell("print('ran')"), nbformat.v4.new_code_cell("1 / 0"),
             nbformat.v4.new_code_cell("print('must not run')")]
    for name in ["01_broken", "02_never"]:
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    result = run_all("--folder", str(tmp_path), QLORA_WORKSPACE=str(tmp_path / "workspace"))
    assert result.returncode == 1
    assert "01_broken.ipynb, cell 2 of 3 failed:" in result.stderr
    assert "    1 / 0" in result.stderr
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert "accuracy=" not in result.stdout
    kept = code_cells(tmp_path / "workspace" / "notebooks" / "01_broken.ipynb")
    assert [cell.execution_count for cell in kept] == [1, 2, None]
    assert not (tmp_path / "workspace" / "notebooks" / "02_never.ipynb").exists()


def test_a_dead_kernel_is_named(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1"), nbformat.v4.new_code_cell("import os; os._exit(9)")]),
                   tmp_path / "01_dies.ipynb")
    result = run_all("--folder", str(tmp_path), QLORA_WORKSPACE=str(tmp_path / "workspace"))
    assert result.returncode == 1
    assert "01_dies.ipynb, cell 2 of 2 failed:" in result.stderr
    assert "its kernel died" in result.stderr


@pytest.mark.parametrize(("variable", "value", "message"), [
    ("QLORA_PROFILE", "tpu", "ConfigError: profile is 'tpu': choose 't4'"),
    ("QLORA_EPOCHS", "0", "ConfigError: num_epochs is 0: it must be at least 1."),
    ("QLORA_DATA", "no/such/folder", "which is not here. Give a folder that holds train.csv and test.csv"),
])
def test_a_bad_setting_stops_before_any_kernel(tmp_path, variable, value, message):
    result = run_all(**{"QLORA_WORKSPACE": str(tmp_path), variable: value})
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


# What is committed


def test_the_five_notebooks_are_there():
    assert [path.stem for path in PATHS] == NAMES


@each
def test_committed_executed_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(path)] == list(range(1, len(code_cells(path)) + 1))
    assert not [output for cell in code_cells(path) for output in cell.outputs if output.output_type == "error"]
    assert all("state" in value for value in notebook.metadata.get("widgets", {}).values())
    assert not re.findall(r"site-packages|/(?:root|home|tmp|work|opt|usr|Users)/[\w./-]*", path.read_text())
    assert path.stat().st_size < 1_000_000
    assert notebook.metadata.accelerator == "GPU" and notebook.metadata.colab.gpuType == "T4"


@each
def test_badge_and_install_cell_name_this_notebook_and_repository(path):
    slug = REPOSITORY.removeprefix("https://github.com/")
    notebook = nbformat.read(path, as_version=4)
    assert f"(https://colab.research.google.com/github/{slug}/blob/main/notebooks/{path.name})" in notebook.cells[0].source
    assert f"qlora-helpers @ git+{REPOSITORY}@v" in notebook.cells[1].source


@each
def test_every_import_is_a_requirement(path):
    required = {re.split(r"[<>=]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if re.match(r"\w", line)}
    comes_with = {"sklearn": "scikit-learn", "pandas": "datasets", "numpy": "datasets", "huggingface_hub": "transformers",
                  "qlora_helpers": None} | dict.fromkeys(sys.stdlib_module_names)
    for cell in code_cells(path):
        source = re.sub(r"^(\s*)%pip.*$", r"\1pass", cell.source, flags=re.M)
        for node in ast.walk(ast.parse(source)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in (module.partition(".")[0] for module in modules):
                assert comes_with.get(name, name) in required | {None}, f"{name} is imported but not in requirements.txt"


def test_requirements_never_ask_for_torch():
    assert not re.search(r"^torch\b", (ROOT / "requirements.txt").read_text(), flags=re.M)
