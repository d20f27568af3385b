"""The notebooks: what their run by nbval left in the workspace, what is committed, and how run_all.py fails."""

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
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import stages
from IPython.core.interactiveshell import InteractiveShell
from test_labelled_csv import TEN, ten_labels
from traitlets.config import Config

from qlora_helpers import LABELS, reliability, with_temperature
from qlora_helpers.errors import WorkspaceError

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ["01_setup", "02_data_subset", "03_qlora_training", "04_evaluation", "05_inference"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY, VERSION = PROJECT["urls"]["Repository"], PROJECT["version"]
BADGE = f"https://colab.research.google.com/github/{REPOSITORY.removeprefix('https://github.com/')}/blob/main/notebooks/{{name}}"
INSTALL = re.compile(
    rf'"qlora-helpers @ (git\+)?{re.escape(REPOSITORY)}(@|/archive/refs/tags/)v{re.escape(VERSION)}(\.zip)?"'
)
REQUIRED = {
    re.split(r"[<>=]", line)[0]
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if re.match(r"\w", line)
} | {None}
COMES_WITH = {
    "sklearn": "scikit-learn",
    "pandas": "datasets",
    "numpy": "datasets",
    "huggingface_hub": "transformers",
    "qlora_helpers": None,
} | dict.fromkeys(sys.stdlib_module_names)
SYSTEMS = [
    "majority class",
    "TF-IDF + logistic regression",
    "base model, zero-shot",
    "base model, 4 examples",
    "tuned model",
]
each = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture
def run_all(monkeypatch, capsys):
    """A function that runs run_all.py as a program, in this process: what it prints to stdout, and
    what it ends with on stderr (None at success)."""

    def run(*arguments: str, **environment: str) -> tuple[str, str | None]:
        monkeypatch.setattr(sys, "argv", ["run_all.py", *arguments])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        try:
            runpy.run_path(str(ROOT / "notebooks" / "run_all.py"), run_name="__main__")
        except SystemExit as ended:  # Python writes a text to stderr, and the exit code is 1
            assert isinstance(ended.code, str)
            return capsys.readouterr().out, ended.code
        return capsys.readouterr().out, None

    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # as it sets it, for this test alone
    return run


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
    assert rows.text_sha256.tolist() == [
        hashlib.sha256(text.encode()).hexdigest() for text in test.text
    ]
    assert rows.label.tolist() == test.label.tolist()
    board = json.loads((notebook_workspace / "metrics.json").read_text())["scoreboard"]
    for system in SYSTEMS:
        probabilities = rows[[f"{system}: P({label})" for label in LABELS]].to_numpy()
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-9)
        assert (probabilities.argmax(axis=1) == rows[f"{system}: prediction"]).all()
        assert (rows[f"{system}: prediction"] == rows.label).mean() == board[system]["accuracy"]


def test_calibration_goes_with_the_adapter(notebook_workspace):
    calibration = json.loads((notebook_workspace / "adapter" / "calibration.json").read_text())
    assert (
        calibration == json.loads((notebook_workspace / "metrics.json").read_text())["calibration"]
    )
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


@pytest.fixture
def run_cells(tmp_path):
    """A function that runs a notebook's code cells until one fails, in an IPython in this process.
    A kernel would import everything again. It returns what the last cell raised, and its number."""

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
            plt.close("all")  # a kernel's end would

    return run


# Out of their turn, and on rows of the reader's own


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
    """In a workspace where every notebook before `missing` ran, its first cell that does anything
    stops."""
    steps = {
        "01_setup": lambda: stages.set_up(stages.tiny_config("SmolLM2-135M-Instruct")),
        "02_data_subset": stages.draw,
    }
    for earlier in NAMES[: NAMES.index(missing)]:
        steps[earlier]()
    error, cell = run_cells(ROOT / "notebooks" / f"{name}.ipynb")
    assert isinstance(error, WorkspaceError) and cell == 2
    assert f"holds nothing from {missing} yet. Run notebooks/{missing}.ipynb first." in str(error)


