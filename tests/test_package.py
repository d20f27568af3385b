"""The package as a whole: what importing it does, and its public names."""

import subprocess
import sys

import qlora_helpers

CODE = """
import sys
import qlora_helpers
from qlora_helpers.__main__ import main

sys.argv = ["qlora_helpers", "--help"]
try:
    main()
except SystemExit:
    heavy = {"torch", "transformers", "peft", "pandas", "matplotlib", "bitsandbytes"}
    assert not heavy & sys.modules.keys()
from qlora_helpers import HeadlineClassifier, LabelTrainer
"""


def test_import_and_help_load_nothing_heavy_and_names_come_without_a_warning():
    """bitsandbytes warns on some CPUs, when it is imported, of a kernel that is not needed."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "classify" in done.stdout


def test_every_public_name_is_there():
    for name in qlora_helpers.__all__:
        assert getattr(qlora_helpers, name) is not None
    assert set(qlora_helpers.__all__) <= set(dir(qlora_helpers))
    assert not hasattr(qlora_helpers, "no_such_name")
