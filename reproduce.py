"""Reproduces the study: makes the environment, finds the data, runs all notebooks, prints results.

    python reproduce.py                        the demo: about six minutes on two cores
    python reproduce.py --profile cpu          the real cohort on a two-core machine, many hours
    python reproduce.py --profile paper        224x224 and full budgets, on one GPU or several
    python reproduce.py --only Resnet_atk      one notebook (may be repeated)
    python reproduce.py figures                all figures and tables from the committed records
    python reproduce.py --test -- -k metrics   the tests; what follows -- goes to pytest

The first run makes .venv and installs env/requirements.txt there, which takes some minutes more. A
run that was stopped, at any moment and in any way, is finished by the same command. Results of the
demo lie under runs/; only `cpu` and `paper` on real data write to assets/, models/ and README.md.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (an older Python gets a sentence, not a traceback)
    sys.exit(
        "Python 3.11, 3.12 or 3.13 is needed and this is {}.{}: start reproduce.py with one of "
        "those, for example `python3.12 reproduce.py`.".format(*sys.version_info[:2])
    )

import argparse
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
REQUIREMENTS = ROOT / "env" / "requirements.txt"
#: A file in a virtual environment whose installation is complete, with a hash of its pins.
MARKER = "alzheimer-environment.json"
NEWEST_TESTED = (3, 13)

PREPARE = "dataset/prepare_dataset.ipynb"
#: Every notebook of the study in the order in which it runs; each reads what those before it wrote.
NOTEBOOKS = (
    PREPARE,
    "dataset/leak_audit.ipynb",
    "models/Resnet.ipynb",
    "models/Resnet_atk.ipynb",
    "models/Efficientnet.ipynb",
    "models/Efficientnet_atk.ipynb",
    "models/Dinov2.ipynb",
    "models/Dinov2_atk.ipynb",
    "models/ensemble.ipynb",
    "models/results.ipynb",
)
MODEL_NOTEBOOKS = NOTEBOOKS[2:8]
#: Of a demo several run at a time: each begins when those whose results it reads have ended. (A
#: demo's ensemble is one of ResNets and EfficientNets.)
DEMO_NEEDS = {
    **dict.fromkeys(NOTEBOOKS, {PREPARE}),
    PREPARE: set(),
    "models/ensemble.ipynb": {PREPARE, *NOTEBOOKS[2:6]},
    "models/results.ipynb": set(NOTEBOOKS[:-1]),
}
#: Skipped where a clone does not have them.
OPTIONAL = {"dataset/leak_audit.ipynb", "models/ensemble.ipynb"}
PROFILES = ("demo", "cpu", "paper")
#: The arrays of a demo and of most tests are too small for several threads, which only wait.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
#: Where a notebook is executed before the result is put in its place.
SCRATCH = ".scratch"


class ReproduceError(Exception):
    """A failure that a user can mend: one sentence that says what was found and what to do."""


# --- What runs, and where it writes ---------------------------------------------------------------


def runs_folder() -> Path:
    """Where results go that are not committed: ALZHEIMER_RUNS, or runs/ in the repository."""
    return Path(os.environ.get("ALZHEIMER_RUNS", ROOT / "runs")).absolute()


def present_notebooks() -> set[str]:
    """The notebooks that this clone has."""
    return {path for path in NOTEBOOKS if (ROOT / path).is_file()}


def choose_notebooks(only: Sequence[str], present: set[str]) -> list[str]:
    """The notebooks to run, in order.

    Args:
        only: names without folder and extension; empty for all.
        present: paths of the notebooks that this clone has.

    Raises:
        ReproduceError: for an unknown name, or when a notebook of the study is missing.
    """
    if missing := [path for path in NOTEBOOKS if path not in present | OPTIONAL]:
        raise ReproduceError(
            f"This clone lacks {', '.join(missing)}: get it back with "
            f"`git checkout -- {missing[0]}`."
        )
    names = {Path(path).stem: path for path in NOTEBOOKS if path in present}
    if unknown := [name for name in only if name not in names]:
        raise ReproduceError(
            f"--only {unknown[0]} names no notebook: expected one of {', '.join(names)}."
        )
    wanted = {names[name] for name in only} or set(names.values())
    return [path for path in names.values() if path in wanted]


def set_parameters(notebook: dict, values: dict[str, object]) -> dict:
    """A copy of `notebook` whose cell tagged `parameters` assigns `values` to their names.

    The cell itself is rewritten instead of adding a second one after it, so that an executed
    notebook shows the parameters that its outputs belong to, in the place where a reader changes
    them.

    Raises:
        ReproduceError: no cell is tagged, or it does not assign each name exactly once.
    """
    notebook = json.loads(json.dumps(notebook))
    for cell in notebook["cells"]:
        if "parameters" in cell.get("metadata", {}).get("tags", ()):
            source = "".join(cell["source"])
            for name, value in values.items():
                pattern = rf"(?m)^({re.escape(name)}[ \t]*=[ \t]*)[^#\n]*?([ \t]*(?:#.*)?)$"
                literal = repr_double(value).replace("\\", r"\\")
                source, count = re.subn(pattern, rf"\g<1>{literal}\g<2>", source)
                if count != 1:
                    raise ReproduceError(
                        f"The cell tagged `parameters` assigns {name} {count} times, expected once."
                    )
            cell["source"] = source.splitlines(keepends=True)
            return notebook
    raise ReproduceError(
        "The notebook has no cell tagged `parameters`: tag the one that sets profile and retrain."
    )


def repr_double(value: object) -> str:
    """`value` as Python source, text in double quotes as everywhere in this repository."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def without_traces(notebook: dict) -> dict:
    """A copy of `notebook` without what the runner leaves in it.

    That is: paths of this machine, times of day, empty tags, and the state of progress bars that no
    output shows any more.
    """
    notebook = json.loads(json.dumps(notebook))
    for key in ("papermill", "widgets"):
        notebook["metadata"].pop(key, None)
    for cell in notebook["cells"]:
        for key in ("papermill", "execution"):
            cell["metadata"].pop(key, None)
        if not cell["metadata"].get("tags", True):
            del cell["metadata"]["tags"]
    return notebook


