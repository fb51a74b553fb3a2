"""Kill -9 at any moment, several processes, several workers: the same numbers, each once."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState

from tests import killable
from tests.test_training import COHORT, VALIDATION, equal, small, weights
from utils import optuna_search
from utils.backbones import read_metadata
from utils.evaluation import records, schema
from utils.optuna_search import storage, workers
from utils.pipeline.driver import grid_configs
from utils.pipeline.store import rows_of
from utils.utils_funcs import ROOT

#: How often each training and each search is killed.
MOMENTS = 10
#: The best settings of `killable.search`.
BEST = optuna_search.search_paths(Path(), small("Resnet"), COHORT)[1].name
#: Processes that start in milliseconds: a server has imported for all of them what they need. So
#: most of the kills meet a training or a search, and not the imports before it.
FORKS = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
if sys.platform != "win32":
    late_imports = ["torch._dynamo", "torch.utils.tensorboard", "optuna.storages._rdb.models"]
    FORKS.set_forkserver_preload(["tests.killable", *late_imports])


def finish(target: Callable[..., None], *arguments: object) -> float:
    """Runs a function in a process of its own; returns the seconds that it took."""
    started, process = time.monotonic(), FORKS.Process(target=target, args=arguments)
    process.start()
    process.join(300)
    assert process.exitcode == 0
    return time.monotonic() - started


def kill_after(seconds: float, target: Callable[..., None], *arguments: object) -> bool:
    """Starts a function in a process and kills that after so many seconds.

    Returns:
        Whether it was still running.
    """
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    process.join(seconds)
    running = process.is_alive()
    if running:
        os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    return running


def without_seconds(history: list[dict]) -> list[dict]:
    return [
        {name: value for name, value in epoch.items() if name != "seconds"} for epoch in history
    ]


@pytest.mark.slow  # starts and kills a dozen processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither forkserver nor SIGKILL")
def test_a_training_killed_at_any_moment_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = tmp_path / "whole" / "fold0_seed0.safetensors"
    finish(killable.train, whole)  # the first one pays for the server
    shutil.rmtree(whole.parent)
    duration = finish(killable.train, whole)
    moments, killed = random.Random(0), 0
    for moment in range(MOMENTS):
        broken = tmp_path / f"broken{moment}" / "fold0_seed0.safetensors"
        killed += kill_after(duration * moments.random(), killable.train, broken)
        finish(killable.train, broken)
        assert without_seconds(read_metadata(broken)["history"]) == without_seconds(
            read_metadata(whole)["history"]
        )
        for name in ("fold0_seed0.safetensors", "fold0_seed0_last.safetensors"):
            assert equal(weights(broken.with_name(name)), weights(whole.with_name(name)))
        kept = sorted(
            path.name for path in broken.parent.iterdir() if path.suffix in (".pt", ".safetensors")
        )
        assert kept == ["fold0_seed0.safetensors", "fold0_seed0_last.safetensors"]
    assert killed >= MOMENTS // 2, "most of the kills must have met a running training"


def trials_of(folder: Path) -> list[tuple]:
    """What each trial of `killable.search` was and gave, in order."""
    study = optuna_search.open_search(folder, small("Resnet", trials=5, search_epochs=4), COHORT)
    return [
        (trial.number, trial.state, trial.value, trial.params, trial.intermediate_values)
        for trial in study.trials
    ]


@pytest.mark.slow  # starts and kills a dozen processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither forkserver nor SIGKILL")
def test_a_search_killed_at_any_moment_goes_on_to_the_same_trials(tmp_path: Path) -> None:
    finish(killable.search, tmp_path / "first")  # the first one pays for the server
    duration = finish(killable.search, tmp_path / "whole")
    moments, killed, expected = random.Random(1), 0, trials_of(tmp_path / "whole")
    assert len(expected) == 5
    for moment in range(MOMENTS):
        folder = tmp_path / f"broken{moment}"
        killed += kill_after(duration * moments.random(), killable.search, folder)
        finish(killable.search, folder)
        assert trials_of(folder) == expected
        assert (folder / BEST).read_bytes() == (tmp_path / "whole" / BEST).read_bytes()
    assert killed >= MOMENTS // 2, "most of the kills must have met a running search"


# --- Shards of the grid ---


def runs_of_the_grid() -> set[str]:
    """The names of all runs, as the log and `recorded_runs` write them."""
    runs = grid_configs("cpu", killable.SHARDED, ("patient", "slice"), (0,))
    return {f"{run.model} {run.protocol} {run.run_name}" for run in runs}


def logged(root: Path, what: str) -> list[tuple[str, int]]:
    """(run, process) of every line of the log that says `what`, "began" or "ended"."""
    log = root / "log"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [
        (" ".join(words[1:4]), int(words[4])) for words in map(str.split, lines) if words[0] == what
    ]


def recorded_runs(root: Path) -> dict[str, dict]:
    """Run → what its record says of it; every record must follow from its predictions."""
    found = {}
    for model in killable.SHARDED:
        for protocol in ("patient", "slice"):
            path = killable.sharded_workspace(root).record(model, protocol)
            if path.is_file():
                record, rows = records.read_record(path), schema.read_predictions(path)
                assert record == records.summarize(rows_of(rows, record.metas), record.metas)
                found |= {
                    f"{model} {protocol} fold{meta['fold']}_seed{meta['seed']}": meta
                    for meta in record.metas
                }
    return found


def start_shard(root: Path, which: str, seconds: float = 0.0) -> multiprocessing.Process:
    """Starts a shard of the grid whose runs take so many seconds each."""
    process = FORKS.Process(target=killable.shard, args=(root, which, seconds))
    process.start()
    return process


def until(condition: Callable[[], bool], process: multiprocessing.Process) -> None:
    """Waits until a running process has done what `condition` asks for."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)


