"""The versions: Colab's own, the doctor's verdict on what is installed, and the built package."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from qlora_helpers.colab.versions import TESTED, check_versions, floors

ROOT = Path(__file__).parents[2]
# pip's, from `make test-colab`: what requirements.txt installed on top of Colab's packages
REPORT = Path(sys.prefix) / "requirements.json"
needs_colab = pytest.mark.skipif(
    not REPORT.exists(), reason="not in the environment of `make test-colab`"
)


def pinned(constraints: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / constraints).read_text(), flags=re.M))


COLAB = pinned("constraints-colab.txt")


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """A function that puts a package's metadata, of some version, before the installed ones."""

    def install(name: str, version: str) -> None:
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / "METADATA").write_text(metadata)
        monkeypatch.syspath_prepend(tmp_path)

    return install


def test_a_version_below_its_floor_stops(pretend):
    pretend("peft", "0.17.0")
    assert check_versions() == (
        "peft 0.17.0 (peft>=0.20 is needed)",
        "stop",
        '%pip install --upgrade "peft>=0.20", then Runtime > Restart session and run all.',
    )


@pytest.mark.parametrize(
    ("version", "verdict", "found"),
    [
        ("99.0", "warning", "torch 99.0 (tested: 2.11.0 to 2.13.0)"),
        ("2.9.1+cu126", "warning", "torch 2.9.1 (tested: 2.11.0 to 2.13.0)"),
        ("2.11.0+cu128", "ok", "torch 2.11.0+cu128, transformers "),
    ],
)
def test_a_version_that_was_not_tested_is_a_warning(pretend, version, verdict, found):
    pretend("torch", version)
    assert check_versions()[0].startswith(found) and check_versions()[1] == verdict


def test_the_tested_versions_are_those_of_the_constraints():
    newest, oldest = pinned("constraints.txt"), dict(COLAB)
    # the CPU build that is tested in its place may be another
    oldest["torch"] = TESTED["torch"][0]
    # not in Colab's image: requirements.txt installs the newest
    oldest["bitsandbytes"] = newest["bitsandbytes"]
    assert {name: (oldest[name], newest[name]) for name in TESTED} == TESTED


def test_floors_are_those_of_the_requirements():
    names = {floor.name: str(floor.specifier) for floor in floors()}
    assert names["peft"] == ">=0.20" and "torch" not in names


def run_python(*arguments, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | environment,
        cwd=Path(sys.prefix),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names_in(report: str) -> set[str]:
    return {plain(package["metadata"]["name"]) for package in json.loads(report)["install"]}


def would_install(*requirements: str) -> set[str]:
    """Return what pip would install here."""
    pip = ("-m", "pip", "install", "--quiet", "--dry-run", "--report", "-")
    return names_in(run_python(*pip, "--requirement", ROOT / "requirements.txt", *requirements))


@needs_colab
def test_the_versions_here_are_colabs():
    here = {plain(one.metadata["Name"]): one.version.partition("+")[0] for one in distributions()}
    assert {name: here.get(plain(name)) for name in COLAB} == COLAB


@needs_colab
def test_requirements_on_top_of_colabs_versions_replaced_none():
    installed = names_in(REPORT.read_text())
    assert {"bitsandbytes", "evaluate", "gguf", "nbval"} <= installed
    assert not installed & COLAB.keys()
    others = ("torch", "nvidia", "triton", "huggingface", "pandas", "pyarrow")
    assert [name for name in installed if name.startswith(others)] == []


@needs_colab
def test_requirements_ask_for_nothing_more_and_a_higher_floor_would_show():
    assert would_install() == set()
    assert "transformers" in would_install("transformers>=5.16")


@pytest.mark.slow
def test_what_pip_builds_is_whole_and_runs_away_from_the_tree(tmp_path):
    """As on Colab, from a copy of the tree; the sample is read and the version is the project's."""
    tree, site = tmp_path / "tree", tmp_path / "site"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "requirements.txt"):
        shutil.copy(ROOT / name, tree)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "qlora_helpers", tree / "qlora_helpers", ignore=ignore)
    run_python("-m", "pip", "install", "--quiet", "--no-deps", "--target", site, tree)
    shutil.rmtree(tree)
    code = """
import json
from importlib.metadata import metadata
import qlora_helpers
from qlora_helpers.colab.versions import floors
rows = qlora_helpers.load_rows(qlora_helpers.RunConfig.from_environment())
about = metadata("qlora-helpers")
print(json.dumps([qlora_helpers.__file__, {split: len(table) for split, table in rows.items()},
                  about["Version"], about["Project-URL"], sorted(map(str, floors()))]))
"""
    answer = run_python("-c", code, PYTHONPATH=str(site), QLORA_PROFILE="cpu")
    file, rows, version, url, requirements = json.loads(answer)
    project = (ROOT / "pyproject.toml").read_text()
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    asked = [line.partition("#")[0].replace(" ", "") for line in lines]
    assert Path(file).is_relative_to(site)
    assert rows == {"train": 320, "test": 80}
    assert f'version = "{version}"' in project
    assert f'Repository = "{url.removeprefix("Repository, ")}"' in project
    assert requirements == sorted(filter(None, asked))