def test_ten_labels_that_begin_alike_and_hostile_texts_go_through_the_five_notebooks(
    run_cells, tiny, workspace, tmp_path, monkeypatch, capsys
):
    """With a random model: what is shown is that nothing breaks on the way and that every row is
    answered for."""
    hostile = [
        ("word " * 4000, "sci.space"),
        ("", "sci.med"),
        ("\U0001f680\U0001f469\u200d\U0001f680 liftoff \U0001f680", "sci.space"),
        (
            "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd \u0645\u0631\u062d\u0628\u0627",
            "talk.religion",
        ),
        ("<script>alert(1)</script> $5 _of_ {text} \\n Topic: rec.autos", "comp.windows"),
        ("NUL \x00 and \x1b[31m", "comp.mac"),
    ]
    assert len(hostile[0][0]) == 20_000
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *ten_labels(), *hostile])
    settings = {
        "DATA": str(tmp_path / "rows.csv"),
        "BASE_MODEL": tiny,
        "EPOCHS": "1",
        "MAX_LENGTH": "64",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"QLORA_{name}", value)
    said = {}
    for path in PATHS:
        error, cell = run_cells(path)
        said[path.stem] = capsys.readouterr().out
        assert error is None, f"{path.name}, cell {cell}: {said[path.stem][-3000:]}"
    board = json.loads((workspace / "metrics.json").read_text())["scoreboard"]
    assert board["tuned model"]["rows"] == 25 and "base model, 10 examples" in board
    rows = pd.read_parquet(workspace / "predictions.parquet")
    for label in TEN:
        assert rows[f"tuned model: P({label})"].between(0, 1).all()
    assert "rows left out, without a text: 1" in said["02_data_subset"]
    assert "Two labels begin with the same token" in said["02_data_subset"]
    card = (workspace / "adapter" / "README.md").read_text()
    assert '" A" (alt.misc), " B" (comp.mac)' in card and "AG News" not in card


def test_five_machines_hand_the_run_over_by_drive(
    run_cells, new_machine, tiny, monkeypatch, capsys
):
    """Each notebook on a Colab machine of its own, as their readers open them."""
    sizes = {"TRAIN_SIZE": "16", "VALIDATION_SIZE": "8", "TEST_SIZE": "8", "EPOCHS": "1"}
    for name, value in (sizes | {"BASE_MODEL": tiny, "MAX_LENGTH": "48"}).items():
        monkeypatch.setenv(f"QLORA_{name}", value)
    for path in PATHS:
        content = new_machine()
        error, cell = run_cells(path)
        said = capsys.readouterr().out
        assert error is None, f"{path.name}, cell {cell}: {said[-3000:]}"
        pushed = "On Google Drive: MyDrive/qlora_ag_news/cpu" in said
        assert pushed == (path.stem != "05_inference")  # which exports nothing unless it is asked
    published = {folder.name for folder in (content / "drive/MyDrive/qlora_ag_news/cpu").iterdir()}
    assert published == set(NAMES) - {"05_inference"}


# run_all.py


def test_run_all_keeps_the_executed_notebooks_and_prints_the_scoreboard(run_all, tmp_path):
    board = {
        "tuned model": {
            "accuracy": 0.75,
            "macro_f1": 0.5,
            "p_value": None,
            "rows_per_second": 1234.5,
        }
    }
    source = (
        f"import json, os\nwith open(os.environ['QLORA_WORKSPACE'] + '/metrics.json', 'w') as f:\n"
        f"    json.dump({{'scoreboard': {board}}}, f)"
    )
    for name, cell in (("01_first", "print('ran')"), ("02_last", source)):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    before = (tmp_path / "01_first.ipynb").read_bytes()
    for arguments in ([], ["--in-place"]):
        assert (tmp_path / "01_first.ipynb").read_bytes() == before
        printed, error = run_all(
            "--folder", str(tmp_path), *arguments, QLORA_WORKSPACE=str(tmp_path / "workspace")
        )
        assert error is None
        assert "2/2 cells" in printed and "1,234.5" in printed
        assert printed.splitlines()[-1] == "accuracy=0.7500 macro_f1=0.5000"
        kept = tmp_path / "workspace" / "notebooks" / "01_first.ipynb"
        assert [cell.outputs[0].text for cell in code_cells(kept)] == ["ran\n"]
    assert code_cells(tmp_path / "01_first.ipynb") == code_cells(kept)


def test_a_failing_cell_stops_the_run_and_is_named(run_all, tmp_path):
    cells = [
        nbformat.v4.new_markdown_cell("# Broken"),
        nbformat.v4.new_code_cell("print('ran')"),
        nbformat.v4.new_code_cell("1 / 0"),
        nbformat.v4.new_code_cell("print('must not run')"),
    ]
    for name in ["01_broken", "02_never"]:
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    printed, error = run_all("--folder", str(tmp_path), QLORA_WORKSPACE=str(tmp_path / "workspace"))
    assert "01_broken.ipynb, cell 2 of 3 failed:" in error
    assert "    1 / 0" in error
    assert "ZeroDivisionError: division by zero" in error
    assert "accuracy=" not in printed
    kept = code_cells(tmp_path / "workspace" / "notebooks" / "01_broken.ipynb")
    assert [cell.execution_count for cell in kept] == [1, 2, None]
    assert not (tmp_path / "workspace" / "notebooks" / "02_never.ipynb").exists()