def ended_well(*processes: multiprocessing.Process) -> bool:
    """Waits for the end of the processes; whether all were successful."""
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes] == [0] * len(processes)


def test_two_shards_at_the_same_time_run_every_run_once(tmp_path: Path) -> None:
    """The folds of one model are in one record, and both shards write it."""
    shards = [start_shard(tmp_path, f"{number}/2", 0.02) for number in (1, 2)]
    assert ended_well(*shards)
    began = logged(tmp_path, "began")
    assert len(began) == 12 and {run for run, _ in began} == runs_of_the_grid()
    assert [sum(process == shard.pid for _, process in began) for shard in shards] == [6, 6]
    kept = {run: meta["process"] for run, meta in recorded_runs(tmp_path).items()}
    assert kept == dict(began), "no run was lost as the other shard wrote its own"
    assert ended_well(start_shard(tmp_path, "1/2"), start_shard(tmp_path, "2/2"))
    assert logged(tmp_path, "began") == began, "nothing is left to do"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_shard_does_not_repeat_a_finished_run(tmp_path: Path) -> None:
    """Killed within its third run, then three times at random, while the other shard runs."""
    other, moments, killed, kept = start_shard(tmp_path, "2/2", 0.1), random.Random(2), 0, {}

    def began(process: multiprocessing.Process) -> int:
        return [number for _, number in logged(tmp_path, "began")].count(process.pid)

    for attempt in range(4):
        shard = start_shard(tmp_path, "1/2", 0.5)
        if attempt == 0:
            until(lambda: began(shard) == 3, shard)  # noqa: B023  called at once
        else:
            shard.join(0.8 * moments.random())
        if shard.is_alive():
            os.kill(shard.pid, signal.SIGKILL)
            killed += 1
        shard.join(60)
        finished = {run: meta["process"] for run, meta in recorded_runs(tmp_path).items()}
        assert attempt > 0 or list(finished.values()).count(shard.pid) == 2, (
            "two runs were finished, the third was not"
        )
        assert kept.items() <= finished.items(), (
            "a finished run is still the work of the process that finished it"
        )
        kept = finished
    assert killed == 4 and ended_well(start_shard(tmp_path, "1/2"), other)
    finished = {run: meta["process"] for run, meta in recorded_runs(tmp_path).items()}
    assert set(finished) == runs_of_the_grid() and kept.items() <= finished.items()
    assert len(logged(tmp_path, "began")) <= 12 + killed, (
        "a kill costs the run that it met, no other"
    )


# --- Several processes ---


