"""Write the repository's address into pyproject.toml, README.md, every badge and install cell.

`make repository URL=https://github.com/account/name` calls this. The install cells get the tag of
pyproject's version too.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
USAGE = "usage: make repository URL=https://github.com/account/name"


def set_repository(root: Path, url: str) -> str:
    """Write `url` everywhere under `root`, and return its slug "account/name".

    Raises:
        ValueError: if `url` is not the address of a repository on GitHub.
    """
    account, name = r"[A-Za-z0-9][A-Za-z0-9_-]*", r"[A-Za-z0-9._-]+?"
    match = re.fullmatch(rf"https://github\.com/({account}/{name})(?:\.git)?/?", url)
    if match is None or not re.search(r"/.*[A-Za-z0-9]", match[1]):
        raise ValueError(f"{url!r} is not the address of a repository on GitHub.")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    old = re.escape(project["urls"]["Repository"].removeprefix("https://github.com/"))
    # Only as part of an address: a short slug may occur in a picture's base64.
    address = re.compile(rf"(github\.com/|google\.com/github/){old}(?![A-Za-z0-9._-])")
    tag = re.compile(r"(github\.com/[\w.-]+/[\w.-]+?/archive/refs/tags/)v\d+(?:\.\d+)*(?=\.zip)")
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    for path in [root / "pyproject.toml", root / "README.md", *notebooks]:
        text = path.read_bytes().decode()  # bytes: a line end stays as it is
        text = address.sub(rf"\g<1>{match[1]}", text)
        path.write_bytes(tag.sub(rf"\g<1>v{project['version']}", text).encode())
    return match[1]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(USAGE)
    try:
        slug = set_repository(ROOT, sys.argv[1])
    except ValueError as error:
        print(f"{error}\n{USAGE}", file=sys.stderr)
        sys.exit(2)
    print(f"{slug} is in pyproject.toml, README.md and the notebooks.")
