"""reproduce.py: what it runs, where it writes, and that it goes on after a kill at any moment."""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import reproduce
from reproduce import NOTEBOOKS, PREPARE, ReproduceError

SCRIPT = str(Path(reproduce.__file__))
#: A cell that assigns the parameters.
PARAMETERS = 'profile = "demo"\nretrain = False'


def start(*arguments: str, **options: object) -> subprocess.CompletedProcess:
    """Runs reproduce.py with these arguments."""
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        **options,
    )


def notebook(*sources: str, tagged: int | None = 0) -> dict:
    """A notebook of these code cells, one of which has the tag `parameters`."""
    empty = {"cell_type": "code", "execution_count": None, "outputs": []}
    cells = [
        {**empty, "metadata": {}, "source": source, "id": f"c{number}"}
        for number, source in enumerate(sources)
    ]
    if tagged is not None:
        cells[tagged]["metadata"]["tags"] = ["parameters"]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


# --- What runs, in which order, and where it writes ---


def test_preparation_comes_first_and_results_last():
    order = reproduce.choose_notebooks([], set(NOTEBOOKS))
    assert order[0] == PREPARE and order[-1] == "models/results.ipynb"
    assert {Path(path).stem for path in order} >= {
        "Dinov2",
        "Dinov2_atk",
        "Efficientnet",
        "Efficientnet_atk",
        "Resnet",
        "Resnet_atk",
    }


def test_notebooks_that_a_clone_lacks_are_skipped_only_where_they_may():
    present = set(NOTEBOOKS) - reproduce.OPTIONAL
    assert not set(reproduce.choose_notebooks([], present)) & reproduce.OPTIONAL
    with pytest.raises(ReproduceError, match="models/Resnet.ipynb"):
        reproduce.choose_notebooks([], present - {"models/Resnet.ipynb"})


def test_only_keeps_the_order():
    present = set(NOTEBOOKS)
    assert reproduce.choose_notebooks(["results", "Resnet_atk"], present) == [
        "models/Resnet_atk.ipynb",
        "models/results.ipynb",
    ]
    with pytest.raises(ReproduceError, match="Restnet.*Resnet_atk"):
        reproduce.choose_notebooks(["Restnet"], present)


# --- Notebooks ---


def test_parameters_are_set_where_the_reader_sees_them():
    source = notebook('profile = "demo"  # or "cpu"\nraw = ""\nretrain = False', 'profile = "x"')
    changed = reproduce.set_parameters(source, {"profile": "cpu", "retrain": True})
    assert (
        "".join(changed["cells"][0]["source"])
        == 'profile = "cpu"  # or "cpu"\nraw = ""\nretrain = True'
    )
    assert changed["cells"][1]["source"] == 'profile = "x"'
    assert source["cells"][0]["source"].startswith('profile = "demo"')


@pytest.mark.parametrize("source", ["retrain = False", 'profile = "a"\nprofile = "b"'])
def test_a_parameter_that_is_not_assigned_once_is_an_error(source):
    with pytest.raises(ReproduceError, match="profile"):
        reproduce.set_parameters(notebook(source), {"profile": "cpu"})


def test_a_notebook_without_parameters_is_an_error():
    with pytest.raises(ReproduceError, match="tagged `parameters`"):
        reproduce.set_parameters(notebook('profile = "demo"', tagged=None), {"profile": "cpu"})


def test_an_executed_notebook_keeps_no_trace_of_this_machine():
    executed = notebook('profile = "demo"', "1 + 1")
    executed["metadata"] |= {
        "papermill": {"input_path": "/home/someone/in.ipynb"},
        "widgets": {"state": "of a progress bar that is gone"},
    }
    executed["cells"][1]["metadata"] = {
        "papermill": {"duration": 1.0},
        "execution": {"idle": "now"},
        "tags": [],
    }
    assert reproduce.without_traces(executed) == notebook('profile = "demo"', "1 + 1")


def test_the_failing_cell_is_named():
    failed = notebook("1", "raise")
    failed["cells"].insert(0, {"cell_type": "markdown", "metadata": {}, "source": "# Title"})
    assert reproduce.first_error(failed) is None
    failed["cells"][2]["outputs"] = [
        {"output_type": "error", "ename": "UserError", "evalue": "No data."}
    ]
    assert reproduce.first_error(failed) == "code cell 2: UserError: No data."


