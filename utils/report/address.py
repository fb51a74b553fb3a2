"""The address of the repository, and every place that repeats it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from utils.report.files import write_text
from utils.utils_funcs import (
    ROOT,
    UserError,
)


def repository_address(root: Path | str = ROOT) -> str:
    """`owner/name` as pyproject.toml [tool.alzheimer] gives it.

    Raises:
        UserError: it gives none.
    """
    with open(Path(root) / "pyproject.toml", "rb") as file:
        address = tomllib.load(file).get("tool", {}).get("alzheimer", {}).get("repository", "")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", address):
        raise UserError(
            f"pyproject.toml [tool.alzheimer] repository is {address!r}, expected owner/name."
        )
    return address


def write_address(root: Path | str = ROOT) -> list[Path]:
    """Makes README, CITATION.cff and the badges and clone commands of notebooks follow
    pyproject.toml; returns the paths that changed."""
    root, address = Path(root), repository_address(root)
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    found = re.search(r'repository-code:\s*"?https://github\.com/([\w.-]+/[\w.-]+)', citation)
    if not found:
        raise UserError(
            f"{root / 'CITATION.cff'} has no line "
            '`repository-code: "https://github.com/owner/name"`; restore it.'
        )
    old = rf"(github\.com/|githubusercontent\.com/)({re.escape(found[1])})(?![\w-])"
    changed = []
    # CITATION.cff last: the others are searched for the address that it holds, so a run that was
    # stopped half-way can be repeated.
    for path in [
        root / "README.md",
        *sorted(root.glob("models/*.ipynb")),
        *sorted(root.glob("dataset/*.ipynb")),
        root / "CITATION.cff",
    ]:
        before = path.read_bytes().decode("utf-8")
        after = re.sub(old, lambda match: match[1] + address, before)
        after = re.sub(
            r"(colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+(/blob/)",
            lambda match: match[1] + address + match[2],
            after,
        )
        after = re.sub(
            rf"\bcd {re.escape(found[1].split('/')[1])}\b", f"cd {address.split('/')[1]}", after
        )
        if after != before:
            write_text(path, after)
            changed.append(path)
    return changed
