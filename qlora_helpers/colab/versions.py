"""The installed versions against the floors of requirements.txt and the tested range."""

import importlib.metadata

from packaging.requirements import Requirement
from packaging.version import Version

# Oldest and newest: constraints-colab.txt (Colab's image of 2026-08) and constraints.txt
TESTED = {
    "torch": ("2.11.0", "2.13.0"),
    "transformers": ("5.15.0", "5.23.0"),
    "peft": ("0.20.0", "0.21.2"),
    "bitsandbytes": ("0.50.2", "0.50.2"),
    "accelerate": ("1.14.0", "1.15.0"),
    "datasets": ("4.0.0", "5.2.0"),
}


def check_versions() -> tuple[str, str, str]:
    """Return what is installed, a verdict and the remedy.

    A package that is missing or older than its floor in requirements.txt is a stop; one outside the
    tested range is a warning.
    """
    bad, untested = {}, []
    for asked in floors():
        version = _installed(asked.name)
        if not version or not asked.specifier.contains(version, prereleases=True):
            bad[f'"{asked}"'] = f"{asked.name} {version or 'is missing'} ({asked} is needed)"
    if bad:
        upgrade = f"%pip install --upgrade {' '.join(bad)}"
        remedy = f"{upgrade}, then Runtime > Restart session and run all."
        return "; ".join(bad.values()), "stop", remedy
    for name, (oldest, newest) in TESTED.items():
        version = Version(_installed(name)).public
        if not Version(oldest) <= Version(version) <= Version(newest):
            untested.append(f"{name} {version} (tested: {oldest} to {newest})")
    if untested:
        remedy = "Nothing to do now. Should a cell fail, first try a version that was tested."
        return "; ".join(untested), "warning", remedy
    shown = [f"{name} {_installed(name)}" for name in list(TESTED)[:4]]
    return f"{', '.join(shown)}: in the tested range, as the others", "ok", ""


def floors() -> list[Requirement]:
    """Return what requirements.txt asks for; nothing where this package is not installed."""
    try:
        lines = importlib.metadata.requires("qlora-helpers") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [asked for asked in map(Requirement, lines) if asked.marker is None]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
