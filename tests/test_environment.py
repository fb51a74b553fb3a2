"""The environment is pinned, complete and the same however it is installed."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import reproduce

ROOT = reproduce.ROOT
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REQUIREMENTS = [
    line
    for line in (ROOT / "env" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.lstrip().startswith("#")
]
FIRST_PARTY = {
    "utils",
    "reproduce",
    "tests",
    "conftest",
    *(path.stem for path in (ROOT / "tests" / "benchmarks").glob("*.py")),
}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def distribution(requirement: str) -> str:
    """`Pillow[extra]>=1` → `pillow`."""
    return normalized(re.match(r"[\w.-]+", requirement)[0])


DECLARED = {
    distribution(entry)
    for entries in (
        PYPROJECT["project"]["dependencies"],
        PYPROJECT["project"]["optional-dependencies"]["manifest"],
    )
    for entry in entries
}
SECOND = {distribution(entry) for entry in PYPROJECT["tool"]["alzheimer"]["no_deps"]}


def pip(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_package_is_pinned_and_comes_from_no_named_place():
    for line in REQUIREMENTS:
        assert re.fullmatch(r"[\w.-]+==[\w.!+]+( ; .+)?", line), line


def test_every_dependency_is_pinned_and_torchattacks_comes_second():
    pinned = {distribution(line) for line in REQUIREMENTS}
    assert pinned >= DECLARED
    assert SECOND == {"torchattacks"} and not SECOND & pinned  # noqa: SIM300  equal sets
    assert PYPROJECT["tool"]["alzheimer"]["no_deps"] == ["torchattacks==3.5.1"]


def test_the_pins_hold_on_the_other_systems_too():
    """A file compiled for one system alone would lack what only the others need."""
    for system in ("linux", "darwin", "win32"):
        assert any(f"sys_platform == '{system}'" in line for line in REQUIREMENTS)


def test_this_environment_is_the_pinned_one():
    answer = pip(
        "install", "--dry-run", "--no-deps", "--no-index", "-r", str(reproduce.REQUIREMENTS)
    )
    assert answer.returncode == 0 and "Would install" not in answer.stdout, (
        answer.stdout[-500:] + answer.stderr[-500:]
    )


def test_pip_check_names_torchattacks_old_requests_and_nothing_else():
    assert reproduce.unexpected_conflicts(pip("check").stdout, reproduce.no_deps_pins()) == []


@pytest.mark.parametrize(
    "line, accepted",
    [
        (
            "torchattacks 3.5.1 has requirement requests~=2.25.1, but you have requests 2.34.2.",
            True,
        ),
        ("No broken requirements found.", True),
        ("torchattacks 3.5.1 requires torch, which is not installed.", False),
        ("timm 1.0.31 has requirement requests~=2.25.1, but you have requests 2.34.2.", False),
    ],
)
def test_no_other_conflict_is_accepted(line, accepted):
    assert (reproduce.unexpected_conflicts(line, ["torchattacks==3.5.1"]) == []) == accepted


# --- What is imported is declared ---


def imports(source: str, name: str) -> set[str]:
    """Top-level names of all packages that `source` imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(source, name)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def notebook_source(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", code)  # IPython's own lines


def sources() -> dict[str, str]:
    files = [
        ROOT / "reproduce.py",
        *(ROOT / "utils").rglob("*.py"),
        *(ROOT / "tests").rglob("*.py"),
    ]
    notebooks = [*(ROOT / "dataset").glob("*.ipynb"), *(ROOT / "models").glob("*.ipynb")]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files} | {
        str(path.relative_to(ROOT)): notebook_source(path) for path in notebooks
    }


def test_everything_imported_is_declared():
    providers = importlib.metadata.packages_distributions()
    undeclared = {}
    for file, source in sources().items():
        known = FIRST_PARTY | set(sys.stdlib_module_names) | {"google"}  # google.colab
        for name in imports(source, file) - known:
            provided_by = {normalized(provider) for provider in providers.get(name, ())}
            if not provided_by & (DECLARED | SECOND):
                undeclared.setdefault(name, []).append(file)
    assert not undeclared, f"imported but not in pyproject.toml: {undeclared}"


def test_reproduce_needs_nothing_but_python():
    """Of the library it imports one module, late, and that one needs nothing else either."""
    found = imports((ROOT / "reproduce.py").read_text(encoding="utf-8"), "reproduce.py")
    assert found - set(sys.stdlib_module_names) == {"utils"}
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import utils.kernel_server"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, timeout=60)


# --- conda and continuous integration ---


def test_conda_installs_the_same_pins():
    text = (ROOT / "env" / "project_env.yaml").read_text(encoding="utf-8")
    lines = [
        line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")
    ]
    assert "name: project_env" in lines and "- -r requirements.txt" in lines
    python = next(line for line in lines if line.startswith("- python="))
    assert python.removeprefix("- python=") in ("3.11", "3.12", "3.13")
    assert all(f"pip install --no-deps {pin}" in text for pin in reproduce.no_deps_pins())


def test_continuous_integration_runs_lint_and_types_before_the_tests_and_slow_tests_last():
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
    steps = [
        "ruff check .\n",
        "ruff format --check .\n",
        "bin/mypy\n",
        "reproduce.py --test\n",
        'reproduce.py --test -- -m "slow and not exhaustive" ',
    ]
    places = [text.find(step) for step in steps]
    assert -1 not in places and places == sorted(places)
