"""Which trial a worker takes next, on one machine or on a storage that several machines share."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import FrozenTrial, TrialState

from utils.optuna_search import storage
from utils.optuna_search.space import SPACE


def local_trials(study: optuna.Study, folder: Path, trials: int) -> Iterator[optuna.Trial]:
    """Trials for this worker on a machine with other workers, one at a time.

    A running trial's worker holds a lock in `folder`, which the system frees when the worker dies.
    So a running trial whose lock is free has no worker any more, and is taken up again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        with FileLock(folder / "queue.lock"):
            failed = len(study.get_trials(deepcopy=False, states=(TrialState.FAIL,)))
            storage.enqueue(study, trials + min(failed, trials))
        unfinished = unfinished_trials(study)
        if not unfinished:
            return
        for candidate in unfinished:
            with (
                contextlib.suppress(Timeout),
                FileLock(folder / f"{candidate.number}.lock", timeout=0),
            ):
                if not study.trials[candidate.number].state.is_finished():
                    claim(study, candidate._trial_id)
                    yield begin(study, candidate)
                    break
        else:
            time.sleep(1)  # other workers hold the rest; one of them may still die


def shared_trials(study: optuna.Study) -> Iterator[optuna.Trial]:
    """Trials for this worker on a storage that several machines share, one at a time.

    On the way, trials whose workers give no sign of life any more are marked as failed.
    """
    while True:
        optuna.storages.fail_stale_trials(study)
        unfinished = unfinished_trials(study)
        if not unfinished:
            return
        for waiting in unfinished:
            if waiting.state != TrialState.WAITING:
                continue
            # Before the claim: a running trial without any sign of life never counts as stale, and
            # all workers would wait for it.
            record_sign_of_life(study, waiting._trial_id)
            if claim(study, waiting._trial_id):
                with signs_of_life(study, waiting._trial_id):
                    yield begin(study, waiting)
                break
        else:
            time.sleep(min(storage.HEARTBEAT, 5))


def unfinished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that run or wait."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))


def claim(study: optuna.Study, trial_id: int) -> bool:
    """Whether this worker turned a waiting trial into a running one; the storage lets only one."""
    try:
        return study._storage.set_trial_state_values(trial_id, state=TrialState.RUNNING)
    except optuna.exceptions.UpdateFinishedTrialError:
        return False


def begin(study: optuna.Study, claimed: FrozenTrial) -> optuna.Trial:
    """The trial, ready to suggest settings.

    The first trials are random; a later one sees the results of all before it, from any worker.
    A trial whose worker was killed keeps the settings that were stored, and draws the others as if
    it had drawn all of them.
    """
    study.sampler = optuna.samplers.TPESampler(seed=10_007 + claimed.number, multivariate=True)
    # As `Study.ask` does: read again what other workers wrote meanwhile.
    study._thread_local.cached_all_trials = None
    trial = optuna.Trial(study, claimed._trial_id)
    # A stored setting is not drawn again, but those after it take the numbers that follow its own.
    for name in SPACE:
        if name in trial.distributions and name not in trial.relative_params:
            study.sampler.sample_independent(study, claimed, name, trial.distributions[name])
    return trial


def record_sign_of_life(study: optuna.Study, trial_id: int) -> None:
    """Tells a shared storage that the trial's worker lives."""
    shared = study._storage
    assert isinstance(shared, BaseHeartbeat)
    shared.record_heartbeat(trial_id)


@contextlib.contextmanager
def signs_of_life(study: optuna.Study, trial_id: int) -> Iterator[None]:
    """Inside, the shared storage learns every `HEARTBEAT` seconds that the trial's worker lives.

    The first time is after `HEARTBEAT` seconds.
    """
    done = threading.Event()

    def beat() -> None:
        while not done.wait(storage.HEARTBEAT):
            record_sign_of_life(study, trial_id)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
