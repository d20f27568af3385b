"""The package as a whole: what importing it does, and its public names."""

import subprocess
import sys

import qlora_helpers


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_importing_the_package_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'peft', 'pandas', 'matplotlib', 'bitsandbytes'}"
    code = f"import sys, qlora_helpers; print(sorted({heavy} & sys.modules.keys()))"
    assert run(code) == "[]\n"


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['qlora_helpers', '--help']\n"
        "from qlora_helpers.__main__ import main\n"
        "try:\n    main()\n"
        "finally:\n    assert 'torch' not in sys.modules\n"
    )
    assert "classify" in run(code)


def test_every_public_name_is_there():
    for name in qlora_helpers.__all__:
        assert getattr(qlora_helpers, name) is not None
    assert set(qlora_helpers.__all__) <= set(dir(qlora_helpers))
    assert not hasattr(qlora_helpers, "no_such_name")


def test_names_are_imported_without_a_warning():
    """bitsandbytes warns on some CPUs, when it is imported, of a kernel that is not needed."""
    assert run("from qlora_helpers import HeadlineClassifier, LabelTrainer") == ""
