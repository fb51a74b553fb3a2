"""Small things every notebook needs: project paths, seeding, device choice, environment print, atomic files, progress."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent

#: Ordinal everywhere: a higher number is a worse clinical rating.
CLASSES = ("Non", "Very mild", "Mild", "Moderate")
BACKBONES = ("Dinov2", "Efficientnet", "Resnet")
#: The names used in every path, record, figure and table. `_atk` is the adversarially trained twin.
MODELS = tuple(f"{backbone}{counterpart}" for backbone in BACKBONES for counterpart in ("", "_atk"))
PROTOCOLS = ("slice", "patient")
#: Bytes free below which a failed write is put down to a full disk.
FULL_DISK = 1 << 20


class UserError(Exception):
    """A failure that a user can cause and mend: one sentence that says what was found, what was expected, what to do."""


def result_root(profile: str, data: str) -> Path:
    """Where a run writes: the repository itself for `cpu` and `paper` on real data, `runs/<profile>-<data>/` for
    everything else, so that a committed result is never overwritten by a lesser run. `ALZHEIMER_RUNS` moves `runs/`."""
    if profile in ("cpu", "paper") and data == "real":
        return ROOT
    return Path(os.environ.get("ALZHEIMER_RUNS", ROOT / "runs")) / f"{profile}-{data}"


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it on success: a kill at any moment leaves the old file or the
    new one, never half of one."""
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{path.stem}-", suffix=f"{path.suffix}.tmp", dir=path.parent
        )
        os.close(handle)
        temporary = Path(name)
        os.chmod(name, 0o644)  # mkstemp makes it private to this user; a result is for everybody
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        if not _tells_of_a_full_disk(error, path.parent):
            raise
        raise UserError(
            f"{path} could not be written: the disk is full ({error}); free some space and run the same command again, it "
            "goes on from what was saved before."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _tells_of_a_full_disk(error: Exception, folder: Path) -> bool:
    """Python has an error number for it, safetensors (an exception of its own) only the words, and torch.save's RuntimeError
    says nothing of the disk: there the room that is left decides."""
    if getattr(error, "errno", None) == errno.ENOSPC or f"(os error {errno.ENOSPC})" in str(error):
        return True
    return (
        isinstance(error, (OSError, RuntimeError))
        and folder.exists()
        and shutil.disk_usage(folder).free <= FULL_DISK
    )


def write_json(path: Path | str, value: object) -> None:
    """Atomically writes `value` as readable JSON. NaN and infinity are refused: a record must be valid JSON."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path | str) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); delete it and run the command that makes it again."
        ) from error


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch (all devices)."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def choose_device() -> "torch.device":  # noqa: F821
    """The fastest device at hand: CUDA, Apple's MPS, or the CPU. `ALZHEIMER_DEVICE` overrides.

    On a GPU float32 is float32 from then on. TF32, PyTorch's default for its convolutions, keeps ten bits: with them an image
    near the boundary falls or stands by the size of the batch that it is scored in.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if name := os.environ.get("ALZHEIMER_DEVICE"):
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@functools.cache
def keep_freed_memory() -> bool:
    """Has the C library keep what a freed tensor leaves for the next one, for the rest of this process; False where it is
    not glibc, and nothing is changed.

    By default every tensor of more than 32 MB goes back to the system when it is freed, and the next one is paid for again,
    page by page. In return the process holds on to the most memory that it ever needed.
    """
    import ctypes

    trim_threshold, mmap_max = -1, -4  # the numbers of <malloc.h>
    try:
        library = ctypes.CDLL("libc.so.6")
        return bool(library.mallopt(mmap_max, 0) and library.mallopt(trim_threshold, -1))
    except (OSError, AttributeError):
        return False


def hardware() -> str:
    """One line: the accelerator if there is one, else the processor and its cores."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{os.cpu_count()} cores, {name}"


def environment() -> dict[str, str]:
    """Versions of what decides a number: Python and the packages that train, attack and explain."""
    from importlib.metadata import PackageNotFoundError, version

    packages = (
        "torch",
        "torchvision",
        "timm",
        "transformers",
        "optuna",
        "torchattacks",
        "pyautoattack",
        "adversarial-robustness-toolbox",
        "grad-cam",
        "scikit-learn",
        "numpy",
    )
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def print_environment() -> None:
    """The line that every notebook prints first: what it ran on."""
    versions = environment()
    print(
        f"{hardware()} · device {choose_device()} · "
        + " · ".join(f"{k} {v}" for k, v in versions.items())
    )


def git_state() -> dict[str, object]:
    """Commit and whether tracked files differ from it; `unknown` outside a clone (a downloaded archive)."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {
            "git_commit": git("rev-parse", "HEAD"),
            "git_dirty": bool(
                git(
                    "status",
                    "--porcelain",
                    "--untracked-files=no",
                    "--",
                    "utils",
                    "models",
                    "dataset",
                )
            ),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": "unknown", "git_dirty": True}


def say(line: str) -> None:
    """One line for whoever watches, on standard error, above any progress bar; silent where nobody does (`ALZHEIMER_QUIET`)."""
    if not os.environ.get("ALZHEIMER_QUIET"):
        from tqdm.auto import tqdm

        tqdm.write(line, file=sys.stderr)


def progress(items: Iterable, description: str, total: int | None = None, **options) -> "tqdm":  # noqa: F821
    """A progress bar on standard error that leaves no trace when done; off where nobody watches (`ALZHEIMER_QUIET`,
    set by the headless runner: an executed notebook keeps figures and tables, not logs)."""
    from tqdm.auto import tqdm

    return tqdm(
        items,
        desc=description,
        total=total,
        leave=False,
        file=sys.stderr,
        dynamic_ncols=True,
        disable=bool(os.environ.get("ALZHEIMER_QUIET")),
        **options,
    )
