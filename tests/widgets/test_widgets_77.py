"""The panels under ipywidgets 7.7.1, which Colab has: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = ["ipywidgets==7.7.1", "ipython_genutils==0.2.0"]  # the rest of what it imports is here
CHECK = "import ipywidgets; assert ipywidgets.__version__ == '7.7.1'; import pytest, sys; "


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


def test_the_panels_under_ipywidgets_77(packages):
    """All but the hostile texts, which are not ipywidgets' matter."""
    options = ["--override-ini=addopts=", "-q", "-p", "no:cacheprovider", "-k", "not hostile"]
    tests = str(Path(__file__).with_name("test_widgets.py"))
    command = f"{CHECK}sys.exit(pytest.main({[*options, tests]}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", command], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
