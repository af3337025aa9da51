"""The README's tree is true: what it names exists, and no room of the project is left out."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def named_paths() -> set[str]:
    """Every path in the annotated tree, put together from the indentation."""
    text = (ROOT / "README.md").read_text().split("## The tree")[1].split("\n## ")[0]
    paths: set[str] = set()
    folders: dict[int, str] = {}
    for line in filter(str.strip, text.splitlines()):
        depth = len(line) - len(line.lstrip())
        if depth > 14:  # the second line of an explanation
            continue
        parent = "".join(folders[level] for level in sorted(folders) if level < depth)
        for name in re.match(r"(\S+(?:  ?(?=\S+\.py)\S+)*)", line.strip())[0].split():
            paths.add(parent + name)
            if name.endswith("/"):
                folders = {level: folder for level, folder in folders.items() if level < depth} | {depth: name}
    return paths


def test_everything_the_tree_names_exists() -> None:
    missing = [path for path in named_paths() if not (ROOT / path).exists()]
    assert missing == []


def test_every_module_of_the_packages_is_in_the_tree() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: which files belong to the project can't be told")
    modules = [
        Path(line)
        for line in listed.stdout.splitlines()
        if line.endswith(".py") and line.startswith(("lrurec/", "stream_app/")) and not line.endswith("__init__.py")
    ]
    named = named_paths()

    def is_told(module: Path) -> bool:
        """Named itself, or in a folder that is named as a whole."""
        siblings = {path for path in named if Path(path).parent == module.parent}
        return str(module) in named or (f"{module.parent}/" in named and not siblings)

    assert [str(module) for module in modules if not is_told(module)] == []
    tops = {line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    assert {f"{top}/" for top in tops if not top.startswith(".")} <= {path.split("/")[0] + "/" for path in named}
