"""The package's rules: who may import whom, how deep that goes, how long modules and lines are."""

import ast
import re
from functools import cache
from pathlib import Path

import qlora_helpers

ROOT = Path(qlora_helpers.__file__).parent
TESTS = Path(__file__).parent
# README's map names the front files in order: each may import those above it.
MAP = (ROOT.parent / "README.md").read_text("utf-8").partition("    qlora_helpers/\n")[2]
FRONT = re.findall(r"^      (\w+)\.py ", MAP, re.M)
USE_RUN = {"training", "adapter", "classifier", "export", "gguf_adapter", "launch"}
USE_HUB = {"data", "encoder", "model", "adapter"}
MAX_DEPTH = 8
MAX_LINES = 300
MAX_COLUMNS = 100


def source(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def modules() -> list[str]:
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted(ROOT.rglob("*.py"))]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    return [name for name in names if name not in ("__init__", "__main__")]


@cache
def imported(module: str, when_called: bool = True) -> set[str]:
    """Return the modules of the package that `module` imports: anywhere in its source, or when it
    is imported itself, and so not `when_called`."""
    tree, names = ast.parse(source(module).read_text("utf-8")), set()
    for node in ast.walk(tree) if when_called else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    inside = {name.removeprefix("qlora_helpers.") for name in names}
    return inside & set(modules()) - {module}


def room(module: str) -> str:
    is_front = "." not in module and source(module).name != "__init__.py"
    return "front" if is_front else module.partition(".")[0]


def allowed(module: str, other: str) -> bool:
    here, there = room(module), room(other)
    if other == "errors":
        return True
    if here != "front":
        others = {"colab": {"front", "run", "fast"}, "widgets": {"front"}}.get(here, set())
        return there in others | {here}
    if there == "front":
        return {module, other} <= set(FRONT) and FRONT.index(other) < FRONT.index(module)
    if there == "run":
        return module in USE_RUN
    return there == "fast" or (other == "colab.hub" and module in USE_HUB)


def test_the_readme_names_every_front_file():
    front = {name for name in modules() if room(name) == "front"}
    assert set(FRONT) - {"__init__", "__main__"} == front


def test_a_module_imports_only_what_its_room_may():
    edges = {(module, other) for module in modules() for other in imported(module)}
    assert [edge for edge in sorted(edges) if not allowed(*edge)] == []


@cache
def longest_chain(module: str) -> list[str]:
    """Return `module` and what it imports, by the longest way down."""
    return [module, *max(map(longest_chain, sorted(imported(module, False))), key=len, default=[])]


def test_no_chain_of_imports_is_long():
    chains = [longest_chain(module) for module in modules()]
    assert [" > ".join(chain) for chain in chains if len(chain) > MAX_DEPTH] == []


def test_no_module_is_long():
    lines = {name: len(source(name).read_text("utf-8").splitlines()) for name in modules()}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_no_line_is_long():
    """Ruff's formatter leaves long texts and comments as they are."""
    long = {}
    for path in [*ROOT.rglob("*.py"), *TESTS.rglob("*.py")]:
        lines = path.read_text("utf-8").splitlines()
        if count := sum(len(line) > MAX_COLUMNS for line in lines):
            long[path.relative_to(ROOT.parent).as_posix()] = count
    assert long == {}
