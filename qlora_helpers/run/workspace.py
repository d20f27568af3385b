"""The folder of a run, and the manifests by which one notebook trusts the work of another."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import time
from pathlib import Path

import psutil

from qlora_helpers.errors import WorkspaceError, reason
from qlora_helpers.run.checkpoints import Checkpoints
from qlora_helpers.run.files import DAMAGE, read_file, remove, sha256, write_file, writing
from qlora_helpers.run.lock import Lock, refuse_foreign, refuse_links
from qlora_helpers.run.manifest import digest_of, manifest_of, read_manifest, sealed, version_of

_began = psutil.Process().create_time()  # of this process, then its last publication
_PACKAGES = ["torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"]


def seconds_since_publishing() -> float:
    """Return the seconds since this process last published something, or else since it began."""
    return time.time() - _began


class Workspace:
    """The folder of a run, and its mirror if it has one (see `qlora_helpers.colab.mirror`).

    Each notebook publishes its files under a manifest, which is written after them.
    """

    def __init__(self, path: str | os.PathLike, mirror=None):
        self.path, self.mirror = Path(path), mirror
        self.opened = {}  # the fingerprints of what `open` required
        self._replaced = {}  # the manifests that `set_aside` moved
        self._written = {}  # the SHA-256 of what `write` wrote, by name
        self.hold = Lock(self.path).hold

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:
        here = Path.cwd().parent if Path.cwd().name == "notebooks" else Path.cwd()
        inside = self.path.is_relative_to(here)  # the same on every machine
        return str(self.path.relative_to(here) if inside else self.path)

    def write(self, name: str, data: bytes | str) -> None:
        """Write the file `name` whole or not at all. Raises WorkspaceError."""
        data = data.encode() if isinstance(data, str) else data
        with self.hold(name):
            write_file(self / name, data)
        self._written[name] = hashlib.sha256(data).hexdigest()

    def publish(
        self, notebook: str, config: dict, files: list[str], inputs: tuple[str, ...] = (), **facts
    ) -> dict:
        """Write the manifest of `notebook`, and copy it and its files to the mirror.

        Args:
            notebook: its name, as in "02_data_subset".
            config: the settings that it ran with.
            files: files or folders inside the workspace.
            inputs: the notebooks whose files it read.
            facts: more for the manifest, which is returned.
        Raises: WorkspaceError if a file is missing or another notebook has written it, if the
            manifest cannot be written, or if what one of `inputs` published has changed since.
        """
        global _began
        with self.hold(notebook):
            inputs = self.fingerprints(*inputs)
            paths = []
            for name in files:
                paths += sorted((self / name).rglob("*")) or [self / name]
            names = [p.relative_to(self.path).as_posix() for p in paths if not p.is_dir()]
            config = json.loads(json.dumps(config))
            facts |= {"notebook": notebook, "config": config, "inputs": inputs}
            facts["seconds"] = round(seconds_since_publishing(), 1)
            try:
                manifest = manifest_of(self.path, names, **facts)
            except OSError as error:
                raise WorkspaceError(
                    f"{error.filename} cannot be published ({reason(error)}). Run this notebook "
                    "again from its start."
                ) from error
            for name, digest in manifest["files"].items():
                if self._written.get(name, digest) != digest:
                    raise WorkspaceError(
                        f"{self / name} is not what this notebook wrote: another one has written "
                        "there since. Run this notebook again from its start."
                    )
            identity = {name: manifest[name] for name in ("config", "files", "inputs")}
            manifest |= {"fingerprint": digest_of(identity), "replaces": []}
            if old := self.read(notebook) or self._replaced.get(notebook):
                same = old["fingerprint"] == manifest["fingerprint"]
                manifest["replaces"] = old["replaces"] + ([] if same else [version_of(old)])
            manifest["versions"] = {name: importlib.metadata.version(name) for name in _PACKAGES}
            self.write(f"manifests/{notebook}.json", sealed(manifest))
        _began = time.time()
        self._push()
        return manifest

    def open(self, *notebooks: str) -> str:
        """Require 01_setup and `notebooks`, and return the text of config.json. Raises
        WorkspaceError that names the notebook to run."""
        manifests = {name: self.require(name) for name in ("01_setup", *notebooks)}
        for name, manifest in manifests.items():
            if manifest["config"] != manifests["01_setup"]["config"]:
                raise WorkspaceError(
                    f"what {name} wrote was made with other settings. Run "
                    f"notebooks/{name}.ipynb again."
                )
        self.opened = {name: manifest["fingerprint"] for name, manifest in manifests.items()}
        return read_file(self / "config.json").decode()

    def fingerprints(self, *notebooks: str) -> dict[str, str]:
        """Return the fingerprint of what each notebook published. Raises WorkspaceError if it is
        not what `open` required: what was read then is no longer here."""
        fingerprints = {name: self.require(name)["fingerprint"] for name in notebooks}
        for name, fingerprint in fingerprints.items():
            if self.opened.get(name, fingerprint) != fingerprint:
                raise WorkspaceError(
                    f"{name} was run with other settings or data after this notebook had read what "
                    "it wrote. Run this notebook again from its start."
                )
        return fingerprints

    def require(self, notebook: str) -> dict:
        """Return the manifest of `notebook`, if all its files are here, unchanged, and made from
        what is here now. Raises WorkspaceError that names the file and the notebook to run."""
        path, again = self.manifest_path(notebook), "again" if self.has(notebook) else "first"
        remedy = f"Run notebooks/{notebook}.ipynb {again}."
        try:
            manifest = read_manifest(path)
        except FileNotFoundError:
            raise WorkspaceError(f"{self} holds nothing from {notebook} yet. {remedy}") from None
        except DAMAGE as error:
            raise WorkspaceError(f"{path} cannot be read ({reason(error)}). {remedy}") from error
        if manifest["notebook"] != notebook:
            raise WorkspaceError(f"{path} is the manifest of {manifest['notebook']}. {remedy}")
        for name, digest in manifest["files"].items():
            try:
                problem = f"is not what {notebook} wrote" if sha256(self / name) != digest else ""
            except OSError as error:
                problem = f"cannot be read ({reason(error)})"
            if problem:
                raise WorkspaceError(f"{self / name} {problem}. {remedy}")
        for name, fingerprint in manifest["inputs"].items():
            if self.require(name)["fingerprint"] != fingerprint:
                raise WorkspaceError(
                    f"what {notebook} wrote was made before {name} was run with other settings or "
                    f"data. {remedy}"
                )
        return manifest

    def is_current(self, notebook: str, config: dict) -> bool:
        """Return True if `notebook` has published with this config, and nothing that it read or
        wrote has changed. Raises WorkspaceError if what was opened has."""
        self.fingerprints(*self.opened)
        try:
            return self.require(notebook)["config"] == json.loads(json.dumps(config))
        except WorkspaceError:
            return False

    def find_json(self, notebook: str, name: str) -> dict | None:
        """Return what `notebook` wrote to the JSON file `name`, or None if it has not run. Raises
        WorkspaceError if it is not whole."""
        if not self.has(notebook) and not os.path.lexists(self / name):
            return None
        return self.read_json(notebook, name)

    def read_json(self, notebook: str, name: str) -> dict:
        """Return what `notebook` wrote to the JSON file `name`. Raises WorkspaceError that names
        the problem and the notebook to run."""
        self.require(notebook)
        try:
            return json.loads(read_file(self / name))
        except DAMAGE as error:
            raise WorkspaceError(
                f"{self / name} cannot be read ({reason(error)}). Run notebooks/{notebook}.ipynb "
                "again."
            ) from error

    def earlier_json(self, name: str) -> dict[str, dict]:
        """Return the JSON file `name` of each folder in earlier/. A damaged one is left out, with a
        line that says so."""
        contents = {}
        for path in sorted((self / "earlier").glob(f"*/{name}")):
            try:
                manifest = path.with_name("manifest.json")
                if manifest.exists() and read_manifest(manifest)["files"][name] != sha256(path):
                    raise ValueError("it is not what was set aside")
                content = json.loads(read_file(path))
                if not isinstance(content, dict):
                    raise ValueError("it is not a JSON object")
                contents[path.parent.name] = content
            except DAMAGE as error:
                print(f"{path} is left out ({reason(error)}). Delete its folder if it is unwanted.")
        return contents

    def set_aside(self, notebook: str, names: list[str]) -> Path | None:
        """Move `names`, published by `notebook` or not, to a folder in earlier/, and return that;
        None if there is nothing. Raises WorkspaceError."""
        manifest = self.read(notebook)
        here = [name for name in names if os.path.lexists(self / name)]
        if manifest is None and not here:
            return None
        version = version_of(manifest) if manifest else f"unpublished-{time.time_ns()}"
        earlier = self / "earlier" / f"{notebook}-{version}"
        with self.hold(notebook), writing(earlier):
            earlier.mkdir(parents=True, exist_ok=True)
            if manifest:  # it comes first: what stays is then unpublished, never half published
                os.replace(self.manifest_path(notebook), earlier / "manifest.json")
                self._replaced[notebook] = manifest
            for name in here:
                remove(earlier / name)
                os.replace(self / name, earlier / name)
        print(f"What {notebook} wrote before is kept in {earlier.relative_to(self.path)}.")
        return earlier

    def checkpoints(self) -> Checkpoints:
        """Return the checkpoints of this run's training."""
        return Checkpoints(self / "checkpoints", self.hold, self.mirror)

    def push(self) -> None:
        """Copy to the mirror what it lacks, wait for that, and print how it ended."""
        self._push()
        if self.mirror:
            self.mirror.wait()

    def pull(self) -> None:
        """Bring what is newer in the mirror, and copy to it what it lacks, in the background.
        Raises WorkspaceError if the folder holds something else than a run."""
        refuse_links(self.path)
        refuse_foreign(self.path)
        if self.mirror:
            with self.hold("reading Google Drive"):
                self.mirror.pull(self)
            self._push()

    def _push(self) -> None:
        earlier = self.path.glob("earlier/*/manifest.json")
        for path in [*self.path.glob("manifests/*.json"), *earlier] if self.mirror else []:
            with contextlib.suppress(*DAMAGE):
                manifest = read_manifest(path)
                name = f"{manifest['notebook']}-{version_of(manifest)}"
                if path.name == "manifest.json":
                    self.mirror.push(name, name, path.parent, manifest)
                else:
                    self.mirror.push(path.stem, name, self.path, manifest)

    def has(self, notebook: str) -> bool:
        """Return True if there is a manifest of `notebook`, damaged or not."""
        return os.path.lexists(self.manifest_path(notebook))

    def read(self, notebook: str) -> dict | None:
        """Return the manifest of `notebook`, whatever its files are; None if it is damaged."""
        with contextlib.suppress(*DAMAGE):
            manifest = read_manifest(self.manifest_path(notebook))
            return manifest if manifest["notebook"] == notebook else None

    def manifest_path(self, notebook: str) -> Path:
        """Return the path of a manifest."""
        return self / "manifests" / f"{notebook}.json"
