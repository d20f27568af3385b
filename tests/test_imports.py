"""Who may import whom in the package, how deep that goes, and how long a module may be: read from the source."""

import ast
from functools import cache
from pathlib import Path

import qlora_helpers

ROOT = Path(qlora_helpers.__file__).parent
# Each file of the front may import those before it.
FRONT = [
    "errors",
    "texts",
    "config",
    "data",
    "prompts",
    "scoring",
    "families",
    "model",
    "metrics",
    "history",
    "training",
    "plots",
    "curve",
    "card",
    "adapter",
    "classifier",
    "export",
]
USE_RUN = {"training", "adapter", "classifier", "export"}
USE_HUB = {"data", "model", "adapter"}
MOST_DEPTH = 9  # 8 is wanted
MOST_LINES = 300
LONG = {"training"}


def source(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def modules() -> list[str]:
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted(ROOT.rglob("*.py"))]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    return [name for name in names if name not in ("__init__", "__main__")]


@cache
def imported(module: str) -> set[str]:
    """Return the modules of the package that `module` imports, anywhere in its source."""
    names = set()
    for node in ast.walk(ast.parse(source(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    inside = {name.removeprefix("qlora_helpers.") for name in names}
    return inside & set(modules()) - {module}


def room(module: str) -> str:
    name, _, inside = module.partition(".")
    if inside or source(module).name == "__init__.py":
        return name
    return "front"


def allowed(module: str, other: str) -> bool:
    here, there = room(module), room(other)
    if other == "errors" or here == there != "front":
        return True
    if here == "front":
        above = other in FRONT[: FRONT.index(module)]
        run, hub = there == "run" and module in USE_RUN, other == "colab.hub" and module in USE_HUB
        return above or there == "fast" or run or hub
    return there in {"colab": {"front", "run", "fast"}, "widgets": {"front"}}.get(here, ())


def test_a_module_imports_only_what_its_room_may():
    edges = {(a, b) for a in modules() for b in imported(a)}
    assert [edge for edge in sorted(edges) if not allowed(*edge)] == []


@cache
def depth(module: str) -> int:
    return 1 + max(map(depth, imported(module)), default=0)


def test_no_chain_of_imports_is_long():
    assert max(map(depth, modules())) <= MOST_DEPTH


def test_no_module_is_long():
    lines = {name: len(source(name).read_text(encoding="utf-8").splitlines()) for name in modules()}
    assert {name for name, count in lines.items() if count > MOST_LINES} == LONG
