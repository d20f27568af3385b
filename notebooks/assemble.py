"""Write 00_all_in_one.ipynb from the five notebooks, with their outputs.

python notebooks/assemble.py    what `make notebooks` calls last
"""

import copy
import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell

FOLDER = Path(__file__).parent
NAME = "00_all_in_one.ipynb"
_BADGE = re.compile(r"\[!\[Open in Colab\]\(\S+\)\]\(\S+\)\n\n")
_CHAPTER = re.compile(r"A chapter of \[.*?\]\(\S+\), .*?\.\n\n", re.DOTALL)
_INSTALLS = "import importlib.util"
_INTRODUCTION = """\
# The five notebooks in one

{badge}Setup, data, training, evaluation and inference, one after another on one machine: one
installation, one download of the model, one question for Google Drive, which you may decline. On
Colab choose *Runtime > Change runtime type > T4 GPU*, then *Run all*.

This notebook is assembled from the five, which are its chapters: change those, not this one.
"""
# Variables of a chapter would hold its model while the next one loads its own.
_RESET = "# The next chapter starts as in a new kernel, without the last one's model.\n%reset -f"


def chapters(folder: Path = FOLDER) -> list[Path]:
    """Return the paths of the five notebooks in `folder`."""
    return sorted(folder.glob("0[1-5]_*.ipynb"))


def assemble(paths: list[Path]) -> nbformat.NotebookNode:
    """Return the notebooks of `paths` as one, with their outputs and counts from 1 on."""
    notebooks = [nbformat.read(path, as_version=4) for path in paths]
    one = copy.deepcopy(notebooks[0])
    badge = _BADGE.search(one.cells[0].source)[0].replace(paths[0].name, NAME)
    introduction = new_markdown_cell(_INTRODUCTION.format(badge=badge), id="00-introduction")
    install = next(cell for cell in one.cells if cell.source.startswith(_INSTALLS))
    one.cells = [introduction, install]
    for path, notebook in zip(paths, notebooks, strict=True):
        if path != paths[0]:
            one.cells.append(new_code_cell(_RESET, id=f"00-reset-{path.stem[:2]}"))
        for cell in notebook.cells:
            if not cell.source.startswith(_INSTALLS):
                cell.source = _CHAPTER.sub("", _BADGE.sub("", cell.source))
                one.cells.append(cell)
    _count(one, executed=all(_is_executed(notebook) for notebook in notebooks))
    return one


def _is_executed(notebook: nbformat.NotebookNode) -> bool:
    return any(cell.get("execution_count") for cell in notebook.cells)


def _count(notebook: nbformat.NotebookNode, executed: bool) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        cell.execution_count = number if executed else None
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = cell.execution_count


def text(folder: Path = FOLDER) -> str:
    """Return what the file of the assembled notebook holds."""
    return nbformat.writes(assemble(chapters(folder))) + "\n"


if __name__ == "__main__":
    (FOLDER / NAME).write_text(text(), encoding="utf-8")
    print(f"Written: {FOLDER / NAME}")