def first_error(notebook: dict) -> str | None:
    """`cell 7: UserError: …` for the first cell that raised, or None."""
    number = 0
    for cell in notebook["cells"]:
        number += cell["cell_type"] == "code"
        for output in cell.get("outputs", ()):
            if output["output_type"] == "error":
                return f"code cell {number}: {output['ename']}: {output['evalue']}".strip()
    return None


def where_to_look(root: Path, files: Sequence[Path]) -> list[str]:
    """Three lines that say where a run left what a reader wants to see."""
    notebooks = sum(file.suffix == ".ipynb" for file in files)
    return [
        f"notebooks with their outputs ({notebooks}): {root / 'models'} and {root / 'dataset'}; "
        "results.ipynb compares all models",
        f"figures and records: {root / 'assets'}, a folder a model",
        f"all of it, {len(files):,} files: {root}",
    ]


def written_files(root: Path, since: float) -> list[Path]:
    """What a run wrote under `root`.

    Everything in a folder of runs/; in the repository itself what changed at `since` (seconds of
    the epoch) or later.
    """
    if root == ROOT:
        places = [
            ROOT / name for name in ("assets", "checkpoints", "dataset", "models", "README.md")
        ]
        return [
            file
            for place in places
            for file in visible_files(place)
            if file.stat().st_mtime >= since
        ]
    return visible_files(root)


def visible_files(place: Path) -> list[Path]:
    """The file `place`, or all files under the folder, but those with a dot before a name."""
    files = [place] if place.is_file() else place.rglob("*")
    return [
        file
        for file in files
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(place.parent).parts)
    ]


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- Processes ------------------------------------------------------------------------------------


#: Set when all processes are to end, because one of them failed or the user stopped them.
STOP = threading.Event()


#: Seconds after which a step that runs says so again.
SILENT = 12