@pytest.mark.slow  # starts torchrun twice
def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone.json", tmp_path / "together.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    for command, output in (([], alone), (launcher, together)):
        done = subprocess.run(
            [
                sys.executable,
                *command,
                "-m" if not command else "--module",
                "tests.killable",
                str(output),
            ],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads(path.read_text()) for path in (alone, together))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["seen"] == list(range(len(VALIDATION))), (
        "two processes together see every image exactly once"
    )
    for first, second in zip(one["history"], two["history"], strict=True):
        assert second["validation_images"] == len(VALIDATION)
        for name in ("train_loss", "validation_loss", "score"):
            # Sums in another order, nothing else.
            assert second[name] == pytest.approx(first[name], rel=1e-3), name
        assert second["validation_accuracy"] == first["validation_accuracy"]


def free_port() -> int:
    """A port of this machine that nothing listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- A search on PostgreSQL ---


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's server programs, None where it is not installed."""
    found = shutil.which("pg_ctl")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


@pytest.fixture
def postgres() -> Iterator[str]:
    """URL of an empty database on a server that is started for the test."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    # A short path: a socket's may have 107 characters. PostgreSQL does not run as root, so root
    # starts it as the user postgres.
    folder, port = Path(f"/tmp/alzheimer-pg-{os.getpid()}"), free_port()
    folder.mkdir(mode=0o755)
    become = []
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
        become = ["runuser", "-u", "postgres", "--"]

    def server(*command: str) -> None:
        subprocess.run(
            [*become, *command],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )

    try:
        server(
            str(programs / "initdb"),
            "-D",
            str(folder / "data"),
            "-A",
            "trust",
            "-U",
            "study",
            "--no-sync",
        )
        server(
            str(programs / "pg_ctl"),
            "-D",
            str(folder / "data"),
            "-w",
            "-l",
            str(folder / "log"),
            "-o",
            f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off",
            "start",
        )
        yield f"postgresql+psycopg://study@127.0.0.1:{port}/postgres"
        server(str(programs / "pg_ctl"), "-D", str(folder / "data"), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


#: Signs of life every second, and a trial is given up after eight without one.
QUICK_SIGNS = {"HEARTBEAT": 1, "GRACE": 8}


@pytest.fixture
def quick_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in QUICK_SIGNS.items():
        monkeypatch.setattr(storage, name, seconds)


def work(folder: Path, url: str) -> None:
    """One worker of a search, in a process of its own."""
    vars(storage).update(QUICK_SIGNS)
    killable.search(folder, 6, url, epochs=30)  # long enough to be killed in the middle


def die_once_a_trial_is_taken(folder: Path, url: str) -> None:
    workers.signs_of_life = lambda study, trial_id: os.kill(os.getpid(), signal.SIGKILL)
    work(folder, url)


def test_a_worker_killed_before_its_trial_gave_a_sign_of_life_blocks_no_other(
    postgres: str, quick_signs: None, tmp_path: Path
) -> None:
    study = optuna_search.open_search(
        tmp_path, small("Resnet", trials=2, search_epochs=4), COHORT, postgres
    )
    optuna_search.enqueue(study, 2)
    killed = FORKS.Process(target=die_once_a_trial_is_taken, args=(tmp_path / "killed", postgres))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    states = [trial.state for trial in study.get_trials()]
    assert states == [TrialState.RUNNING, TrialState.WAITING]
    finish(work, tmp_path / "other", postgres)
    states = [trial.state for trial in study.get_trials()]
    assert states == [TrialState.FAIL, TrialState.COMPLETE]


def test_two_workers_share_a_search_on_postgresql_and_a_third_may_be_killed(
    postgres: str, quick_signs: None, tmp_path: Path
) -> None:
    study = optuna_search.open_search(
        tmp_path, small("Resnet", trials=6, search_epochs=4), COHORT, postgres
    )
    optuna_search.enqueue(study, 6)
    killed, first, second = (
        FORKS.Process(target=work, args=(tmp_path / name, postgres))
        for name in ("killed", "first", "second")
    )
    killed.start()
    while not study.get_trials(states=(TrialState.RUNNING,)):
        assert killed.is_alive()
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    for process in (first, second):
        process.start()
    for process in (first, second):
        process.join(300)
        assert process.exitcode == 0
    states = [trial.state for trial in study.get_trials()]
    assert len(states) == 6, "nothing lost, nothing doubled"
    assert states.count(TrialState.FAIL) == 1 and all(state.is_finished() for state in states)
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    assert len({str(trial.params) for trial in complete}) == len(complete)
    best = {
        json.loads((tmp_path / name / BEST).read_text())["value"] for name in ("first", "second")
    }
    assert best == {study.best_value}, "both workers leave the same best settings"
