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
finally:
    heavy = {"torch", "transformers", "peft", "pandas", "matplotlib", "bitsandbytes"}
    print(sorted(heavy & sys.modules.keys()))
"""


def test_importing_the_package_and_its_help_import_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "classify" in done.stdout and done.stdout.endswith("\n[]\n")


def test_every_public_name_is_there():
    for name in qlora_helpers.__all__:
        assert getattr(qlora_helpers, name) is not None
    assert set(qlora_helpers.__all__) <= set(dir(qlora_helpers))
    assert not hasattr(qlora_helpers, "no_such_name")