class ProgressLine:
    """Tells on standard output that some work runs, how far it is, and at its end how long it took.

    On a terminal it is one line that counts the seconds; elsewhere it says every `SILENT` seconds
    that it runs. Where other work runs at the same time (`alone` is False) the start and the end
    are lines of their own.
    """

    def __init__(self, text: str, alone: bool = True) -> None:
        self.text, self.start, self.alone = text, time.monotonic(), alone
        self.said = self.start
        self.live = alone and sys.stdout.isatty()
        self.open = alone  # whether the cursor stands at the end of the line that was begun
        if alone:
            print(f"{text} … ", end="", flush=True)
        else:
            print(f"{text} starts", flush=True)

    def seconds(self) -> str:
        """The time since the start, as text."""
        passed = time.monotonic() - self.start
        return f"{passed:.0f} s" if passed < 600 else f"{passed / 60:.0f} min"

    def tick(self, detail: Callable[[], str] = str) -> None:
        """Shows the time, and what `detail` says of how far the step is, where it was silent for
        long; on a terminal always."""
        if not self.live and time.monotonic() - self.said < SILENT:
            return
        self.said = time.monotonic()
        words = ", ".join(filter(None, (detail(), self.seconds())))
        if self.live:
            print(f"\r{self.text} … {words} \033[K", end="", flush=True)
        else:
            print(("\n" if self.open else "") + f"    {self.text}: {words}", flush=True)
            self.open = False

    def done(self, word: str = "") -> None:
        """Ends the line; `word` says how the work ended where it was no success."""
        start = "" if self.open and not self.live else f"{self.text} … "
        if self.live:
            start = f"\r{start}\033[K"
        print(f"{start}{word}{' after ' if word else ''}{self.seconds()}", flush=True)


def run_module(
    python: Path,
    module: str,
    *arguments: str,
    line: ProgressLine | None = None,
    environment: dict[str, str] | None = None,
    detail: Callable[[], str] = str,
) -> subprocess.CompletedProcess:
    """Runs `python -m module arguments` from the root; it ends when this process does."""
    script = [str(ROOT / "reproduce.py"), "--as-module", str(os.getpid())]
    return run_quietly(
        [str(python), *script, module, *arguments],
        line=line,
        environment=environment,
        detail=detail,
    )


def run_quietly(
    command: Sequence[str],
    *,
    line: ProgressLine | None = None,
    environment: dict[str, str] | None = None,
    detail: Callable[[], str] = str,
) -> subprocess.CompletedProcess:
    """Runs a command from the root and returns its output, while `line` counts the seconds and
    shows what `detail` says of how far it is."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    try:
        while True:
            try:
                out, err = process.communicate(timeout=1)
                return subprocess.CompletedProcess(command, process.returncode, out, err)
            except subprocess.TimeoutExpired:
                if STOP.is_set():
                    raise KeyboardInterrupt from None
                if line:
                    line.tick(detail)
    except BaseException:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def as_module(arguments: list[str]) -> None:
    """Called in the process that `run_module` starts: runs the module, and ends with its parent.

    Without this, pip or a notebook would go on writing after `reproduce.py` was killed, at the same
    time as those of the next start.
    """
    parent, module, *rest = arguments
    threading.Thread(target=end_with, args=(int(parent),), daemon=True).start()
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def end_with(parent: int) -> None:
    """Waits until the process `parent` has ended, then ends this one."""
    if sys.platform == "win32":
        import _winapi

        with contextlib.suppress(OSError):  # the parent is gone already
            synchronize, infinite = 0x00100000, 0xFFFFFFFF
            _winapi.WaitForSingleObject(_winapi.OpenProcess(synchronize, False, parent), infinite)
    else:
        while os.getppid() == parent:
            time.sleep(0.5)
    os._exit(1)


def last_line(text: str) -> str:
    """The last line that is not empty, without the exception's type or pip's label."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return "it gave no reason"
    return re.sub(r"^(?:[\w.]*(?:Error|Exception)|ERROR): *", "", lines[-1])


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Holds the lock file `path`, waiting while another process holds it.

    The system releases the lock when the process that holds it ends, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if not try_lock(file.fileno()):
            print(
                f"Another reproduce.py is at work here ({path.name}); waiting for it to end.",
                flush=True,
            )
            while not try_lock(file.fileno()):
                time.sleep(0.5)
        yield