def run_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *sources: str) -> Path:
    """Has `reproduce.run_notebook` run a notebook of these cells; returns where it wrote."""
    repository, runs = tmp_path / "repository", tmp_path / "runs" / "demo-phantom"
    (repository / "models").mkdir(parents=True)
    (repository / "models" / "Resnet.ipynb").write_text(
        json.dumps(notebook(*sources)), encoding="utf-8"
    )
    shutil.copy(SCRIPT, repository)
    monkeypatch.setattr(reproduce, "ROOT", repository)
    reproduce.run_notebook(
        Path(sys.executable),
        "models/Resnet.ipynb",
        runs,
        runs,
        {"profile": "cpu", "retrain": True},
        dict(os.environ),
        lambda: reproduce.ProgressLine("models/Resnet.ipynb"),
    )
    return runs


def test_a_notebook_runs_in_its_own_folder_with_this_interpreter(tmp_path, monkeypatch, capsys):
    runs = run_one(
        tmp_path,
        monkeypatch,
        PARAMETERS,
        "import os, sys\nprint(os.getcwd(), sys.prefix, profile, retrain, sep='\\n')",
    )
    executed = json.loads((runs / "models" / "Resnet.ipynb").read_text(encoding="utf-8"))
    folder, prefix, profile, retrain = "".join(executed["cells"][1]["outputs"][0]["text"]).split(
        "\n"
    )[:4]
    assert (Path(folder), prefix, profile, retrain) == (
        tmp_path / "repository" / "models",
        sys.prefix,
        "cpu",
        "True",
    )
    shown = "".join(executed["cells"][0]["source"])
    assert shown == 'profile = "cpu"\nretrain = False', "a reader must not retrain unasked"
    assert str(tmp_path) not in json.dumps(
        [executed["metadata"], [cell["metadata"] for cell in executed["cells"]]]
    )
    assert capsys.readouterr().out.startswith("models/Resnet.ipynb … ")


def test_a_failing_notebook_is_kept_apart_with_its_error(tmp_path, monkeypatch):
    with pytest.raises(
        ReproduceError, match=r"models/Resnet.ipynb failed: code cell 3: ValueError: broken"
    ):
        run_one(tmp_path, monkeypatch, PARAMETERS, "print('so far')", "raise ValueError('broken')")
    runs = tmp_path / "runs" / "demo-phantom"
    assert not (runs / "models" / "Resnet.ipynb").exists()
    assert "so far" in (runs / "failed" / "models" / "Resnet.ipynb").read_text(encoding="utf-8")


