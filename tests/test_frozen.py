"""Refactoring changes no number: weights, adversarial images, the cohort's table, figures stay."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import frozen
from tests.frozen import ROOT, START


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Names whose hash is another one now, or that are gone; what is new changes no old number."""
    return [name for name in before if now.get(name) != before[name]]


@pytest.mark.slow  # trains every backbone, here and with the code of the starting commit
def test_training_and_attacks_give_the_same_numbers_as_before():
    now, before = frozen.hashes_of(ROOT), frozen.recorded_hashes()
    if before is None or changed(before, now):
        # Another machine, or other versions of packages: the starting commit's code runs here.
        before = frozen.hashes_of_start() or before
    if before is None:
        pytest.skip(
            f"frozen.json does not know this machine ({frozen.machine_key()}), and the starting "
            f"commit {START[:7]} is not in this clone's history: `git fetch --unshallow` brings it"
        )
    different = changed(before, now)
    assert not different, f"not what commit {START[:7]} computes: {', '.join(different)}"


@pytest.mark.slow  # links every slice of the real cohort to its patient
def test_the_real_cohort_is_the_committed_file_byte_for_byte(tmp_path):
    raw = os.environ.get("ALZHEIMER_RAW")
    if not raw:
        pytest.skip("ALZHEIMER_RAW is not set")
    command = [
        sys.executable,
        "-m",
        "utils.cohort",
        str(Path(raw).resolve()),
        "--out",
        str(tmp_path / "cohort.csv"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "cohort.csv").read_bytes() == (ROOT / "dataset" / "cohort.csv").read_bytes()


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "core.quotePath=false", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def copy_of_working_tree(folder: Path) -> None:
    """Clones this repository and commits the working tree, without ignored files, in the clone."""
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(folder)], check=True)
    present = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, git(folder, "ls-files", "-z").split("\0")):
        (folder / name).unlink()
    for name in filter(None, present):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    git(folder, "add", "--all")
    settings = ("user.name=test", "user.email=test@example.org", "commit.gpgsign=false")
    options = [option for setting in settings for option in ("-c", setting)]
    git(
        folder,
        *options,
        "commit",
        "--quiet",
        "--allow-empty",
        "--no-verify",
        "-m",
        "The working tree",
    )


@pytest.mark.slow  # draws every figure of the repository
def test_figures_and_readme_drawn_again_are_the_committed_ones(tmp_path):
    requirements = (ROOT / "env" / "requirements.txt").read_text(encoding="utf-8")
    pinned = re.search(r"^matplotlib==(\S+)", requirements, re.M)[1]
    if importlib.metadata.version("matplotlib") != pinned:
        pytest.skip(
            f"figures are drawn by the pinned matplotlib {pinned}: another one draws other bytes"
        )
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone: git status has nothing to compare with")
    folder = tmp_path / "clone"
    copy_of_working_tree(folder)
    command = [sys.executable, "reproduce.py", "figures", "--no-venv"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    differ = git(folder, "status", "--porcelain")
    assert not differ, differ
