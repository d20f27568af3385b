"""Write the repository's address into pyproject.toml, README.md and every badge and install cell, and there the tag of the version too.

python notebooks/set_repository.py https://github.com/account/name    what `make repository URL=...` calls
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
USAGE = "usage: make repository URL=https://github.com/account/name"


def set_repository(root: Path, url: str) -> str:
    """The slug "account/name" that now stands everywhere under `root`. Raises ValueError for what is not such an address."""
    slug = re.fullmatch(
        r"https://github\.com/([A-Za-z0-9][A-Za-z0-9_-]*/[A-Za-z0-9._-]+?)(?:\.git)?/?", url
    )
    if slug is None or re.fullmatch(r"[._-]+", slug[1].partition("/")[2]):
        raise ValueError(f"{url!r} is not the address of a repository on GitHub.")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    old = re.escape(project["urls"]["Repository"].removeprefix("https://github.com/"))
    # only as part of an address: a short slug may occur in a picture's base64
    address = re.compile(rf"(github\.com/|google\.com/github/){old}(?![A-Za-z0-9._-])")
    tag = re.compile(
        r"(github\.com/[\w.-]+/[\w.-]+?(?:@|/archive/refs/tags/))v\d+(?:\.\d+)*(?=\.zip|\W)"
    )
    for path in [
        root / "pyproject.toml",
        root / "README.md",
        *sorted((root / "notebooks").glob("*.ipynb")),
    ]:
        text = path.read_bytes().decode()  # bytes: a line end stays as it is
        path.write_bytes(
            tag.sub(rf"\g<1>v{project['version']}", address.sub(rf"\g<1>{slug[1]}", text)).encode()
        )
    return slug[1]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(USAGE)
    try:
        print(
            f"{set_repository(ROOT, sys.argv[1])} is in pyproject.toml, README.md and the notebooks."
        )
    except ValueError as error:
        print(f"{error}\n{USAGE}", file=sys.stderr)
        sys.exit(2)