# --- The environment survives a kill at any moment ---


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose environment is made in a moment.

    In place of making and installing, files in `calls` say that they were called.
    """
    (tmp_path / "requirements.txt").write_text("timm==1.0\n", encoding="utf-8")
    monkeypatch.setattr(reproduce, "REQUIREMENTS", tmp_path / "requirements.txt")
    (tmp_path / "calls").mkdir()

    def make_venv(venv: Path) -> dict:
        python = reproduce.venv_python(venv)
        python.parent.mkdir(parents=True)
        python.touch()
        note("make")
        return state(venv)

    def state(venv: Path) -> dict | None:
        return (
            {"version": "3.12", "folders": [str(venv)]}
            if reproduce.venv_python(venv).exists()
            else None
        )

    def note(what: str) -> None:
        (tmp_path / "calls" / f"{len(list((tmp_path / 'calls').iterdir()))}-{what}").touch()

    monkeypatch.setattr(reproduce, "make_venv", make_venv)
    monkeypatch.setattr(reproduce, "probe", state)
    monkeypatch.setattr(reproduce, "install", lambda venv, folders: note("install"))
    return tmp_path


def calls(folder: Path) -> list[str]:
    return [path.name.split("-")[1] for path in sorted((folder / "calls").iterdir())]


def test_a_complete_environment_is_not_installed_again(bare):
    for _ in range(2):
        assert reproduce.make_environment(bare / ".venv") == reproduce.venv_python(bare / ".venv")
    assert calls(bare) == ["make", "install"]


def test_new_pins_are_installed_into_the_same_environment(bare):
    reproduce.make_environment(bare / ".venv")
    (bare / "requirements.txt").write_text("timm==1.1\n", encoding="utf-8")
    reproduce.make_environment(bare / ".venv")
    assert calls(bare) == ["make", "install", "install"]


def test_an_environment_whose_installation_was_killed_is_installed_again(bare, monkeypatch):
    real_install = reproduce.install

    def killed(venv, folders):
        raise KeyboardInterrupt

    reproduce.make_environment(bare / ".venv")
    (bare / "requirements.txt").write_text("timm==1.1\n", encoding="utf-8")
    monkeypatch.setattr(reproduce, "install", killed)
    with pytest.raises(KeyboardInterrupt):
        reproduce.make_environment(bare / ".venv")
    assert not (bare / ".venv" / reproduce.MARKER).exists()
    monkeypatch.setattr(reproduce, "install", real_install)
    reproduce.make_environment(bare / ".venv")
    assert calls(bare) == ["make", "install", "install"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"fingerprint": "other"}'])
def test_a_marker_that_does_not_fit_counts_for_nothing(tmp_path, content):
    (tmp_path / reproduce.MARKER).write_text(content)
    assert not reproduce.is_complete(tmp_path, "wanted")


def test_the_fingerprint_follows_pins_python_and_torchattacks_but_not_line_ends():
    one = reproduce.fingerprint("timm==1.0\nnumpy==2\n", "3.12", ["torchattacks==3.5.1"])
    assert one == reproduce.fingerprint(
        "timm==1.0\r\nnumpy==2\r\n", "3.12", ["torchattacks==3.5.1"]
    )
    others = {
        reproduce.fingerprint("timm==1.1\nnumpy==2\n", "3.12", ["torchattacks==3.5.1"]),
        reproduce.fingerprint("timm==1.0\nnumpy==2\n", "3.13", ["torchattacks==3.5.1"]),
        reproduce.fingerprint("timm==1.0\nnumpy==2\n", "3.12", ["torchattacks==3.5.2"]),
    }
    assert len(others | {one}) == 4


def test_a_half_made_virtual_environment_is_made_anew(tmp_path):
    venv = tmp_path / ".venv"
    python = reproduce.venv_python(venv)
    python.parent.mkdir(parents=True)
    python.write_bytes(b"")
    (venv / "old file").touch()
    assert reproduce.probe(venv) is None
    state = reproduce.make_venv(venv)
    assert state == reproduce.probe(venv) and not (venv / "old file").exists()
    assert state["version"] == "{}.{}".format(*sys.version_info)
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


def test_a_package_that_a_kill_left_half_installed_is_installed_again(tmp_path):
    for name, complete in (("whole-1.0", True), ("half-1.0", False)):
        (tmp_path / f"{name}.dist-info").mkdir()
        (tmp_path / f"{name}.dist-info" / "METADATA").touch()
        if complete:
            (tmp_path / f"{name}.dist-info" / "INSTALLER").write_text("pip")
    (tmp_path / "~alf").mkdir()
    assert reproduce.drop_half_installed([str(tmp_path)]) == ["half"]
    assert [path.name for path in tmp_path.iterdir()] == ["whole-1.0.dist-info"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "marker"
    reproduce.write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        reproduce.write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_it_started_ends_when_it_is_killed(tmp_path):
    """Otherwise pip or a notebook would write at the same time as those of the next start."""
    (tmp_path / "beats.py").write_text(
        "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\n"
        "while True:\n    pathlib.Path('beat').touch()\n    time.sleep(0.1)\n"
    )
    code = (
        f"import reproduce, sys, pathlib; reproduce.ROOT = pathlib.Path({str(tmp_path)!r}); "
        "reproduce.run_module(pathlib.Path(sys.executable), 'beats')"
    )
    shutil.copy(SCRIPT, tmp_path)
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=reproduce.ROOT)
    beat = tmp_path / "beat"
    wait_for(beat.exists)
    parent.kill()
    parent.wait()
    wait_for(lambda: time.time() - beat.stat().st_mtime > 1)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Waits until the condition holds; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def test_two_do_not_work_in_the_same_place_at_once(tmp_path):
    code = (
        "import reproduce, pathlib\n"
        f"with reproduce.one_at_a_time(pathlib.Path({str(tmp_path / 'lock')!r})): print('in')"
    )
    with reproduce.one_at_a_time(tmp_path / "lock"):
        second = subprocess.Popen(
            [sys.executable, "-c", code], cwd=reproduce.ROOT, stdout=subprocess.PIPE, text=True
        )
        assert "waiting" in second.stdout.readline()
        assert second.poll() is None
    assert second.communicate(timeout=20)[0] == "in\n"


# --- Errors and help ---


def test_help_needs_no_environment_and_shows_both_commands():
    answer = start("--help")
    assert answer.returncode == 0
    for text in (
        "reproduce.py --test",
        "--profile",
        "--only",
        "figures",
        "--raw",
        "--retrain",
        "--no-venv",
    ):
        assert text in answer.stdout


def test_help_imports_the_standard_library_alone():
    answer = subprocess.run(
        [sys.executable, "-I", "-S", SCRIPT, "--help"], capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--profile", "big"],
        ["nonsense"],
        ["--", "-x"],
        ["--test", "--only", "Resnet"],
        ["figures", "--retrain"],
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.parse(arguments)
    assert stop.value.code == 2 and "reproduce.py: error: " in capsys.readouterr().err


def test_what_follows_two_dashes_goes_to_pytest():
    assert reproduce.parse(["--test", "--", "-k", "metrics", "--only"]).pytest_arguments == [
        "-k",
        "metrics",
        "--only",
    ]


@pytest.mark.parametrize(
    "arguments, environment",
    [(["--raw", "nowhere.zip"], {}), ([], {"ALZHEIMER_RAW": "nowhere.zip"})],
)
def test_raw_images_that_do_not_exist_are_one_sentence_before_anything_is_installed(
    tmp_path, arguments, environment
):
    answer = start(*arguments, cwd=tmp_path, env={**os.environ, **environment})
    assert answer.returncode == 1 and answer.stdout == ""
    assert (
        str(tmp_path.resolve() / "nowhere.zip") in answer.stderr
        and len(answer.stderr.strip().splitlines()) == 1
    )


def test_an_interpreter_without_the_packages_is_one_sentence(monkeypatch):
    monkeypatch.setattr(reproduce, "no_deps_pins", lambda: ["no-such-package==1.0"])
    with pytest.raises(ReproduceError, match="lacks no-such-package: "):
        reproduce.check_current_environment()


def test_an_old_python_is_one_sentence():
    code = (
        "import runpy, sys; sys.version_info = (3, 8, 1); "
        f"runpy.run_path({SCRIPT!r}, run_name='__main__')"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (
        answer.returncode == 1
        and "this is 3.8" in answer.stderr
        and len(answer.stderr.strip().splitlines()) == 1
    )


def test_an_old_python_can_read_the_file_as_far_as_its_error():
    import ast

    ast.parse(Path(SCRIPT).read_text(encoding="utf-8"), feature_version=(3, 8))


def test_a_failure_of_pip_is_reported_by_its_first_error():
    text = (
        "WARNING: Retrying\nERROR: Could not find a version of x\n"
        "ERROR: No matching distribution found for x\n"
    )
    assert reproduce.pip_error(text) == "Could not find a version of x"


def test_an_exception_is_reported_without_its_type():
    text = "Traceback\n  File\nutils.utils_funcs.UserError: No data.\n"
    assert reproduce.last_line(text) == "No data."


def test_what_was_written_is_said_in_three_lines(tmp_path):
    for name in (
        "assets/Resnet/slice.json",
        "assets/Resnet/patient.json",
        "models/a.ipynb",
        ".lock",
        ".scratch/b",
    ):
        reproduce.write_atomically(tmp_path / name, "x")
    files = reproduce.written_files(tmp_path, since=0)
    lines = reproduce.where_to_look(tmp_path, files)
    assert len(lines) == 3
    assert "outputs (1)" in lines[0]
    assert "3 files" in lines[2]


def papermill_copy(*cells: tuple[str, str, str]) -> str:
    return json.dumps(
        {
            "cells": [
                {
                    "cell_type": kind,
                    "source": [source],
                    "metadata": {"papermill": {"status": status}} if status else {},
                }
                for kind, source, status in cells
            ]
        }
    )


def test_a_notebook_says_which_cell_runs(tmp_path):
    path = tmp_path / "copy.ipynb"
    assert reproduce.how_far(path) == ""
    path.write_text('{"cells": [', encoding="utf-8")
    assert reproduce.how_far(path) == "", "it is being written"
    cells = [
        ("markdown", "# Title", ""),
        ("code", "import sys", "completed"),
        ("markdown", "## Attack\n\nText.", ""),
        ("code", "attack()", "running"),
        ("markdown", "## Record", ""),
        ("code", "save()", "pending"),
    ]
    path.write_text(papermill_copy(*cells), encoding="utf-8")
    assert reproduce.how_far(path) == "cell 2 of 3, Attack"
    done = [(kind, source, status and "completed") for kind, source, status in cells]
    path.write_text(papermill_copy(*done), encoding="utf-8")
    assert reproduce.how_far(path) == ""


def test_a_long_step_is_never_silent(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: now[0])
    line = reproduce.ProgressLine("step")
    for second in range(1, 31):
        now[0] = second
        line.tick(lambda: "cell 1 of 2, Data")
    line.done()
    assert capsys.readouterr().out == (
        "step … \n    step: cell 1 of 2, Data, 12 s\n    step: cell 1 of 2, Data, 24 s\n"
        "step … 30 s\n"
    )


def members_of_the_demo() -> set[str]:
    """The models that a demo's ensembles and sequence models are made of."""
    from utils.pipeline.members import DEMO_BACKBONES
    from utils.pipeline.scans import SOURCES

    sources = {name for source in SOURCES["demo"] for name in source}
    return sources | {f"{name}{regime}" for name in DEMO_BACKBONES for regime in ("", "_atk")}