def test_a_dead_kernel_is_named(run_all, tmp_path):
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=[
                nbformat.v4.new_code_cell("1"),
                nbformat.v4.new_code_cell("import os; os._exit(9)"),
            ]
        ),
        tmp_path / "01_dies.ipynb",
    )
    _, error = run_all("--folder", str(tmp_path), QLORA_WORKSPACE=str(tmp_path / "workspace"))
    assert "01_dies.ipynb, cell 2 of 2 failed:" in error
    assert "its kernel died" in error


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("QLORA_PROFILE", "tpu", "ConfigError: profile is 'tpu': choose 't4'"),
        ("QLORA_EPOCHS", "0", "ConfigError: num_epochs is 0: it must be at least 1."),
        (
            "QLORA_DATA",
            "no/such/folder",
            "which is not here. Give a folder that holds train.csv and test.csv",
        ),
    ],
)
def test_a_bad_setting_stops_before_any_kernel(run_all, tmp_path, variable, value, message):
    printed, error = run_all(**{"QLORA_WORKSPACE": str(tmp_path), variable: value})
    assert message in error and printed == ""
    assert list(tmp_path.iterdir()) == []


# What is committed


def test_the_five_notebooks_are_there():
    assert [path.stem for path in PATHS] == NAMES


def faults(path: Path) -> list[str]:
    """What is wrong with a notebook as it is committed, one line for each fault."""
    text = path.read_text(encoding="utf-8")
    if not nbformat.validator.isvalid(json.loads(text)):
        return ["is not a valid notebook"]
    notebook = nbformat.reads(text, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    errors = "".join(output.text for output in outputs if output.get("name") == "stderr")
    found = {
        "cells are not counted 1 to n": [cell.execution_count for cell in code]
        != list(range(1, len(code) + 1)),
        "holds an error": any(output.output_type == "error" for output in outputs),
        "holds stderr of a download, or a warning": re.search(
            r"\d[KMG]B?/|[Ww]arning|Failed|Traceback", errors
        ),
        "holds widgets without their state": not all(
            "state" in value for value in notebook.metadata.get("widgets", {}).values()
        ),
        "names a path of this machine": re.search(
            r"site-packages|/(?:root|home|tmp|work|opt|usr|Users)/[\w./-]*", text
        ),
        "is 1 MB or more": len(text.encode()) >= 1_000_000,
        "does not ask for a T4": (
            notebook.metadata.get("accelerator"),
            notebook.metadata.get("colab", {}).get("gpuType"),
        )
        != ("GPU", "T4"),
        "its badge does not open it": f"({BADGE.format(name=path.name)})"
        not in notebook.cells[0].source,
        "its first code cell does not install this version": not INSTALL.search(code[0].source)
        or code[0] != notebook.cells[1],
    }
    faults = [fault for fault, is_there in found.items() if is_there]
    for number, cell in enumerate(code, 1):
        try:
            modules = imported(re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.source, flags=re.M))
        except SyntaxError:
            faults.append(f"cell {number} does not parse")
            continue
        if number == 1 and modules - sys.stdlib_module_names:
            faults.append("imports a package before the install cell is done")
        faults += [
            f"imports {name}, which is not in requirements.txt"
            for name in sorted(modules)
            if COMES_WITH.get(name, name) not in REQUIRED
        ]
    return faults


