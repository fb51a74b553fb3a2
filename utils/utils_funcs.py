"""What every module uses: paths, atomic files, seeding, device, environment, progress."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent

#: Ordinal everywhere: a higher number is a worse clinical rating.
CLASSES = ("Non", "Very mild", "Mild", "Moderate")
BACKBONES = ("Dinov2", "Efficientnet", "Resnet")
#: The names used in every path, record, figure and table. `_atk` models are trained adversarially;
#: the others are their clean counterparts.
MODELS = tuple(f"{backbone}{regime}" for backbone in BACKBONES for regime in ("", "_atk"))
PROTOCOLS: tuple[Literal["slice", "patient"], ...] = ("slice", "patient")
#: Bytes free below which a failed write is put down to a full disk.
FULL_DISK = 1 << 20
#: Tells this machine's temporary files from those of others on a shared disk.
MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"


class UserError(Exception):
    """A failure that a user can cause and repair.

    The message says in one sentence what was found, what was expected, and what to do.
    """


def result_root(profile: str, data: str) -> Path:
    """The folder that a run writes to.

    It is the repository itself for the profiles `cpu` and `paper` on the published data set, and
    `runs/<profile>-<data>/` for everything else, so that no run on less, or on other people, ever
    overwrites a committed result.

    Args:
        data: `real` for the published data set, `phantom`, or the short name of another cohort.
    """
    if profile in ("cpu", "paper") and data == "real":
        return ROOT
    return runs_folder() / f"{profile}-{data}"


def runs_folder() -> Path:
    """The folder of what git does not keep; the variable `ALZHEIMER_RUNS` moves it."""
    return Path(os.environ.get("ALZHEIMER_RUNS", ROOT / "runs"))


def short_name(cohort_sha256: str) -> str:
    """The first eight digits of a cohort's identity, by which folders and messages name it."""
    return cohort_sha256[:8]


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, through symbolic links too, except those that lead back up or
    nowhere."""
    for here, names, files in os.walk(folder, followlinks=True):
        above = {Path(here).resolve(), *Path(here).resolve().parents}
        names[:] = [name for name in names if (Path(here) / name).resolve() not in above]
        yield from (path for name in files if (path := Path(here) / name).is_file())


def check_output(path: Path | str | None, *inputs: Path | str | None) -> None:
    """Refuses, before any work, a place that a result cannot be written to.

    Args:
        path: the file to write; None where none is asked for.
        inputs: what is read, and must not be overwritten.

    Raises:
        UserError: it is a folder, one of the inputs, or in a folder that cannot be written to.
    """
    if path is None:
        return
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the file to write, such as {path / 'out'}.")
    for source in [Path(given) for given in inputs if given]:
        if path.exists() and source.exists() and path.samefile(source):
            raise UserError(f"{path} is what is read, and would be overwritten: name another file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"Nothing can be written to {path.parent} ({reason}): name a file in another folder."
        ) from error


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`, and renames it to `path` on success.

    Killed at any moment, this leaves the old file or the new one, never half of one; the next write
    to `path` removes what the killed one left behind.

    Raises:
        UserError: the disk is full, or nothing may be written there.
    """
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{path.stem}-{MACHINE}-{os.getpid()}-",
            suffix=f"{path.suffix}.tmp",
            dir=path.parent,
        )
        os.close(handle)
        temporary = Path(name)
        os.chmod(name, 0o644)  # mkstemp lets only this user read it; a result is for all
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        remove_leftovers(path)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(
                f"{path} cannot be written ({error.strerror}): make its folder writable, or choose "
                "another one."
            ) from error
        if not is_full_disk(error, path.parent):
            raise
        raise UserError(
            f"{path} could not be written: the disk is full ({error}); free some space and run the "
            "same command again, it goes on from what was saved before."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Removes temporary files of `path` whose process ran on this machine and is gone."""
    start = f".{path.stem}-{MACHINE}-"
    for old in path.parent.glob(f"{glob.escape(start)}*{glob.escape(path.suffix)}.tmp"):
        process = old.name.removeprefix(start).split("-")[0]
        if process.isdigit() and is_gone(int(process)):
            old.unlink(missing_ok=True)


def is_gone(process: int) -> bool:
    """Whether no process of this number runs here; False where that cannot be asked (Windows)."""
    if os.name == "nt":
        return False
    try:
        os.kill(process, 0)  # signal 0 asks and does nothing
    except ProcessLookupError:
        return True
    except PermissionError:  # it runs, and is somebody else's
        pass
    return False


def content_sha256(content: Mapping[str, Tensor | list[str] | str]) -> str:
    """SHA-256 of named tensors and texts, in the order of their names: a file that holds it beside
    them shows whether a byte of it was changed."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(content):
        value = content[name]
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            octets = value.contiguous().flatten().view(torch.uint8).numpy()
            digest.update(octets)  # type: ignore[arg-type]  # numpy's stub knows no buffers
        else:
            digest.update("\n".join([value] if isinstance(value, str) else value).encode())
    return digest.hexdigest()


def is_full_disk(error: Exception, folder: Path) -> bool:
    """Whether a write into `folder` failed because the disk is full.

    Python's errors have a number for it. safetensors has an exception of its own with only the
    words, and `torch.save` raises a RuntimeError that says nothing of the disk: then the space that
    is left decides.
    """
    if getattr(error, "errno", None) == errno.ENOSPC or f"(os error {errno.ENOSPC})" in str(error):
        return True
    return (
        isinstance(error, (OSError, RuntimeError))
        and folder.exists()
        and shutil.disk_usage(folder).free <= FULL_DISK
    )


def write_json(path: Path | str, value: object) -> None:
    """Atomically writes `value` as readable JSON.

    Raises:
        ValueError: it holds NaN or infinity, which are not valid JSON.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path | str) -> dict:
    """The content of a JSON file.

    Raises:
        UserError: the file is not valid JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); delete it and run the command that makes it "
            "again."
        ) from error


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch (all devices)."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def choose_device() -> torch.device:
    """The fastest device there is: CUDA, Apple's MPS, or the CPU. `ALZHEIMER_DEVICE` overrides.

    Raises:
        UserError: that variable names no device, or one that is not here.
    """
    import torch

    if name := os.environ.get("ALZHEIMER_DEVICE"):
        try:
            device = torch.device(name)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(
                f"ALZHEIMER_DEVICE is {name!r}, which is no device of this machine "
                f"({str(error).splitlines()[0][:120]}): set it to cpu, cuda or mps, or unset it."
            ) from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def set_up_process() -> None:
    """What this project changes for the whole process; `open_workspace` asks for it.

    Float32 on a GPU is float32 (`turn_off_tf32`), and on a CPU freed memory is kept
    (`keep_freed_memory`).
    """
    turn_off_tf32()
    if choose_device().type == "cpu":
        keep_freed_memory()


