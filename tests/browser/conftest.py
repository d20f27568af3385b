"""A headless Chromium, and the servers that it visits: JupyterLab with notebook 5, and the page of `make app`."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = (
    300  # at most, for a server to start, a page to load with a model, a file to be classified
)


@pytest.fixture(scope="session")
def run_folder(request, tuned) -> Path:
    """The workspace that the notebooks left, earlier in this session; of a tiny random model where they did not run."""
    folder = request.config.notebook_workspace
    return folder if (folder / "manifests" / "04_evaluation.json").exists() else tuned.path


@pytest.fixture(scope="session")
def selenium():
    found = pytest.importorskip("selenium", reason="needs Selenium: pip install -e .[browser]")
    for program in ("chromium", "chromedriver"):
        if not shutil.which(program):
            pytest.skip(f"needs {program}: apt-get install chromium chromium-driver")
    return found


@pytest.fixture(scope="session")
def browser(selenium, tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-quic",
        "window-size=1100,1400",
    ):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.downloads = tmp_path_factory.mktemp("downloads")
    driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(driver.downloads)}
    )
    yield driver
    driver.quit()


@contextlib.contextmanager
def serving(arguments: list, folder: Path, log: Path, **environment: str):
    """A server that runs in `folder`: `python -m ARGUMENTS --port=...`. Yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments), f"--port={port}"],
            cwd=folder,
            env=os.environ | environment,
            stdout=output,
            stderr=output,
        )
    try:
        end = time.monotonic() + SECONDS
        while True:
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@contextlib.contextmanager
def page_of(workspace: Path, log: Path):
    """The page's address, served as the Makefile does."""
    pytest.importorskip("voila", reason="needs Voila: pip install -e .[browser]")
    [line] = [
        line for line in (ROOT / "Makefile").read_text().splitlines() if "$(BIN)/voila" in line
    ]
    arguments = line.split("$(BIN)/")[1].replace("--port=$(PORT)", "--no-browser").split()
    with serving(arguments, ROOT, log, QLORA_WORKSPACE=str(workspace)) as address:
        yield address


@pytest.fixture(scope="session")
def voila(selenium, run_folder, tmp_path_factory):
    with page_of(run_folder, tmp_path_factory.mktemp("voila") / "log.txt") as address:
        yield address


@pytest.fixture
def empty_page(selenium, tmp_path):
    with page_of(tmp_path / "nothing", tmp_path / "log.txt") as address:
        yield address


@pytest.fixture(scope="session")
def lab(selenium, run_folder, tmp_path_factory):
    """The address of JupyterLab with a copy of notebook 5."""
    pytest.importorskip("jupyterlab", reason="needs JupyterLab: pip install -e .[browser]")
    folder, settings = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("settings")
    shutil.copy(ROOT / "notebooks" / "05_inference.ipynb", folder)
    for name, setting in (
        (
            "notebook-extension/tracker",
            {"windowingMode": "none"},
        ),  # else cells out of sight are not in the page
        ("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False}),
    ):
        path = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(setting))
    arguments = [
        "jupyterlab",
        "--ip=127.0.0.1",
        "--no-browser",
        "--allow-root",
        "--IdentityProvider.token=",
    ]
    with serving(
        arguments,
        folder,
        folder / "log.txt",
        QLORA_WORKSPACE=str(run_folder),
        JUPYTERLAB_SETTINGS_DIR=str(settings),
    ) as address:
        urllib.request.urlopen(f"{address}/lab", timeout=SECONDS).read()
        yield address