def test_only_a_demo_runs_notebooks_side_by_side_and_none_with_what_it_needs():
    needs = reproduce.needs_of(reproduce.NOTEBOOKS, "demo")
    members = {f"models/{name}.ipynb" for name in members_of_the_demo()}
    assert members <= needs["models/ensemble.ipynb"]
    assert needs["models/results.ipynb"] == set(reproduce.NOTEBOOKS[:-1])
    assert all(reproduce.PREPARE in needs[path] for path in reproduce.NOTEBOOKS[1:])
    alone = [path for path in reproduce.NOTEBOOKS if reproduce.runs_alone(path, needs)]
    assert alone == [reproduce.NOTEBOOKS[0], reproduce.NOTEBOOKS[-1]]
    one_by_one = reproduce.needs_of(reproduce.NOTEBOOKS, "cpu")
    assert [len(before) for before in one_by_one.values()] == list(range(10))
    assert all(reproduce.runs_alone(path, one_by_one) for path in reproduce.NOTEBOOKS)


def test_a_chosen_notebook_waits_for_no_other_than_the_chosen():
    chosen = ["models/Resnet.ipynb", "models/ensemble.ipynb"]
    assert reproduce.needs_of(chosen, "demo") == {
        "models/Resnet.ipynb": set(),
        "models/ensemble.ipynb": {"models/Resnet.ipynb"},
    }


