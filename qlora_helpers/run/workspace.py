"""Where a run's files live, and the manifests by which one notebook trusts another's work."""

import hashlib
import importlib.metadata
import json
import os
import time
from functools import partial
from pathlib import Path

from qlora_helpers.colab.drive import ask_for_drive, my_drive, on_colab, on_drive, without_drive
from qlora_helpers.config import RunConfig, default_profile, project_folder
from qlora_helpers.errors import WorkspaceError
from qlora_helpers.hub_token import use_token
from qlora_helpers.run.drive_copy import copy_back, drive_failure, within_drives_time
from qlora_helpers.run.files import (
    cannot_write,
    flush,
    read_file,
    reason,
    sealed,
    sha256,
    unsealed,
    write_text,
)
from qlora_helpers.run.run_folder import RunFolder

_PACKAGES = [
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "scikit-learn",
]


class Workspace(RunFolder):
    """A run's folder. Each notebook publishes its files there under a manifest that is written last."""

    def __init__(self, path: str | os.PathLike):
        super().__init__(Path(path))
        self.opened = {}  # the fingerprint of each notebook's work as `open_workspace` found it

    @classmethod
    def locate(cls) -> "Workspace":
        """$QLORA_WORKSPACE, else a folder on a mounted Google Drive that is wanted, else `runs/<profile>` beside the notebooks folder."""
        if os.environ.get("QLORA_WORKSPACE"):
            return cls(project_folder() / os.environ["QLORA_WORKSPACE"])
        drive = my_drive()
        return cls(
            (drive / "qlora_ag_news" if drive else project_folder() / "runs") / default_profile()
        )

    @classmethod
    def find(cls, drive: bool | None = None) -> "Workspace":
        """`locate`, after asking for Google Drive on a Colab machine unless `drive` (or QLORA_DRIVE, which wins) says no, or
        $QLORA_WORKSPACE lies elsewhere."""
        named = os.environ.get("QLORA_WORKSPACE")
        if not named or on_drive(project_folder() / named):
            ask_for_drive(drive)
        return cls.locate()

    def publish(
        self,
        notebook: str,
        config: RunConfig,
        files: list[str],
        inputs: tuple[str, ...] = (),
        **facts,
    ) -> dict:
        """Write the manifest of `notebook`: the SHA-256 of each of `files` (paths or folders inside the workspace),
        the config, the fingerprints of the notebooks it read from (`inputs`), package versions, and `facts`."""
        with self.hold(notebook):
            manifest = self.despite_drive(
                lambda: self._publish(notebook, config, files, inputs, facts)
            )
        if self._left:
            print(
                f"{notebook} is published on this machine's own disk alone. To bring it to Drive: {copy_back(self.path, self._left)}"
            )
        return manifest

    def _publish(
        self,
        notebook: str,
        config: RunConfig,
        files: list[str],
        inputs: tuple[str, ...],
        facts: dict,
    ) -> dict:
        paths = [
            path
            for name in files
            for path in (
                sorted((self / name).rglob("*")) if (self / name).is_dir() else [self / name]
            )
        ]
        paths = [path for path in paths if not path.is_dir()]
        made = {}
        for path in paths:
            try:
                made[path.relative_to(self.path).as_posix()] = sha256(path)
                flush(path)
            except OSError as error:
                raise WorkspaceError(
                    f"{path} cannot be published ({reason(error)}). Run notebooks/{notebook}.ipynb again."
                ) from error
        identity = {
            "config": json.loads(config.to_json()),
            "files": made,
            "inputs": self.fingerprints(*inputs),
        }
        manifest = {
            "notebook": notebook,
            **identity,
            **facts,
            "fingerprint": hashlib.sha256(
                json.dumps(identity, sort_keys=True).encode()
            ).hexdigest(),
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        text = sealed(manifest)
        within_drives_time(self.path, partial(write_text, self._manifest(notebook), text))
        self.keep(f"manifests/{notebook}.json", text.encode())
        return manifest

    def fingerprints(self, *notebooks: str) -> dict[str, str]:
        """Of what each notebook published. Raises WorkspaceError if one has run again, with other settings or data, since this
        workspace was opened: what was read then is no longer what is here."""
        found = {name: self.require(name)["fingerprint"] for name in notebooks}
        for name, fingerprint in found.items():
            if self.opened.get(name, fingerprint) != fingerprint:
                raise WorkspaceError(
                    f"{name} was run with other settings or data after this notebook had read what it wrote. Run this "
                    "notebook again from its start."
                )
        return found

    def require(self, notebook: str) -> dict:
        """The manifest of `notebook`, if all that it names is there, unchanged, and made from what is there now.
        Raises WorkspaceError that names the file and the notebook to run."""
        remedy = f"Run notebooks/{notebook}.ipynb" + (
            " again." if self.has(notebook) else " first."
        )
        try:
            manifest = unsealed(read_file(self._manifest(notebook)))
            files, inputs = manifest["files"], manifest["inputs"]
        except FileNotFoundError:
            raise WorkspaceError(f"{self} holds nothing from {notebook} yet. {remedy}") from None
        except (OSError, ValueError, LookupError, RecursionError) as error:
            raise WorkspaceError(
                f"{self._manifest(notebook)} cannot be read ({reason(error)}). {remedy}"
            ) from error
        if manifest["notebook"] != notebook:
            raise WorkspaceError(
                f"{self._manifest(notebook)} is the manifest of {manifest['notebook']}. {remedy}"
            )
        for name, digest in files.items():
            try:
                changed = sha256(self / name) != digest
            except OSError as error:
                raise WorkspaceError(
                    f"{self / name} cannot be read ({reason(error)}). {remedy}"
                ) from error
            if changed:
                raise WorkspaceError(f"{self / name} is not what {notebook} wrote. {remedy}")
        for name, fingerprint in inputs.items():
            if self.require(name)["fingerprint"] != fingerprint:
                raise WorkspaceError(
                    f"what {notebook} wrote was made before {name} was run with other settings or data. {remedy}"
                )
        return manifest

    def has(self, notebook: str) -> bool:
        """True if there is a manifest of `notebook`, whatever it is worth."""
        return os.path.lexists(self._manifest(notebook))

    def find_json(self, notebook: str, name: str) -> dict | None:
        """What `notebook` wrote to the JSON file `name`; None if it has not run. Raises WorkspaceError if what it left is not whole."""
        if not self.has(notebook) and not os.path.lexists(self / name):
            return None
        self.require(notebook)
        return self.read_json(notebook, name)

    def read_json(self, notebook: str, name: str) -> dict:
        """What `notebook` wrote to the JSON file `name`, checked by its manifest if it has published one.
        Raises WorkspaceError that names what is wrong and the notebook to run."""
        if self.has(notebook):
            self.require(notebook)
        try:
            return json.loads(read_file(self / name))
        except (OSError, ValueError) as error:
            raise WorkspaceError(
                f"{self / name} cannot be read ({reason(error)}). Run notebooks/{notebook}.ipynb again."
            ) from error

    def earlier_json(self, name: str) -> dict[str, dict]:
        """The JSON file `name` of each folder in earlier/. One that is damaged is left out, with a line that says so."""
        found = {}
        for path in sorted((self / "earlier").glob(f"*/{name}")):
            try:
                manifest = path.with_name("manifest.json")
                if os.path.lexists(manifest) and unsealed(read_file(manifest))["files"].get(
                    name
                ) != sha256(path):
                    raise ValueError("it is not what was set aside")
                found[path.parent.name] = json.loads(read_file(path))
            except (OSError, ValueError, LookupError) as error:
                print(
                    f"{path} is left out: {reason(error)}. Delete its folder if it is not wanted."
                )
        return found

    def is_current(self, notebook: str, config: RunConfig) -> bool:
        """True if `notebook` has published with this very config, and nothing it read or wrote has changed since."""
        try:
            return self.require(notebook)["config"] == json.loads(config.to_json())
        except WorkspaceError:
            return False

    def set_aside(self, notebook: str, names: list[str]) -> Path | None:
        """Move what `notebook` published as `names` to a new folder in earlier/, and return it; None if there is nothing."""
        return self.despite_drive(lambda: self._set_aside(notebook, names))

    def _set_aside(self, notebook: str, names: list[str]) -> Path | None:
        present = [name for name in names if (self / name).exists()]
        if not self._manifest(notebook).exists() or not present:
            return None
        earlier = self / "earlier" / time.strftime(f"{notebook}-%Y%m%d-%H%M%S", time.gmtime())
        try:
            earlier.mkdir(parents=True, exist_ok=True)
            os.replace(
                self._manifest(notebook), earlier / "manifest.json"
            )  # first: what is left is then unpublished, never half
            for name in present:
                os.replace(self / name, earlier / name)
        except OSError as error:
            raise cannot_write(earlier, error) from error
        return earlier

    def _manifest(self, notebook: str) -> Path:
        return self / "manifests" / f"{notebook}.json"


def open_workspace(
    *notebooks: str, path: str | os.PathLike | None = None
) -> tuple[Workspace, RunConfig]:
    """The workspace (at `path`, else where `Workspace.find` says) and its config, after `require` for 01_setup and each of `notebooks`.
    Raises WorkspaceError that names the notebook to run, ConfigError if the environment asks for other settings."""
    workspace = Workspace(path) if path else Workspace.find()
    try:
        config = _opened(workspace, notebooks)
    except WorkspaceError as error:
        if failure := on_drive(workspace.path) and drive_failure(workspace.path, error):
            raise WorkspaceError(
                f"Google Drive cannot be read ({failure}). What is on it is still there: Runtime > Restart session and "
                "run all mounts it again."
            ) from error
        if on_colab() and without_drive() and not os.environ.get("QLORA_WORKSPACE"):
            found = (
                ", ".join(sorted(part.stem for part in (workspace / "manifests").glob("*.json")))
                or "no run"
            )
            raise WorkspaceError(
                f"{error} A run on Google Drive cannot be seen from here, since this machine is without Drive "
                f"({without_drive()}); on its own disk there is {found}. If the run is on Drive: Runtime > Restart "
                "session and run all, and allow Drive this time."
            ) from error
        raise
    use_token(config)
    return workspace, config


def _opened(workspace: Workspace, notebooks: tuple[str, ...]) -> RunConfig:
    found = {"01_setup": workspace.require("01_setup")}
    config = RunConfig.from_json(read_file(workspace / "config.json").decode())
    config.check_environment()
    for notebook in notebooks:
        found[notebook] = workspace.require(notebook)
        if found[notebook]["config"] != json.loads(config.to_json()):
            raise WorkspaceError(
                f"what {notebook} wrote was made with other settings. Run notebooks/{notebook}.ipynb again."
            )
        workspace.opened[notebook] = found[notebook]["fingerprint"]
    for name in [
        name
        for notebook in found
        for name in (*found[notebook]["files"], f"manifests/{notebook}.json")
    ]:
        workspace.keep(name)
    return config
