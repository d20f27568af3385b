"""test_widgets.py again under ipywidgets 7.7.1, which Colab has: in a process of its own, from a folder that comes first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = ["ipywidgets==7.7.1", "ipython_genutils==0.2.0"]  # the rest of what it imports is here


@pytest.fixture
def environment(request) -> dict[str, str]:
    folder = request.config.cache.mkdir("ipywidgets-7.7.1")
    if not (folder / "ipython_genutils").is_dir():
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--upgrade",
                "--target",
                folder,
                *NEEDED,
            ],
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode:
            pytest.skip(
                f"{' and '.join(NEEDED)} cannot be installed here: {done.stderr.strip().splitlines()[-1]}"
            )
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def test_the_panels_under_ipywidgets_77(environment):
    version = subprocess.run(
        [sys.executable, "-c", "import ipywidgets; print(ipywidgets.__version__)"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert version.stdout == "7.7.1\n", version.stderr
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--override-ini=addopts=",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/widgets/test_widgets.py",
    ]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
