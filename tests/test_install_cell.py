"""The first code cell of each notebook, run in IPython where the package is and where it is not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_notebooks import INSTALL, PATHS, REPOSITORY, code_cells

ROOT = Path(__file__).parents[1]
CELL = code_cells(PATHS[0])[0].source
NO_NETWORK = {"PIP_RETRIES": "0", "PIP_PROXY": "http://127.0.0.1:9", "PIP_NO_INDEX": "1"}


def run_cell(before: str = "") -> list[str]:
    """Return the lines that the cell prints in a fresh IPython without a network, then whether it
    failed, and which of four large packages were imported."""
    code = f"""
import sys
from IPython.core.interactiveshell import InteractiveShell
{before}
result = InteractiveShell.instance().run_cell({CELL!r})
print("failed" if result.error_in_exec else "went on")
print(sorted(sys.modules.keys() & {{"torch", "transformers", "numpy", "bitsandbytes"}}))
"""
    empty = {"PIP_FIND_LINKS": "", "PIP_CONSTRAINT": "", "IPYTHONDIR": os.devnull + "/x"}
    environment = os.environ | NO_NETWORK | empty | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return re.sub(r"\x1b\[[\d;]*m", "", done.stdout).splitlines()


def test_it_names_this_version_and_is_short():
    assert INSTALL in CELL and f"{REPOSITORY}/tags" in CELL
    assert len(CELL.splitlines()) <= 15
    assert {code_cells(path)[0].source for path in PATHS} == {CELL}


def test_where_the_package_is_it_does_nothing():
    assert run_cell() == ["went on", "[]"]


def test_where_it_cannot_be_had_one_message_says_what_to_do():
    *printed, outcome, heavy = run_cell('sys.modules["qlora_helpers"] = None  # as if not there')
    printed = "\n".join(printed)
    assert (outcome, heavy) == ("failed", "[]")
    assert "SystemExit: qlora-helpers could not be installed; pip says why above." in printed
    for word in ("ModuleNotFoundError", "Traceback", "no such option"):
        assert word not in printed


@pytest.mark.parametrize("word", ["torch", "--upgrade", "--force-reinstall", "-U", "git+"])
def test_it_never_replaces_what_colab_brings(word):
    """It asks git for nothing either, which would wait for a user name at a wrong address."""
    assert word not in CELL.split() and f" {word}" not in CELL
