"""The folder of a run, and the manifests by which one notebook trusts another's work."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import time
from pathlib import Path

from filelock import FileLock, Timeout

from qlora_helpers.errors import WorkspaceError, reason
from qlora_helpers.run.checkpoints import Checkpoints
from qlora_helpers.run.exchange import entry_of, push_all, version_of
from qlora_helpers.run.files import (
    DAMAGE,
    cannot_write,
    manifest_of,
    read_file,
    read_manifest,
    remove,
    sealed,
    sha256,
    write_file,
    write_text,
    writing,
)

_PACKAGES = [
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "scikit-learn",
]


class Workspace:
    """A run's folder, and the mirror of it if there is one (see `qlora_helpers.colab.mirror`). Each
    notebook publishes its files there under a manifest that is written last."""

    def __init__(self, path: str | os.PathLike, mirror=None):
        self.path, self.mirror = Path(path), mirror
        self.opened = {}  # the fingerprint of each notebook's work as `open` found it
        self._replaces = {}  # of a notebook whose manifest was set aside
        self._lock = FileLock(self / ".lock", timeout=0)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:  # short where it can be, and then the same on every machine
        here = Path.cwd().parent if Path.cwd().name == "notebooks" else Path.cwd()
        inside = self.path.is_relative_to(here)
        return str(self.path.relative_to(here) if inside else self.path)

    @contextlib.contextmanager
    def hold(self, purpose: str):
        """A context in which no other process writes here; it may be nested. Raises WorkspaceError
        if one does already, which it names."""
        note = self / ".lock.txt"
        with contextlib.ExitStack() as held:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                if not (self / ".lock").is_file():
                    remove(self / ".lock")  # what stands in its place
                held.enter_context(self._lock)
            except Timeout:
                holder = note.read_text("utf-8", "replace") if note.is_file() else "not known which"
                raise WorkspaceError(
                    f"another notebook is writing to {self.path} ({holder}). Nothing was written. "
                    "Wait for it, or stop it; then run this notebook again."
                ) from None
            except OSError as error:
                raise cannot_write(self.path, error) from error
            if self._lock.lock_counter == 1:
                since = time.strftime("%H:%M:%S UTC", time.gmtime())
                with contextlib.suppress(OSError):  # a full disk: it is locked without a name
                    note.write_text(f"{purpose}, process {os.getpid()}, since {since}", "utf-8")
            yield

    def write(self, name: str, data: bytes | str) -> None:
        """Write the file `name`, whole or not at all. Raises WorkspaceError if it cannot be
        written, or if another process is writing here."""
        with self.hold(name):
            write_file(self / name, data.encode() if isinstance(data, str) else data)

    def publish(
        self,
        notebook: str,
        config: dict,
        files: list[str],
        inputs: tuple[str, ...] = (),
        **facts,
    ) -> dict:
        """Write the manifest of `notebook`, and have it and its files copied to the mirror.

        Args:
            notebook: its name, as in "02_data_subset".
            config: the settings that it ran with.
            files: paths or folders inside the workspace.
            inputs: the notebooks whose files it read. Their fingerprints are in the manifest, with
                config, package versions and `facts`.

        Returns: the manifest.
        Raises: WorkspaceError if a file is missing or cannot be written, or if a notebook that was
            opened has run again since.
        """
        with self.hold(notebook):
            inputs = self.fingerprints(*inputs)
            paths = [self / name for name in files]
            paths = [part for path in paths for part in (sorted(path.rglob("*")) or [path])]
            names = [p.relative_to(self.path).as_posix() for p in paths if not p.is_dir()]
            try:
                manifest = manifest_of(self.path, names)
            except OSError as error:
                raise WorkspaceError(
                    f"{error.filename or self.path} cannot be published ({reason(error)}). Run "
                    f"notebooks/{notebook}.ipynb again."
                ) from error
            config = json.loads(json.dumps(config))
            identity = {"config": config, "files": manifest["files"], "inputs": inputs}
            fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
            manifest |= {
                "notebook": notebook,
                "config": config,
                "inputs": inputs,
                **facts,
                "fingerprint": fingerprint,
                "replaces": self._lineage(notebook, fingerprint),
                "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            }
            write_text(self.manifest_path(notebook), sealed(manifest))
        if self.mirror:
            self.mirror.push(notebook, entry_of(manifest), self.path, manifest)
        return manifest

    def _lineage(self, notebook: str, fingerprint: str) -> list[str]:
        """The versions that a manifest with this fingerprint replaces, oldest first."""
        old = self.read(notebook)
        if old is None:
            return self._replaces.get(notebook, [])
        if old["fingerprint"] == fingerprint:
            return old["replaces"]
        return [*old["replaces"], version_of(old)]

    def open(self, *notebooks: str) -> str:
        """Require 01_setup and each of `notebooks`, remember what they published, and return the
        text of config.json. Raises WorkspaceError that names the notebook to run."""
        found = {name: self.require(name) for name in ("01_setup", *notebooks)}
        for name, manifest in found.items():
            if manifest["config"] != found["01_setup"]["config"]:
                raise WorkspaceError(
                    f"what {name} wrote was made with other settings. Run "
                    f"notebooks/{name}.ipynb again."
                )
        self.opened = {name: manifest["fingerprint"] for name, manifest in found.items()}
        return read_file(self / "config.json").decode()

    def fingerprints(self, *notebooks: str) -> dict[str, str]:
        """Of what each notebook published. Raises WorkspaceError if one has run again, with other
        settings or data, since this workspace was opened: what was read then is no longer here."""
        found = {name: self.require(name)["fingerprint"] for name in notebooks}
        for name, fingerprint in found.items():
            if self.opened.get(name, fingerprint) != fingerprint:
                raise WorkspaceError(
                    f"{name} was run with other settings or data after this notebook had read what "
                    "it wrote. Run this notebook again from its start."
                )
        return found

    def require(self, notebook: str) -> dict:
        """The manifest of `notebook`, if all that it names is there, unchanged, and made from what
        is there now. Raises WorkspaceError that names the file and the notebook to run."""
        path, again = self.manifest_path(notebook), "again" if self.has(notebook) else "first"
        remedy = f"Run notebooks/{notebook}.ipynb {again}."
        try:
            manifest = read_manifest(path)
            files, inputs = manifest["files"], manifest["inputs"]
        except FileNotFoundError:
            raise WorkspaceError(f"{self} holds nothing from {notebook} yet. {remedy}") from None
        except DAMAGE as error:
            raise WorkspaceError(f"{path} cannot be read ({reason(error)}). {remedy}") from error
        if manifest["notebook"] != notebook:
            raise WorkspaceError(f"{path} is the manifest of {manifest['notebook']}. {remedy}")
        for name, digest in files.items():
            file = self / name
            try:
                changed = sha256(file) != digest
            except OSError as error:
                raise WorkspaceError(
                    f"{file} cannot be read ({reason(error)}). {remedy}"
                ) from error
            if changed:
                raise WorkspaceError(f"{file} is not what {notebook} wrote. {remedy}")
        for name, fingerprint in inputs.items():
            if self.require(name)["fingerprint"] != fingerprint:
                raise WorkspaceError(
                    f"what {notebook} wrote was made before {name} was run with other settings or "
                    f"data. {remedy}"
                )
        return manifest

    def has(self, notebook: str) -> bool:
        """True if there is a manifest of `notebook`, whatever it is worth."""
        return os.path.lexists(self.manifest_path(notebook))

    def is_current(self, notebook: str, config: dict) -> bool:
        """True if `notebook` has published with this very config, and nothing it read or wrote has
        changed since. Raises WorkspaceError if what was opened has."""
        self.fingerprints(*self.opened)
        try:
            return self.require(notebook)["config"] == json.loads(json.dumps(config))
        except WorkspaceError:
            return False

    def find_json(self, notebook: str, name: str) -> dict | None:
        """What `notebook` wrote to the JSON file `name`; None if it has not run. Raises
        WorkspaceError if what it left is not whole."""
        if not self.has(notebook) and not os.path.lexists(self / name):
            return None
        self.require(notebook)
        return self.read_json(notebook, name)

    def read_json(self, notebook: str, name: str) -> dict:
        """What `notebook` wrote to the JSON file `name`, checked by its manifest if it has
        published one. Raises WorkspaceError that names what is wrong and the notebook to run."""
        if self.has(notebook):
            self.require(notebook)
        path, remedy = self / name, f"Run notebooks/{notebook}.ipynb again."
        try:
            return json.loads(read_file(path))
        except (OSError, ValueError) as error:
            raise WorkspaceError(f"{path} cannot be read ({reason(error)}). {remedy}") from error

    def earlier_json(self, name: str) -> dict[str, dict]:
        """The JSON file `name` of each folder in earlier/. One that is damaged is left out, with a
        line that says so."""
        found = {}
        for path in sorted((self / "earlier").glob(f"*/{name}")):
            try:
                manifest = path.with_name("manifest.json")
                if manifest.exists() and read_manifest(manifest)["files"].get(name) != sha256(path):
                    raise ValueError("it is not what was set aside")
                found[path.parent.name] = json.loads(read_file(path))
            except DAMAGE as error:
                why = reason(error)
                print(f"{path} is left out: {why}. Delete its folder if it is not wanted.")
        return found

    def set_aside(self, notebook: str, names: list[str]) -> Path | None:
        """Move what `notebook` published as `names` to a new folder in earlier/, and return it;
        None if there is nothing. Raises WorkspaceError."""
        present = [name for name in names if os.path.lexists(self / name)]
        if not self.has(notebook) or not present:
            return None
        earlier = self / "earlier" / time.strftime(f"{notebook}-%Y%m%d-%H%M%S", time.gmtime())
        with self.hold(notebook), writing(earlier):
            self._replaces[notebook] = self._lineage(notebook, "")
            earlier.mkdir(parents=True, exist_ok=True)
            # the manifest first: what is left is then unpublished, never half
            os.replace(self.manifest_path(notebook), earlier / "manifest.json")
            for name in present:
                (earlier / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self / name, earlier / name)
        print(f"What {notebook} wrote before is kept in {earlier.relative_to(self.path)}.")
        return earlier

    def checkpoints(self) -> Checkpoints:
        """The checkpoints of this run's training."""
        return Checkpoints(self / "checkpoints", self.hold, self.mirror)

    def push(self) -> None:
        """Copy to the mirror what it lacks of what was published here, wait for that, and say how
        it ended. Nothing if there is no mirror."""
        if self.mirror:
            push_all(self)
            self.mirror.wait()

    def pull(self) -> None:
        """Bring what was published elsewhere from the mirror, if it answers."""
        if self.mirror:
            with self.hold("reading Google Drive"):
                self.mirror.pull(self)
            push_all(self)

    def read(self, notebook: str) -> dict | None:
        """The manifest of `notebook`, whatever became of its files; None if it cannot be read."""
        try:
            manifest = read_manifest(self.manifest_path(notebook))
            return manifest if manifest["notebook"] == notebook else None
        except DAMAGE:
            return None

    def manifest_path(self, notebook: str) -> Path:
        return self / "manifests" / f"{notebook}.json"
