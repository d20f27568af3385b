"""Colab's versions: requirements.txt on top of them replaces nothing, and the package that pip builds is whole."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REPORT = (
    Path(sys.prefix) / "requirements.json"
)  # pip's, from `make test-colab`: what requirements.txt installed on top of Colab's packages
COLAB = dict(
    line.split("==")
    for line in (ROOT / "constraints-colab.txt").read_text().splitlines()
    if "==" in line
)
needs_colab = pytest.mark.skipif(
    not REPORT.exists(), reason="not in the environment of `make test-colab`"
)


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _installs(*arguments: str) -> set[str]:
    """What pip would install here, by its own report."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--report",
            "-",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {_name(package["metadata"]["name"]) for package in json.loads(done.stdout)["install"]}


@needs_colab
def test_the_versions_here_are_colabs():
    here = {
        _name(found.metadata["Name"]): found.version.partition("+")[0] for found in distributions()
    }
    assert {name: here.get(name) for name in COLAB} == COLAB


@needs_colab
def test_requirements_on_top_of_colabs_versions_replaced_none():
    installed = {
        _name(package["metadata"]["name"]) for package in json.loads(REPORT.read_text())["install"]
    }
    assert {"bitsandbytes", "evaluate", "gguf", "nbval"} <= installed
    assert not installed & COLAB.keys()
    assert not {
        name
        for name in installed
        if name.startswith(("torch", "nvidia", "triton", "huggingface", "pandas", "pyarrow"))
    }


@needs_colab
def test_requirements_ask_for_nothing_more_and_a_higher_floor_would_show():
    assert _installs("--requirement", str(ROOT / "requirements.txt")) == set()
    assert "transformers" in _installs(
        "--requirement", str(ROOT / "requirements.txt"), "transformers>=5.16"
    )


@pytest.mark.slow
def test_what_pip_builds_is_whole_and_runs_away_from_the_tree(tmp_path):
    """As on Colab, from a copy of the tree; the sample is read and the version is the tag's."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "requirements.txt"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(
        ROOT / "qlora_helpers", tree / "qlora_helpers", ignore=shutil.ignore_patterns("__pycache__")
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(tree),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.rmtree(tree)
    code = """
import json
from importlib.metadata import metadata, requires
import qlora_helpers
config = qlora_helpers.RunConfig.from_environment()
print(json.dumps({"file": qlora_helpers.__file__, "rows": {split: len(rows) for split, rows in qlora_helpers.load_rows(config).items()},
                  "version": metadata("qlora-helpers")["Version"], "urls": metadata("qlora-helpers").get_all("Project-URL"),
                  "requires": requires("qlora-helpers")}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site"), "QLORA_PROFILE": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    project = (ROOT / "pyproject.toml").read_text()
    assert Path(found["file"]).is_relative_to(tmp_path / "site")
    assert found["rows"] == {"train": 320, "test": 80}
    assert f'version = "{found["version"]}"' in project
    assert found["urls"] == [
        f"Repository, {re.search(r'https://github.com/[^' + chr(34) + ']+', project)[0]}"
    ]
    lines = [
        line.partition("#")[0].replace(" ", "")
        for line in (ROOT / "requirements.txt").read_text().splitlines()
    ]
    assert sorted(found["requires"]) == sorted(filter(None, lines))
