"""The notebooks: thin, of one anatomy, in pairs that differ in parameters alone; they run headless.

The whole demonstration and runs on real data are slow tests. What every notebook calls is looked up
by a test that is not.
"""

import ast
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import numpy as np
import pytest
from safetensors import safe_open

from reproduce import NOTEBOOKS
from utils.config import protocols_of
from utils.utils_funcs import ROOT

STUDIED = ("Dinov2", "Efficientnet", "Resnet")
STUDIED_MODELS = tuple(f"{backbone}{regime}" for backbone in STUDIED for regime in ("", "_atk"))

OF_ONE_MODEL = [f"models/{model}.ipynb" for model in STUDIED_MODELS]
COMMITTED = [path for path in NOTEBOOKS if (ROOT / path).is_file()]


def read(path: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / path, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def without_magics(source: str) -> str:
    """Python alone, without IPython's own lines."""
    return "\n".join(
        line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))
    )


def printed(notebook: nbformat.NotebookNode) -> str:
    """What the cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs if output.output_type == "stream")


def test_every_model_has_its_notebook():
    assert {f"models/{model}.ipynb" for model in STUDIED_MODELS} | {
        "models/results.ipynb",
        "dataset/prepare_dataset.ipynb",
    } <= set(COMMITTED)


@pytest.mark.parametrize("path", COMMITTED)
def test_a_notebook_is_thin(path):
    notebook = read(path)
    assert (ROOT / path).stat().st_size < 1_000_000
    for source in code(notebook):
        assert source.count("\n") < 20, f"a cell of {path} is longer than 20 lines"
        tree = ast.parse(without_magics(source))
        assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(tree))
    definitions = [
        node
        for source in code(notebook)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    ]
    assert len(definitions) <= 1


@pytest.mark.parametrize("path", COMMITTED)
def test_a_notebook_has_the_fixed_anatomy(path):
    notebook = read(path)
    first, setup, imports, parameters = notebook.cells[:4]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "colab-badge" in first.source and path in first.source
    assert "?" in first.source, "the first paragraph poses the question"
    assert "google.colab" in setup.source and "print_environment()" in imports.source
    assert "parameters" in parameters.metadata.tags
    assert set(re.findall(r"^(\w+) =", parameters.source, re.M)) >= {"profile", "raw", "retrain"}
    assert notebook.metadata.kernelspec.name == "python3"
    *_, before, last = notebook.cells
    if path in OF_ONE_MODEL:
        # Sentences from the model's own record close it.
        assert "report.model_findings_markdown(" in last.source
        last = before
    assert last.cell_type == "markdown"
    assert last.source.startswith("## What this shows")
    assert len(last.source) > 200


@pytest.mark.parametrize("path", COMMITTED)
def test_every_name_that_a_notebook_uses_is_defined_in_it(path):
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", COMMITTED)
def test_everything_that_a_notebook_takes_from_the_library_is_there(path):
    tree = ast.parse("\n".join(map(without_magics, code(read(path)))))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "utils":
            for alias in node.names:
                found = imported(node.module, alias.name)
                if isinstance(found, ModuleType):
                    modules[alias.asname or alias.name] = found
    used = {
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    missing = [
        f"{module}.{name}"
        for module, name in sorted(used)
        if module in modules and not hasattr(modules[module], name)
    ]
    assert not missing


def imported(module: str, name: str) -> object:
    """What `from module import name` gives."""
    found = importlib.import_module(module)
    return (
        getattr(found, name)
        if hasattr(found, name)
        else importlib.import_module(f"{module}.{name}")
    )


@pytest.mark.parametrize("backbone", STUDIED)
def test_a_clean_notebook_and_its_counterpart_differ_in_title_parameters_and_prose_only(backbone):
    notebooks = [read(f"models/{backbone}{counterpart}.ipynb") for counterpart in ("", "_atk")]
    sources = [
        [
            cell.source
            for cell in notebook.cells
            if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", [])
        ]
        for notebook in notebooks
    ]
    assert sources[0] == sources[1]


@pytest.mark.parametrize("path", COMMITTED)
def test_a_committed_notebook_shows_a_run_on_real_data_and_no_error(path):
    notebook = read(path)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs, f"{path} was committed without its outputs"
    assert not any(output.output_type == "error" for output in outputs)
    # Planted evidence is measured on phantom images, whatever the data of the run, and says so.
    text = printed(notebook).replace("Planted evidence (phantom,", "")
    assert "data: real" in text and "phantom" not in text
    assert str(Path.home()) not in json.dumps(outputs) and str(ROOT) not in json.dumps(outputs)


def reproduce(
    tmp_path: Path, *arguments: str, raw: str | None = None, **options: object
) -> subprocess.CompletedProcess:
    """Runs reproduce.py in this environment, with its results in a temporary folder.

    Args:
        raw: the real data (None: the phantom cohort).
        options: of `subprocess.run`.
    """
    environment = {
        **os.environ,
        "ALZHEIMER_RUNS": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("ALZHEIMER_RAW", None)
    environment |= {"ALZHEIMER_RAW": raw} if raw else {}
    return subprocess.run(
        [sys.executable, "reproduce.py", "--no-venv", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        **options,
    )


def state_of_the_tree() -> str:
    """What git says of the working tree."""
    return subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True
    ).stdout


def record_of(root: Path, model: str, protocol: str) -> dict:
    path = root / "assets" / model / f"{protocol}.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow  # all ten notebooks: over ten minutes of one core
def test_without_data_everything_runs_on_the_phantom_and_says_so(tmp_path):
    before = state_of_the_tree()
    done = reproduce(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert state_of_the_tree() == before, "a demo writes nothing that git tracks"
    root = tmp_path / "demo-phantom"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["demo-phantom"]
    for path in COMMITTED:
        notebook = nbformat.read(root / path, as_version=4)
        assert "data: phantom" in printed(notebook) and "data: real" not in printed(notebook), path
    for model in STUDIED_MODELS:
        for protocol in protocols_of("demo", model):
            record = record_of(root, model, protocol)
            assert (record["data"], record["profile"]) == ("phantom", "demo")
            assert record["wall_seconds"]["train"] > 0 and record["worst_case"]
    for model in ("Ensemble", "Sequence"):
        record = record_of(root, model, "patient")
        assert (record["data"], record["profile"]) == ("phantom", "demo") and record["folds"] == [0]
        assert all(
            blocks["variant"] == name and blocks["worst_case"]
            for name, blocks in record["variants"].items()
        )
    assert all(check["passed"] for check in record["sanity"]), (
        "the checks of sequence models hold by construction"
    )
    assert "phantom" in done.stdout and "Dinov2_atk" in done.stdout


@pytest.mark.slow  # four runs that are killed, and the whole demonstration on the real cohort
@pytest.mark.skipif(
    "ALZHEIMER_RAW" not in os.environ or os.name == "nt",
    reason="needs the real data and process groups",
)
def test_the_whole_workspace_survives_kills_at_random_moments(tmp_path):
    """The demo on the real cohort, killed with all its children four times, then finished."""
    environment = {**os.environ, "ALZHEIMER_RUNS": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    moments = random.Random(0)
    for _ in range(4):
        running = subprocess.Popen(
            [sys.executable, "reproduce.py", "--no-venv"],
            cwd=ROOT,
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(moments.uniform(2, 90))
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        for path in tmp_path.rglob("*"):
            if path.suffix in (".json", ".ipynb"):
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as arrays:
                    assert arrays.files
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    file.keys()
    done = reproduce(tmp_path, raw=os.environ["ALZHEIMER_RAW"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for model in STUDIED_MODELS:
        for protocol in protocols_of("demo", model):
            record = record_of(tmp_path / "demo-real", model, protocol)
            assert (record["data"], record["profile"], record["init"]) == ("real", "demo", "random")
            clean = record["clean"]["slice"]["accuracy"]["value"]
            worst = record["worst_case"]["4/255"]["accuracy"]["value"]
            attacks = record["attacks"]["4/255"]
            assert worst <= attacks["fgsm"]["accuracy"]["value"] <= clean
    assert not list((tmp_path / "demo-real").rglob("*.tmp"))


@pytest.mark.parametrize("folder", ["dataset", "."])
def test_a_notebook_runs_from_its_own_folder_and_from_the_root(folder, tmp_path, phantom_raw):
    """Executed by hand, without `reproduce.py`, on a phantom cohort given as if it were data."""
    import papermill

    environment = {"ALZHEIMER_RUNS": str(tmp_path), "ALZHEIMER_QUIET": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        papermill.execute_notebook(
            str(ROOT / "dataset" / "prepare_dataset.ipynb"),
            str(tmp_path / "out.ipynb"),
            cwd=str(ROOT / folder),
            parameters={"raw": str(phantom_raw)},
            progress_bar=False,
            kernel_name="python3",
        )
    assert "804 images" in printed(nbformat.read(tmp_path / "out.ipynb", as_version=4))
