"""Where a run's files live, and the manifests by which one notebook trusts another's work."""

import hashlib
import importlib.metadata
import json
import os
import time
from pathlib import Path

from qlora_helpers.config import RunConfig, default_profile, project_folder
from qlora_helpers.errors import WorkspaceError

_PACKAGES = ["torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "scikit-learn"]


class Workspace:
    """A run's folder. Each notebook publishes its files there under a manifest that is written last."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:  # short where it can be, and then the same on every machine
        return os.path.relpath(self.path, project_folder()) if self.path.is_relative_to(project_folder()) else str(self.path)

    @classmethod
    def locate(cls) -> "Workspace":
        """$QLORA_WORKSPACE, else a folder on a mounted Google Drive, else `runs/<profile>` beside the notebooks folder."""
        drive = Path("/content/drive/MyDrive")
        if os.environ.get("QLORA_WORKSPACE"):
            return cls(project_folder() / os.environ["QLORA_WORKSPACE"])
        return cls((drive / "qlora_ag_news" if drive.is_dir() else project_folder() / "runs") / default_profile())

    def publish(self, notebook: str, config: RunConfig, files: list[str], inputs: tuple[str, ...] = (), **facts) -> dict:
        """Write the manifest of `notebook`: the SHA-256 of each of `files` (paths or folders inside the workspace),
        the config, the fingerprints of the notebooks it read from (`inputs`), package versions, and `facts`."""
        paths = [path for name in files for path in (sorted((self / name).rglob("*")) if (self / name).is_dir() else [self / name])]
        made = {path.relative_to(self.path).as_posix(): _sha256(path) for path in paths if not path.is_dir()}
        identity = {"config": json.loads(config.to_json()), "files": made,
                    "inputs": {name: self.require(name)["fingerprint"] for name in inputs}}
        manifest = {
            "notebook": notebook, **identity, **facts,
            "fingerprint": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_text(self._manifest(notebook), json.dumps(manifest, indent=2))
        return manifest

    def require(self, notebook: str) -> dict:
        """The manifest of `notebook`, if all that it names is there, unchanged, and made from what is there now.
        Raises WorkspaceError that names the file and the notebook to run."""
        remedy = f"Run notebooks/{notebook}.ipynb" + (" again." if self._manifest(notebook).exists() else " first.")
        try:
            manifest = json.loads(self._manifest(notebook).read_text(encoding="utf-8"))
            files, inputs = manifest["files"], manifest["inputs"]
        except FileNotFoundError:
            raise WorkspaceError(f"{self} holds nothing from {notebook} yet. {remedy}") from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise WorkspaceError(f"{self._manifest(notebook)} cannot be read ({error}). {remedy}") from error
        for name, digest in files.items():
            try:
                changed = _sha256(self / name) != digest
            except OSError as error:
                raise WorkspaceError(f"{self / name} cannot be read ({error.strerror}). {remedy}") from error
            if changed:
                raise WorkspaceError(f"{self / name} is not what {notebook} wrote. {remedy}")
        for name, fingerprint in inputs.items():
            if self.require(name)["fingerprint"] != fingerprint:
                raise WorkspaceError(f"what {notebook} wrote was made before {name} was run with other settings or data. {remedy}")
        return manifest

    def is_current(self, notebook: str, config: RunConfig) -> bool:
        """True if `notebook` has published with this very config, and nothing it read or wrote has changed since."""
        try:
            return self.require(notebook)["config"] == json.loads(config.to_json())
        except WorkspaceError:
            return False

    def set_aside(self, notebook: str, names: list[str]) -> Path | None:
        """Move what `notebook` published as `names` to a new folder in earlier/, and return it; None if there is nothing."""
        present = [name for name in names if (self / name).exists()]
        if not self._manifest(notebook).exists() or not present:
            return None
        earlier = self / "earlier" / time.strftime(f"{notebook}-%Y%m%d-%H%M%S", time.gmtime())
        earlier.mkdir(parents=True)
        os.replace(self._manifest(notebook), earlier / "manifest.json")  # first: what is left is then unpublished, never half
        for name in present:
            os.replace(self / name, earlier / name)
        return earlier

    def _manifest(self, notebook: str) -> Path:
        return self / "manifests" / f"{notebook}.json"


def open_workspace(*notebooks: str, path: str | os.PathLike | None = None) -> tuple[Workspace, RunConfig]:
    """The workspace (at `path`, else where `Workspace.locate` says) and its config, after `require` for 01_setup and each of `notebooks`.
    Raises WorkspaceError that names the notebook to run, ConfigError if the environment asks for other settings."""
    workspace = Workspace(path) if path else Workspace.locate()
    workspace.require("01_setup")
    config = RunConfig.from_json((workspace / "config.json").read_text(encoding="utf-8"))
    config.check_environment()
    for notebook in notebooks:
        if workspace.require(notebook)["config"] != json.loads(config.to_json()):
            raise WorkspaceError(f"what {notebook} wrote was made with other settings. Run notebooks/{notebook}.ipynb again.")
    return workspace, config


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all: beside it first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