def turn_off_tf32() -> None:
    """Has PyTorch compute float32 convolutions and products on GPUs in float32 from now on.

    TF32, its default for convolutions, keeps ten bits: with them it depends on the size of the
    batch whether an image near the decision boundary is misclassified.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@functools.cache
def keep_freed_memory() -> bool:
    """Has the C library reuse the memory of freed tensors, for the rest of this process.

    By default the memory of a large tensor (up to 32 MB at most stay) returns to the system when it
    is freed, and the next one costs time again, page by page. In return the process keeps the most
    memory that it ever needed.

    Returns:
        False where the C library is not glibc, and nothing is changed.
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
    """Versions of what results depend on: Python and the packages that train, attack, explain."""
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
    """Prints hardware, device and versions; every notebook starts with it."""
    versions = [f"{name} {version}" for name, version in environment().items()]
    text = " · ".join([hardware(), f"device {choose_device()}", *versions])
    print(textwrap.fill(text, 96, break_on_hyphens=False))


def git_state() -> dict[str, str | bool]:
    """`git_commit`, and `git_dirty`: whether tracked code or notebooks differ from it.

    `unknown` and True outside a clone (a downloaded archive).
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    status = ("status", "--porcelain", "--untracked-files=no", "--", "utils", "models", "dataset")
    try:
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git(*status))}
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": "unknown", "git_dirty": True}


def say(line: str) -> None:
    """Prints a line on standard error, above any progress bar; nothing under `ALZHEIMER_QUIET`."""
    if not os.environ.get("ALZHEIMER_QUIET"):
        from tqdm.auto import tqdm

        tqdm.write(line, file=sys.stderr)


def progress(
    items: Iterable, description: str, total: int | None = None, **options: object
) -> tqdm:
    """The items with a progress bar on standard error, which disappears at the end.

    There is none under `ALZHEIMER_QUIET`, which the headless runner sets: an executed notebook
    keeps figures and tables, not logs.

    Args:
        options: of `tqdm`.
    """
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
