"""The panels under ipywidgets 7.7.1, which Colab has: in a process of its own."""

import importlib
import subprocess
import sys
from pathlib import Path

import forks
import pytest

NEEDED = ["ipywidgets==7.7.1", "ipython_genutils==0.2.0"]  # the rest of what it imports is here


@pytest.fixture
def packages(request) -> Path:
    folder = request.config.cache.mkdir("ipywidgets-7.7.1")
    if not (folder / "ipython_genutils").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        done = subprocess.run([*pip, "--target", folder, *NEEDED], capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1]
            pytest.skip(f"{' and '.join(NEEDED)} cannot be installed here: {reason}")
    return folder


def test_the_panels_under_ipywidgets_77(packages, tmp_path):
    """All but the hostile texts, which are not ipywidgets' matter."""

    def run_tests() -> int:
        for name in list(sys.modules):
            if name.startswith(("ipywidgets", "qlora_helpers.widgets", "test_widgets")):
                del sys.modules[name]
        sys.path.insert(0, str(packages))
        assert importlib.import_module("ipywidgets").__version__ == "7.7.1"
        options = ["--override-ini=addopts=", "-q", "-p", "no:cacheprovider", "-k", "not hostile"]
        options.append(f"--basetemp={tmp_path / 'inner'}")
        return pytest.main([*options, str(Path(__file__).with_name("test_widgets.py"))])

    code, said = forks.run(run_tests, tmp_path / "log.txt")
    assert code == 0, said[-4000:]
    assert " passed" in said and "skipped" not in said