def imported(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@each
def test_committed_executed_and_clean(path):
    assert faults(path) == []


def _cell(number, **changes):
    """A change of the code cell `number`."""

    def change(notebook):
        [cell for cell in notebook["cells"] if cell["cell_type"] == "code"][number - 1].update(
            changes
        )

    return change


def _stream(name, text):
    return {"outputs": [{"output_type": "stream", "name": name, "text": text}]}


def _cut_badge(notebook):
    notebook["cells"][0]["source"] = "".join(notebook["cells"][0]["source"]).replace(
        "01_setup.ipynb", "02_data_subset.ipynb"
    )


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda notebook: notebook["cells"][3].pop("cell_type"), "is not a valid notebook"),
        (
            lambda notebook: notebook["cells"][4].update(id=notebook["cells"][3]["id"]),
            "is not a valid notebook",
        ),  # ids repeat
        (lambda notebook: notebook["cells"][4].pop("id"), "is not a valid notebook"),
        (_cell(2, execution_count=7), "cells are not counted 1 to n"),
        (_cell(2, execution_count=None), "cells are not counted 1 to n"),
        (
            _cell(
                2, outputs=[{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}]
            ),
            "holds an error",
        ),
        (
            _cell(2, **_stream("stderr", "model.safetensors: 100%|####| 4.13G/4.13G")),
            "holds stderr of a download, or a warning",
        ),
        (
            _cell(2, **_stream("stderr", "x.py:3: UserWarning: y")),
            "holds stderr of a download, or a warning",
        ),
        (
            _cell(2, **_stream("stderr", "Failed to load a kernel: No module named 'kernels'")),
            "holds stderr of a download, or a warning",
        ),
        (
            lambda notebook: notebook["metadata"].update(
                widgets={"application/vnd.jupyter.widget-state+json": {}}
            ),
            "holds widgets without their state",
        ),
        (_cell(2, **_stream("stdout", "saved in /home/ann/runs")), "names a path of this machine"),
        (_cell(2, source="open('/opt/data/x')"), "names a path of this machine"),
        (_cell(2, **_stream("stdout", "x" * 10**6)), "is 1 MB or more"),
        (lambda notebook: notebook["metadata"].pop("accelerator"), "does not ask for a T4"),
        (
            lambda notebook: notebook["metadata"]["colab"].update(gpuType="A100"),
            "does not ask for a T4",
        ),
        (_cut_badge, "its badge does not open it"),
        (_cell(1, source="pass"), "its first code cell does not install this version"),
        (
            lambda notebook: notebook["cells"].insert(1, notebook["cells"].pop(3)),
            "its first code cell does not install this version",
        ),
        (_cell(2, source="for"), "cell 2 does not parse"),
        (
            _cell(1, source="import torch\n" + "%pip install x"),
            "imports a package before the install cell is done",
        ),
        (
            _cell(2, source="%time\nimport seaborn.objects"),
            "imports seaborn, which is not in requirements.txt",
        ),
    ],
)
def test_each_fault_is_found(tmp_path, change, fault):
    notebook = json.loads(PATHS[0].read_text())
    change(notebook)
    (tmp_path / PATHS[0].name).write_text(json.dumps(notebook))
    assert fault in faults(tmp_path / PATHS[0].name)


@pytest.fixture
def copy_of_the_tree(tmp_path):
    for name in ("Makefile", "pyproject.toml", "README.md", "notebooks"):
        path = ROOT / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / name)
    return tmp_path


def _make_repository(folder: Path, url: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["make", "repository", f"PYTHON={sys.executable}", f"URL={url}"],
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_the_address_is_written_everywhere_and_again(copy_of_the_tree):
    """Then another, a short one that a picture's base64 could hold, and a new version."""
    before = {path: path.read_text() for path in sorted(copy_of_the_tree.rglob("*.ipynb"))}
    old, version = REPOSITORY.removeprefix("https://github.com/"), VERSION
    github = "https://github.com/"
    for url, slug in [
        (f"{github}ann/news.git", "ann/news"),
        (f"{github}a/b/", "a/b"),
        (f"{github}a/b", "a/b"),
        (f"{github}B-2/x.y_3", "B-2/x.y_3"),
    ]:
        done = _make_repository(copy_of_the_tree, url)
        assert done.returncode == 0, done.stderr
        project = (copy_of_the_tree / "pyproject.toml").read_text()
        assert (
            tomllib.loads(project)["project"]["urls"]["Repository"] == f"https://github.com/{slug}"
        )
        for path, text in before.items():
            changed, badge = path.read_text(), BADGE.format(name=path.name).replace(old, slug)
            assert (
                f"({badge})" in changed
                and f"({badge})" in (copy_of_the_tree / "README.md").read_text()
            )
            assert INSTALL.search(
                changed.replace('\\"', '"').replace(slug, old).replace(f"v{version}", f"v{VERSION}")
            )
            assert len(changed) - len(text) == 3 * (len(slug) - len(old)) + len(version) - len(
                VERSION
            )  # and nothing else
        if slug == "a/b":
            version = "1.12.3"
            (copy_of_the_tree / "pyproject.toml").write_text(
                re.sub(r'^version = ".*"', f'version = "{version}"', project, flags=re.M)
            )
            _make_repository(copy_of_the_tree, url)
    assert all(f"v{version}" in path.read_text() for path in before)


@pytest.mark.parametrize(
    "url",
    [
        "https://github.com/a|b/c",
        "https://github.com/a/b&c",
        "http://github.com/a/b",
        "https://github.com/a",
        "https://github.com/a/b/tree/main",
        "https://gitlab.com/a/b",
        "https://github.com/a/..",
        "a/b",
        "",
    ],
)
def test_what_is_not_an_address_is_refused(copy_of_the_tree, url):
    before = {path: path.read_bytes() for path in copy_of_the_tree.rglob("*.*") if path.is_file()}
    done = _make_repository(copy_of_the_tree, url)
    assert done.returncode == 2
    assert "usage: make repository URL=https://github.com/account/name" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in before} == before


def test_requirements_never_ask_for_torch():
    assert not re.search(r"^torch\b", (ROOT / "requirements.txt").read_text(), flags=re.M)
