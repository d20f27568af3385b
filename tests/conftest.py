"""The settings and hooks of all tests; their fixtures are in shared_fixtures.py."""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Fixtures with the embedded model in memory, or with a run that the notebooks made with it.
REAL_MODEL = {"base", "notebook_workspace", "run_folder"}


class NotebookRules:
    """Let nbval compare text alone: stderr holds progress bars, and pictures differ by a pixel."""

    def pytest_collectstart(self, collector):
        if hasattr(collector, "skip_compare"):
            collector.skip_compare += ("stderr", "text/html", "image/png")


def pytest_addoption(parser):
    parser.addoption("--pictures", type=Path, help="a folder for screenshots of the panels")


def pytest_configure(config):
    """Set the environment that the notebooks' kernels inherit: profile and workspace."""
    for name in [name for name in os.environ if name.startswith("QLORA_")]:
        del os.environ[name]
    config.notebook_workspace = Path(tempfile.mkdtemp(prefix="qlora_notebooks_"))
    os.environ |= {"QLORA_PROFILE": "cpu", "QLORA_WORKSPACE": str(config.notebook_workspace)}
    config.pluginmanager.register(NotebookRules())
    # The process that hands out the tests to others runs none: it need not import torch.
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_unconfigure(config):
    shutil.rmtree(config.notebook_workspace, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before -m chooses among the items
def pytest_collection_modifyitems(items):
    """Mark each cell of a notebook, and each test that asks for a fixture in REAL_MODEL."""
    for item in items:
        if item.path.suffix == ".ipynb" or REAL_MODEL & set(getattr(item, "fixturenames", ())):
            item.add_marker("real_model")


def pytest_collection_finish():
    """Keep imported packages out of garbage collections: each would take half a second, and loading
    a model begins with one."""
    gc.collect()
    gc.freeze()
