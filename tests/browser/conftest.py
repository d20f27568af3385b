"""A headless Chromium, and the servers it visits: JupyterLab with notebook 5, and the page."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 300  # at most, for a server to start or a page to load with a model
CHROMIUM_OPTIONS = [
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
]
LAB_SETTINGS = {
    # Otherwise cells out of sight are not in the page.
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@pytest.fixture(scope="session")
def run_folder(request, tuned) -> Path:
    """The workspace that the notebooks left in this session, else one of a tiny random model."""
    folder = request.config.notebook_workspace
    return folder if (folder / "manifests" / "04_evaluation.json").exists() else tuned.path


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    reason = "needs Selenium, JupyterLab and Voila: pip install -e .[browser]"
    for package in ("selenium", "jupyterlab", "voila"):
        pytest.importorskip(package, reason=reason)
    for program in ("chromium", "chromedriver"):
        if not shutil.which(program):
            pytest.skip(f"needs {program}: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in CHROMIUM_OPTIONS:
        options.add_argument(f"--{option}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.downloads = tmp_path_factory.mktemp("downloads")
    behavior = {"behavior": "allow", "downloadPath": str(driver.downloads)}
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", behavior)
    yield driver
    driver.quit()


@contextlib.contextmanager
def serving(arguments: list[str], folder: Path, log: Path, **environment: str):
    """Run `python ARGUMENTS --port=...` as a server in `folder`, and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *arguments, f"--port={port}"]
    environment = os.environ | environment
    with log.open("wb") as out:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
    try:
        end = time.monotonic() + SECONDS
        while True:
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def serving_page(workspace: Path, log: Path):
    """Serve the page for `workspace` as `make app` does."""
    arguments = ["notebooks/serve.py", "--no-browser"]
    return serving(arguments, ROOT, log, QLORA_WORKSPACE=str(workspace))


@pytest.fixture(scope="session")
def page_address(browser, run_folder, tmp_path_factory):
    with serving_page(run_folder, tmp_path_factory.mktemp("voila") / "log.txt") as address:
        yield address


@pytest.fixture
def empty_page_address(browser, tmp_path):
    with serving_page(tmp_path / "nothing", tmp_path / "log.txt") as address:
        yield address


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """A function that asks for the page with `headers`: the status and what is shown."""
    pytest.importorskip("voila", reason="needs Voila: pip install -e .[app]")
    folder = tmp_path_factory.mktemp("serve")
    with serving_page(folder / "nothing", folder / "log.txt") as address:

        def ask(headers: dict[str, str]) -> tuple[int, str]:
            request = urllib.request.Request(address, headers=headers)
            try:
                answer = urllib.request.urlopen(request, timeout=SECONDS)
            except urllib.error.HTTPError as error:
                answer = error
            return answer.status, answer.read().decode()

        yield ask


@pytest.fixture
def lab_address(browser, run_folder, tmp_path):
    """The address of JupyterLab with a copy of notebook 5."""
    folder, settings = tmp_path / "lab", tmp_path / "settings"
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / "05_inference.ipynb", folder)
    for name, setting in LAB_SETTINGS.items():
        path = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(setting))
    arguments = ["-m", "jupyterlab", "--ip=127.0.0.1", "--no-browser", "--allow-root"]
    arguments.append("--IdentityProvider.token=")
    environment = {"QLORA_WORKSPACE": str(run_folder), "JUPYTERLAB_SETTINGS_DIR": str(settings)}
    with serving(arguments, folder, tmp_path / "log.txt", **environment) as address:
        urllib.request.urlopen(f"{address}/lab", timeout=SECONDS).read()
        yield address