def test_work_begins_when_what_it_needs_has_ended(monkeypatch):
    monkeypatch.setattr(reproduce, "demo_workers", lambda: 2)
    order = []
    tasks = {name: functools.partial(order.append, name) for name in "dcba"}
    needs = {"a": set(), "b": {"a"}, "c": {"a", "b"}, "d": {"c"}}
    reproduce.run_when_ready(tasks, needs)
    assert order == ["a", "b", "c", "d"]


def test_work_that_runs_side_by_side_is_announced_and_reported_in_lines_of_its_own(capsys):
    line = reproduce.ProgressLine("[2/10] Resnet", alone=False)
    line.done()
    reproduce.ProgressLine("[3/10] Dinov2", alone=False).done("failed")
    assert capsys.readouterr().out.splitlines() == [
        "[2/10] Resnet starts",
        "[2/10] Resnet … 0 s",
        "[3/10] Dinov2 starts",
        "[3/10] Dinov2 … failed after 0 s",
    ]


def test_compiled_modules_are_kept_in_the_environment_whatever_the_machine_says(monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    environment = reproduce.venv_environment(Path("venv"))
    assert environment["PYTHONPYCACHEPREFIX"] == str(Path("venv") / "pycache")
    assert not {"PYTHONDONTWRITEBYTECODE", "PYTHONPATH"} & set(environment)


def test_all_tests_run_on_one_thread_each_and_chosen_ones_as_pytest_runs_them(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(
        subprocess, "call", lambda command, cwd, env: calls.append((command[3:], env)) or 0
    )
    assert reproduce.run_tests(Path("python"), [], {}) == 0
    assert reproduce.run_tests(Path("python"), ["-k", "metrics"], {}) == 0
    assert calls == [
        (["-n", "2", "--dist", "loadfile"], {"OMP_NUM_THREADS": "1"}),
        (["-k", "metrics"], {}),
    ]


def test_the_first_error_ends_what_runs_at_the_same_time(monkeypatch):
    monkeypatch.setattr(reproduce, "demo_workers", lambda: 2)

    def failing() -> None:
        raise reproduce.ReproduceError("broken")

    def sleeping() -> None:
        reproduce.run_quietly([sys.executable, "-c", "import time; time.sleep(60)"])

    start = time.monotonic()
    with pytest.raises(reproduce.ReproduceError, match="broken"):
        tasks = {"first": sleeping, "second": failing, "third": sleeping}
        reproduce.run_when_ready(tasks, dict.fromkeys(tasks, set()))
    assert time.monotonic() - start < 30 and not reproduce.STOP.is_set()
