"""optuna_search: the study lasts, the test set is out of reach, a failed trial is recorded and not fatal."""

import inspect

import optuna
import pytest

from tests.test_training import DEVICE, TRAIN, VALIDATION, small, tiny  # noqa: F401  (tiny is a fixture)
from utils import optuna_search
from utils.utils_funcs import StudyError, read_json


def run(folder, **changes):
    config = small("Resnet", trials=3, search_epochs=1, **changes)
    return optuna_search.search(TRAIN, VALIDATION, config, folder, DEVICE), config


def test_a_search_leaves_the_best_settings_where_training_reads_them(tiny, tmp_path):
    study, config = run(tmp_path / "optuna")
    assert len(study.trials) == 3
    best = optuna_search.best_settings(tmp_path / "optuna", config)
    assert best == study.best_params and set(best) == set(optuna_search.SPACE)
    assert read_json(tmp_path / "optuna" / "patient_fold0_best.json")["value"] == min(t.value for t in study.trials)
    assert "lr" in optuna_search.trials_table(study)


def test_a_search_goes_on_where_it_stopped_and_draws_the_same_trials(tiny, tmp_path, monkeypatch):
    whole, _ = run(tmp_path / "whole")
    original, calls = optuna_search.objective, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(optuna_search, "objective", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken")
    monkeypatch.setattr(optuna_search, "objective", original)
    study, config = run(tmp_path / "broken")
    assert [(t.state, t.params, t.value) for t in study.trials] == [(t.state, t.params, t.value) for t in whole.trials]


def test_a_failing_trial_is_recorded_and_not_fatal(tiny, tmp_path, monkeypatch):
    original, calls = optuna_search.objective, []

    def sometimes(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return original(*arguments)

    monkeypatch.setattr(optuna_search, "objective", sometimes)
    study, _ = run(tmp_path)
    states = [trial.state for trial in study.trials]
    assert states.count(optuna.trial.TrialState.FAIL) == 1 and states.count(optuna.trial.TrialState.COMPLETE) == 3
    assert "out of memory" in study.trials[0].user_attrs["error"]


def test_a_search_in_which_everything_fails_ends_with_a_sentence(tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no")

    monkeypatch.setattr(optuna_search, "objective", broken)
    with pytest.raises(StudyError, match="failed"):
        run(tmp_path)


def test_the_test_set_is_out_of_reach_by_construction():
    assert "test" not in inspect.signature(optuna_search.search).parameters
    assert "test" not in inspect.signature(optuna_search.objective).parameters


def test_every_fold_has_its_own_study(tmp_path):
    names = {optuna_search.open_study(tmp_path, small("Resnet", protocol=protocol, fold=fold)).study_name
             for protocol, fold in (("slice", 0), ("patient", 0), ("patient", 1))}
    assert len(names) == 3
