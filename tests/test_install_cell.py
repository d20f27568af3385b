"""The first code cell of each notebook, run for real in IPython: nothing where the package is, one message where it cannot be had."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_notebooks import INSTALL, PATHS, REPOSITORY, code_cells

ROOT = Path(__file__).parents[1]
CELL = code_cells(PATHS[0])[0].source


def _run(before: str = "") -> str:
    """What the cell prints in a fresh IPython without a network. The last two lines say whether it
    failed, and which of four large packages were imported."""
    code = f"""
import sys
from IPython.core.interactiveshell import InteractiveShell
{before}
shell = InteractiveShell.instance()
print("failed" if shell.run_cell({CELL!r}).error_in_exec else "went on")
print(sorted(sys.modules.keys() & {{"torch", "transformers", "numpy", "bitsandbytes"}}))
"""
    environment = os.environ | {
        "PIP_RETRIES": "0",
        "PIP_PROXY": "http://127.0.0.1:9",
        "PIP_NO_INDEX": "1",
        "PYTHONPATH": str(ROOT),
        "PIP_FIND_LINKS": "",
        "PIP_CONSTRAINT": "",
        "IPYTHONDIR": os.devnull + "/x",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return re.sub(r"\x1b\[[\d;]*m", "", done.stdout)


def test_it_names_this_version_and_is_short():
    assert INSTALL.search(CELL) and f"{REPOSITORY}/tags" in CELL
    assert len(CELL.splitlines()) <= 15
    assert {code_cells(path)[0].source for path in PATHS} == {CELL}


def test_where_the_package_is_it_does_nothing():
    printed = _run()
    assert printed.splitlines()[-2:] == ["went on", "[]"] and "pip" not in printed


def test_where_it_cannot_be_had_one_message_says_what_to_do():
    printed = _run('sys.modules["qlora_helpers"] = None  # as if it were not there')
    print(printed)
    assert (
        "SystemExit: qlora-helpers could not be installed; pip says why above. Check the network, and that the tag"
        in printed
    )
    assert printed.splitlines()[-2:] == ["failed", "[]"]
    assert "ModuleNotFoundError" not in printed and "Traceback" not in printed
    assert "no such option" not in printed


@pytest.mark.parametrize("word", ["torch", "--upgrade", "--force-reinstall", "-U", "git+"])
def test_it_never_replaces_what_colab_brings(word):
    """And asks git for nothing, which would wait for a user name where the address is wrong."""
    assert word not in CELL.split() and f" {word}" not in CELL
