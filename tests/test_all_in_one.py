"""The assembled notebook: the five, one after another."""

import json
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))

import assemble  # noqa: E402

COMMITTED = NOTEBOOKS / assemble.NAME


@pytest.fixture(scope="module")
def cells() -> list:
    return nbformat.read(COMMITTED, as_version=4).cells


def test_what_is_committed_is_assembled_from_the_five():
    assert COMMITTED.read_text(encoding="utf-8") == assemble.text(), "run notebooks/assemble.py"


def test_every_code_cell_of_the_five_is_there_once_with_its_outputs(cells):
    one = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in one] == list(range(1, len(one) + 1))
    one = [cell for cell in one if not cell.source.endswith("%reset -f")]
    notebooks = [nbformat.read(path, as_version=4) for path in assemble.chapters()]
    five = [c for nb in notebooks for c in nb.cells if c.cell_type == "code"]
    installs = [cell for cell in five if cell.source.startswith("import importlib.util")]
    assert len(installs) == 5 and {cell.source for cell in installs} == {one[0].source}
    rest = [cell for cell in five if cell not in installs]

    def shown(cell) -> tuple[str, str]:
        outputs = [{**output, "execution_count": None} for output in cell.outputs]
        return cell.source, json.dumps(outputs)

    assert list(map(shown, one[1:])) == list(map(shown, rest))


def test_it_has_one_badge_of_its_own_and_a_fresh_start_for_each_chapter(cells):
    texts = [cell.source for cell in cells]
    assert "\n".join(texts).count("colab-badge.svg") == 1
    assert f"notebooks/{assemble.NAME})" in texts[0]
    resets = [i for i, text in enumerate(texts) if text.endswith("%reset -f")]
    assert [texts[i + 1].partition(".")[0] for i in resets] == ["# 2", "# 3", "# 4", "# 5"]


def test_notebooks_that_did_not_run_have_no_counts(tmp_path):
    for path in assemble.chapters():
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.update(execution_count=None, outputs=[])
        nbformat.write(notebook, tmp_path / path.name)
    one = assemble.assemble(assemble.chapters(tmp_path))
    assert {cell.get("execution_count") for cell in one.cells} == {None}