def try_lock(descriptor: int) -> bool:
    """Whether this process holds the lock on an open file now; never waits."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True  # a file system without locks: better to go on than to wait for ever
    return True


# --- The environment ------------------------------------------------------------------------------


def pyproject() -> dict:
    """The content of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def no_deps_pins() -> list[str]:
    """Packages that pyproject.toml says are installed second, without dependencies."""
    return pyproject()["tool"]["alzheimer"]["no_deps"]


def fingerprint(requirements: str, python_version: str, no_deps: Sequence[str]) -> str:
    """SHA-256 of what decides which packages an environment holds.

    The ends of lines do not count: Git may change them.
    """
    content = json.dumps([requirements.splitlines(), python_version, list(no_deps)])
    return hashlib.sha256(content.encode()).hexdigest()


def venv_python(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def probe(venv: Path) -> dict | None:
    """Version and package folders of a virtual environment's Python.

    Returns:
        {"version": "3.12", "folders": [...]}, or None where the interpreter does not run.
    """
    code = (
        "import json, sys, sysconfig; print(json.dumps({'version': '%d.%d' % sys.version_info[:2], "
        "'folders': sorted({sysconfig.get_path('purelib'), sysconfig.get_path('platlib')})}))"
    )
    try:
        answer = subprocess.run(
            [str(venv_python(venv)), "-I", "-c", code], capture_output=True, text=True, timeout=60
        )
        return json.loads(answer.stdout) if answer.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def is_complete(venv: Path, wanted: str) -> bool:
    """Whether everything with the fingerprint `wanted` was installed into an environment."""
    try:
        return json.loads((venv / MARKER).read_text(encoding="utf-8"))["fingerprint"] == wanted
    except (OSError, ValueError, KeyError, TypeError):
        return False


def drop_half_installed(folders: Sequence[str]) -> list[str]:
    """Makes pip install again what a kill left in the middle; returns the names of those packages.

    pip takes a package for installed once its metadata can be read, but writes INSTALLER only after
    the last of its files. A name that begins with `~` is a package that pip was about to replace.
    """
    dropped = []
    for folder in map(Path, folders):
        for entry in folder.glob("*.dist-info"):
            if not (entry / "INSTALLER").is_file():
                shutil.rmtree(entry)
                dropped.append(entry.name.split("-")[0])
        for entry in folder.glob("~*"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return dropped


def unexpected_conflicts(pip_check: str, no_deps: Sequence[str]) -> list[str]:
    """Lines of `pip check`, less the accepted ones: a package of `no_deps` pins an old requests."""
    names = "|".join(re.escape(pin.split("==")[0]) for pin in no_deps)
    accepted = re.compile(
        rf"(?:{names}) \S+ has requirement requests\b|No broken requirements found"
    )
    return [line for line in pip_check.splitlines() if line.strip() and not accepted.match(line)]


def make_environment(venv: Path = VENV) -> Path:
    """Makes a virtual environment with every pinned package, or finishes it; where it is complete,
    does nothing. Returns its interpreter.

    Raises:
        ReproduceError: it cannot be made.
    """
    with one_at_a_time(venv.with_name(f"{venv.name}-lock")):
        state = probe(venv)
        if state is None:
            state = make_venv(venv)
        if tuple(map(int, state["version"].split("."))) < (3, 11):
            raise ReproduceError(
                f"{venv} holds Python {state['version']} and 3.11 or newer is needed: delete that "
                "folder and run the same command again."
            )
        wanted = fingerprint(
            REQUIREMENTS.read_text(encoding="utf-8"), state["version"], no_deps_pins()
        )
        if not is_complete(venv, wanted):
            (venv / MARKER).unlink(missing_ok=True)
            install(venv, state["folders"])
            write_atomically(
                venv / MARKER,
                json.dumps({"fingerprint": wanted, "python": state["version"]}) + "\n",
            )
    return venv_python(venv)


def make_venv(venv: Path) -> dict:
    """Makes the virtual environment from nothing, in place of what lies there.

    Returns:
        What `probe` says of it.

    Raises:
        ReproduceError: it cannot be made.
    """
    if venv.exists() and not venv.is_dir():
        raise ReproduceError(
            f"{venv} is a file, and that is where the environment goes: move it away."
        )
    if sys.version_info[:2] > NEWEST_TESTED:
        version = ".".join(map(str, sys.version_info[:2]))
        print(
            f"Note: Python {version} is newer than those that this study is tested with, "
            "3.11 to 3.13."
        )
    made = run_quietly([sys.executable, "-m", "venv", "--clear", str(venv)])
    state = probe(venv) if made.returncode == 0 else None
    if state is None:
        reason = last_line(made.stderr or made.stdout)
        raise ReproduceError(
            f"Python could not make {venv} ({reason}): on Debian and Ubuntu first run "
            "`sudo apt install python3-venv`, then the same command again."
        )
    return state


def install(venv: Path, folders: Sequence[str]) -> None:
    """Installs every pinned package into a virtual environment whose package folders are given.

    Raises:
        ReproduceError: pip failed, or the packages do not fit each other.
    """
    python, no_deps, environment = venv_python(venv), no_deps_pins(), venv_environment(venv)
    again = f"delete {venv} and run the same command again"
    drop_half_installed(folders)
    if run_module(python, "pip", "--version", environment=environment).returncode:
        ready = run_module(python, "ensurepip", "--upgrade", environment=environment)
        if ready.returncode:
            raise ReproduceError(f"pip cannot be installed ({last_line(ready.stderr)}): {again}.")
    line = ProgressLine(
        f"Installing env/requirements.txt into {venv.name} (once; some minutes and 2 to 7 GB)"
    )
    for what in (["-r", str(REQUIREMENTS)], ["--no-deps", *no_deps]):
        result = run_module(
            python,
            "pip",
            "install",
            "--quiet",
            "--no-input",
            "--no-user",
            "--no-compile",
            "--disable-pip-version-check",
            *what,
            line=line,
            environment=environment,
        )
        if result.returncode:
            line.done("failed")
            raise ReproduceError(
                f"pip could not install {what[-1]} ({pip_error(result.stderr)}): check the network "
                "and the disk and run the same command again; it goes on where it stopped."
            )
    check = run_module(
        python, "pip", "--disable-pip-version-check", "check", line=line, environment=environment
    )
    if conflicts := unexpected_conflicts(check.stdout, no_deps):
        line.done("failed")
        raise ReproduceError(
            f"The installed packages do not fit each other ({conflicts[0]}): {again}."
        )
    line.done()


def pip_error(text: str) -> str:
    """The first error in what pip printed, without its label."""
    errors = [line for line in text.splitlines() if line.startswith("ERROR:")]
    return last_line(errors[0] if errors else text)


def venv_environment(venv: Path) -> dict[str, str]:
    """This process's environment variables, changed to those of a virtual environment.

    What would bring in another Python's packages is left out. Compiled modules are kept inside the
    environment whatever the machine's setting is: every notebook is a process of its own, and
    compiling PyTorch's modules again takes each of them five seconds.
    """
    dropped = ("PYTHONHOME", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "__PYVENV_LAUNCHER__")
    return {
        **{name: value for name, value in os.environ.items() if name not in dropped},
        "VIRTUAL_ENV": str(venv),
        "PYTHONNOUSERSITE": "1",
        "PYTHONPYCACHEPREFIX": str(venv / "pycache"),
        "PYTHONUTF8": "1",
        "PATH": os.pathsep.join([str(venv_python(venv).parent), os.environ.get("PATH", "")]),
    }


def check_current_environment() -> Path:
    """This interpreter, if it has what the study imports.

    Raises:
        ReproduceError: naming what it lacks.
    """
    wanted = (*pyproject()["project"]["dependencies"], *no_deps_pins())
    names = [re.findall(r"[\w.-]+", requirement)[0] for requirement in wanted]
    if missing := [name for name in names if not is_installed(name)]:
        raise ReproduceError(
            f"{sys.executable} lacks {', '.join(missing)}: activate the study's environment, or "
            "leave out --no-venv and one is made."
        )
    return Path(sys.executable)


def is_installed(name: str) -> bool:
    """Whether this interpreter has a package, by its name in the package index."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# --- The run --------------------------------------------------------------------------------------


def open_workspace(python: Path, environment: dict[str, str], profile: str) -> tuple[str, Path]:
    """Has the library find the raw images and prepare them where they are not prepared yet.

    Returns:
        (absolute path of the raw images, "" where there are none; where results of this profile and
        of these images go).

    Raises:
        ReproduceError: the images cannot be read, or show no patients.
    """
    code = (
        "import json, sys; from utils.pipeline.workspace import open_workspace; "
        "found = open_workspace(sys.argv[1]); raw = found.data == 'real' and found.raw.resolve(); "
        "print('workspace=' + json.dumps([str(raw or ''), str(found.root.resolve())]))"
    )
    line = ProgressLine("Finding the images and the patients in them")
    answer = run_quietly([str(python), "-c", code, profile], environment=environment, line=line)
    line.done("failed" if answer.returncode else "")
    if answer.returncode:
        raise ReproduceError(last_line(answer.stderr))
    # Before it the library prints what it found.
    found = [text for text in answer.stdout.splitlines() if text.startswith("workspace=")]
    raw, root = json.loads(found[-1].removeprefix("workspace="))
    return raw, Path(root)


def run_notebook(
    python: Path,
    notebook: str,
    root: Path,
    runs: Path,
    values: dict[str, object],
    environment: dict[str, str],
    start: Callable[[], ProgressLine],
    kernel: str = "python3",
) -> None:
    """Executes a notebook in its own folder and puts the result under `root`.

    Args:
        python: the interpreter of its kernel.
        notebook: its path in the repository.
        root: of the results, the repository itself or `runs`.
        runs: the folder of this profile and data under runs/, for the notebook while it runs and,
            under `failed`, for the outputs of one whose cell failed.
        values: parameters, by name.
        environment: variables of its process.
        start: called at the beginning, for the line that shows its progress.
        kernel: the name of the kernel that runs it.

    Raises:
        ReproduceError: a cell failed, with its error.
    """
    line, source = start(), set_parameters(read_notebook(ROOT / notebook), values)
    name = Path(notebook).name
    before, after = runs / SCRATCH / f"in-{name}", runs / SCRATCH / name
    write_atomically(before, json.dumps(source))
    after.unlink(missing_ok=True)
    result = run_module(
        python,
        "papermill",
        str(before),
        str(after),
        "--kernel",
        kernel,
        "--no-progress-bar",
        "--no-log-output",
        "--autosave-cell-every",
        "5",
        "--cwd",
        str((ROOT / notebook).parent),
        line=line,
        environment=environment,
        detail=lambda: how_far(after),
    )
    executed = source
    # It may have ended before it wrote, or while it wrote.
    with contextlib.suppress(OSError, ReproduceError):
        executed = without_traces(read_notebook(after))
    failed = runs / "failed" / notebook
    # A reader who opens the result in Colab wants to see these outputs, not to spend hours on them.
    executed = set_parameters(
        executed, {name: False for name in ("retrain", "run_missing") if name in values}
    )
    text = json.dumps(executed, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    write_atomically(failed if result.returncode else root / notebook, text)
    if result.returncode:
        line.done("failed")
        reason = (
            first_error(executed)
            or f"{last_line(result.stderr)} (no cell raised: often a lack of memory)"
        )
        raise ReproduceError(f"{notebook} failed: {reason}\nWhat it did so far: {failed}")
    failed.unlink(missing_ok=True)
    line.done()


def how_far(executing: Path) -> str:
    """Which cell of a notebook runs, of how many, and under which heading, from the copy that
    papermill keeps of it: `cell 7 of 12, Attack`. Empty where that says nothing yet."""
    try:
        cells = json.loads(executing.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        return ""  # it is not there yet, or is being written
    heading, number, count, found = "", 0, 0, ""
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and source.startswith("## "):
            heading = source[3:].split("\n")[0]
        if cell["cell_type"] == "code":
            count += 1
            if not found:
                number = count
                status = cell.get("metadata", {}).get("papermill", {}).get("status")
                if status != "completed":
                    found = heading or "set-up"
    return f"cell {number} of {count}, {found}" if found else ""


def read_notebook(path: Path) -> dict:
    """A notebook's JSON.

    Raises:
        ReproduceError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        sentence = f"{path} is not a notebook ({error}): get it back with `git checkout -- {path}`."
        raise ReproduceError(sentence) from error


def demo_workers() -> int:
    """How many notebooks of a demo, or files of tests, run at a time.

    Each on one thread (`ONE_THREAD`).
    """
    return max(1, min(4, os.cpu_count() or 1))


def needs_of(notebooks: Sequence[str], profile: str) -> dict[str, set[str]]:
    """Notebook → those that must have ended before it begins, all before it except in a demo."""
    if profile == "demo":
        return {notebook: DEMO_NEEDS[notebook] & set(notebooks) for notebook in notebooks}
    return {notebook: set(notebooks[:number]) for number, notebook in enumerate(notebooks)}


def runs_alone(notebook: str, needs: dict[str, set[str]]) -> bool:
    """Whether no other notebook can run at the same time."""
    return all(
        other == notebook or other in needs[notebook] or notebook in needs[other] for other in needs
    )


def run_when_ready(tasks: Mapping[str, Callable[[], None]], needs: dict[str, set[str]]) -> None:
    """Runs the tasks, `demo_workers()` at a time; the first error ends the others and is raised.

    Args:
        tasks: by name, in the order in which those that may begin do.
        needs: the tasks that must have ended before one begins.
    """
    waiting = dict(tasks)
    running: dict[concurrent.futures.Future, str] = {}
    ended: set[str] = set()
    with concurrent.futures.ThreadPoolExecutor(demo_workers()) as pool:
        try:
            while waiting or running:
                ready = [name for name in waiting if needs[name] <= ended]
                running |= {pool.submit(waiting.pop(name)): name for name in ready}
                done, _ = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    future.result()
                    ended.add(running.pop(future))
        except BaseException:
            STOP.set()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            STOP.clear()


def run_workspace(python: Path, options: argparse.Namespace, environment: dict[str, str]) -> None:
    """Runs the notebooks that the options ask for, prints the results and lists what was written.

    Raises:
        ReproduceError: the raw images cannot be read, or a notebook failed.
    """
    start = time.time()
    # The environment's own kernel, before any other of the name python3 on this machine.
    kernels = (Path(sys.prefix) if options.no_venv else VENV) / "share" / "jupyter"
    environment = {**environment, "ALZHEIMER_QUIET": "1", "JUPYTER_PATH": str(kernels)}
    demo = options.profile == "demo"
    environment = {**ONE_THREAD, **environment} if demo else environment
    lock = runs_folder() / f".{options.profile}.lock"
    sys.path.insert(0, str(ROOT))  # it is not there where Python was started with -I
    from utils.kernel_server import preloaded_kernels

    with contextlib.ExitStack() as until_the_end:
        until_the_end.enter_context(one_at_a_time(lock))
        kernel, environment = until_the_end.enter_context(
            preloaded_kernels(python, ROOT, environment, demo)
        )
        raw, root = open_workspace(python, environment, options.profile)
        # Asked once and handed on, so that all notebooks agree and none waits for a download again.
        environment |= {"ALZHEIMER_RAW": raw} if raw else {"ALZHEIMER_OFFLINE": "1"}
        drawn = "no raw images found: a drawn cohort that shows the machinery and is no result"
        print(f"data: {'real' if raw else 'phantom'} ({raw or drawn})")
        runs = root if root != ROOT else runs_folder() / f"{options.profile}-real"
        notebooks = choose_notebooks(options.only, present_notebooks())
        values = {"profile": options.profile, "retrain": options.retrain}
        needs = needs_of(notebooks, options.profile)
        tasks = {}
        for number, notebook in enumerate(notebooks, 1):
            more = {"run_missing": True} if notebook in MODEL_NOTEBOOKS else {}
            text = f"[{number}/{len(notebooks)}] {notebook}"
            line = functools.partial(ProgressLine, text, runs_alone(notebook, needs))
            given = (root, runs, values | more, environment, line, kernel)
            tasks[notebook] = functools.partial(run_notebook, python, notebook, *given)
        run_when_ready(tasks, needs)
        shutil.rmtree(runs / SCRATCH, ignore_errors=True)
        print()
        report(python, environment, "table", "--root", str(root))
        if root == ROOT:
            report(python, environment, "readme")
        files = written_files(root, start)
        print("", *where_to_look(root, files), sep="\n")


def report(python: Path, environment: dict[str, str], *arguments: str) -> None:
    """Runs `python -m utils.report arguments` and prints what it says.

    Raises:
        ReproduceError: it failed.
    """
    result = run_module(python, "utils.report", *arguments, environment=environment)
    print(result.stdout.rstrip())
    if result.returncode:
        raise ReproduceError(
            f"`python -m utils.report {arguments[0]}` failed: {last_line(result.stderr)}"
        )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line's options; ends the process with a message where they make no sense."""
    parser = argparse.ArgumentParser(
        prog="reproduce.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "command",
        nargs="?",
        choices=("figures",),
        help="make figures and tables from the committed records",
    )
    add(
        "--profile",
        choices=PROFILES,
        default="demo",
        help="budgets: minutes, hours, or a GPU (default: demo)",
    )
    add(
        "--only",
        action="append",
        default=[],
        metavar="NOTEBOOK",
        help="run this notebook alone; may be repeated",
    )
    add(
        "--raw",
        metavar="PATH",
        help="folder or zip of the raw images (default: found as README says)",
    )
    add(
        "--retrain",
        action="store_true",
        help="train and attack again where a record is there already",
    )
    add("--test", action="store_true", help="run the tests instead of the notebooks")
    add(
        "--no-venv",
        action="store_true",
        help="use this interpreter (a conda environment, for example)",
    )
    # argparse would take what follows -- for positional arguments.
    cut = list(arguments).index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:cut])
    if "--" in arguments and not options.test:
        parser.error("what follows -- goes to pytest, so it needs --test")
    if options.test and (options.command or options.only or options.retrain):
        parser.error("--test runs the tests alone: leave out figures, --only and --retrain")
    if options.command and (options.only or options.retrain or options.raw):
        parser.error(
            "figures reads the committed records alone: leave out --only, --retrain and --raw"
        )
    options.pytest_arguments = list(arguments[cut + 1 :])
    return options


