"""The versions of packages that the tests ran with, and what is installed here."""

import importlib.metadata

from packaging.requirements import Requirement
from packaging.version import Version

TESTED = {  # in Colab's image of 2026-08 (where it has the package), and the newest: constraints-colab.txt, constraints.txt
    "torch": ("2.11.0", "2.13.0"),
    "transformers": ("5.15.0", "5.23.0"),
    "peft": ("0.20.0", "0.21.2"),
    "bitsandbytes": (None, "0.50.2"),
    "accelerate": ("1.14.0", "1.15.0"),
    "datasets": ("4.0.0", "5.2.0"),
    "tokenizers": ("0.22.2", "0.23.3"),
    "numpy": ("2.1.3", "2.4.6"),
    "scikit-learn": ("1.6.1", "1.9.1"),
    "ipywidgets": ("7.7.1", "8.1.9"),
    "ipykernel": ("6.17.1", "7.4.0"),
    "evaluate": (None, "0.4.6"),
}
_FOR_MAKE = {"nbclient", "nbval"}  # no notebook needs them


def floors() -> dict[str, Requirement]:
    """What requirements.txt asks for, by package; nothing where this package runs without being installed."""
    try:
        asked = [Requirement(line) for line in importlib.metadata.requires("qlora-helpers") or ()]
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {
        one.name: one
        for one in asked
        if one.name not in _FOR_MAKE and (one.marker is None or one.marker.evaluate())
    }


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_versions() -> tuple[str, str, str]:
    """What is installed, a verdict (ok, warning, or stop for a package that is missing or older than its floor), and the remedy."""
    asked, found = floors(), {name: installed(name) for name in TESTED}
    found |= {name: installed(name) for name in asked}
    bad = [
        f"{name} {found[name] or 'is missing'} (needed: {requirement.specifier})"
        for name, requirement in asked.items()
        if found[name] is None or not requirement.specifier.contains(found[name], prereleases=True)
    ]
    if bad:
        names = " ".join(
            f'"{requirement}"'
            for name, requirement in asked.items()
            if any(line.startswith(f"{name} ") for line in bad)
        )
        return (
            "; ".join(bad),
            "stop",
            f"%pip install --upgrade {names}, then Runtime > Restart session and run all.",
        )
    known = [
        (name, Version(Version(version).public), *TESTED[name])
        for name, version in found.items()
        if version and name in TESTED
    ]
    newer = [
        f"{name} {version} (tested up to {newest})"
        for name, version, _, newest in known
        if version > Version(newest)
    ]
    older = [
        f"{name} {version} (tested from {oldest})"
        for name, version, oldest, _ in known
        if oldest and version < Version(oldest)
    ]
    if newer or older:
        return (
            "; ".join(newer + older),
            "warning",
            "Nothing to do now. Should a cell fail, first try a version that was tested.",
        )
    main = ", ".join(
        f"{name} {found[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes")
    )
    return f"{main}: these and {len(found) - 4} others are in the tested range", "ok", ""