def raw_choice(option: str | None) -> str | None:
    """What --raw or ALZHEIMER_RAW names, as an absolute path: notebooks run in their own folders.

    Raises:
        ReproduceError: there is nothing at that path.
    """
    raw = option or os.environ.get("ALZHEIMER_RAW") or None
    if raw is None:
        return None
    path = Path(raw).expanduser().resolve()
    if not path.exists():
        asked = "--raw" if option else "ALZHEIMER_RAW"
        raise ReproduceError(
            f"{asked} names {path}, which does not exist: give the folder or the zip of the raw "
            "images, or leave it out."
        )
    return str(path)


def run_tests(python: Path, arguments: list[str], environment: dict[str, str]) -> int:
    """Runs pytest, by default on all tests and several files at a time; returns its exit status."""
    if not arguments:
        arguments = ["-n", str(demo_workers()), "--dist", "loadfile"]
        environment = {**ONE_THREAD, **environment}
    return subprocess.call([str(python), "-m", "pytest", *arguments], cwd=ROOT, env=environment)


def run(options: argparse.Namespace) -> int:
    """Does what the options ask for; returns the exit status.

    Raises:
        ReproduceError: in one sentence, what went wrong and what to do.
    """
    raw = raw_choice(options.raw) if options.command is None else None
    if not options.test and options.command is None:
        # A mistake in --only is reported now and not after installing.
        choose_notebooks(options.only, present_notebooks())
    python = check_current_environment() if options.no_venv else make_environment()
    environment = {**os.environ, "PYTHONUTF8": "1"} if options.no_venv else venv_environment(VENV)
    environment |= {"ALZHEIMER_RAW": raw} if raw else {}
    if options.test:
        return run_tests(python, options.pytest_arguments, environment)
    if options.command == "figures":
        report(python, environment, "figures")
        report(python, environment, "readme")
    else:
        run_workspace(python, options, environment)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # and not one that a notebook or test put there
            stream.reconfigure(errors="replace")
    try:
        return run(parse(arguments))
    except ReproduceError as error:
        print(f"\nreproduce.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from here.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-module"]:
        as_module(sys.argv[2:])
    else:
        sys.exit(main(sys.argv[1:]))
