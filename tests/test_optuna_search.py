"""optuna_search: a search resumes, never sees the test set, and survives a failed trial."""

import dataclasses
import inspect
import random

import matplotlib.pyplot
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from tests.test_training import COHORT, DEVICE, TRAIN, VALIDATION, small, tiny  # noqa: F401  a fixture
from utils import experiment, optuna_search
from utils.config import make_config
from utils.optuna_search import trials
from utils.pipeline.driver import Run
from utils.utils_funcs import UserError, read_json


def run_search(folder, **changes):
    config = small("Resnet", trials=3, search_epochs=1, **changes)
    return optuna_search.search(TRAIN, VALIDATION, config, folder, DEVICE), config


def test_a_search_leaves_the_best_settings_where_training_reads_them(tiny, tmp_path):
    study, config = run_search(tmp_path / "optuna")
    assert len(study.trials) == 3
    best = optuna_search.best_settings(tmp_path / "optuna", config, COHORT)
    assert best == study.best_params and set(best) == set(optuna_search.SPACE)
    assert read_json(optuna_search.search_paths(tmp_path / "optuna", config, COHORT)[1])[
        "value"
    ] == min(t.value for t in study.trials)
    assert "lr" in optuna_search.trials_table(study)


def test_a_search_goes_on_where_it_stopped_and_draws_the_same_trials(tiny, tmp_path, monkeypatch):
    whole, _ = run_search(tmp_path / "whole")
    original, calls = trials.objective, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(trials, "objective", killed)
    with pytest.raises(KeyboardInterrupt):
        run_search(tmp_path / "broken")
    monkeypatch.setattr(trials, "objective", original)
    study, config = run_search(tmp_path / "broken")
    assert [(t.state, t.params, t.value) for t in study.trials] == [
        (t.state, t.params, t.value) for t in whole.trials
    ]


def test_a_trial_killed_while_its_settings_are_stored_draws_the_others_as_if_it_were_not(
    tiny, tmp_path, monkeypatch
):
    whole, _ = run_search(tmp_path / "whole")

    def killed(trial):
        trial.suggest_float("lr", 3e-5, 3e-3, log=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trials, "suggest", killed)
        run_search(tmp_path / "broken")
    study, _ = run_search(tmp_path / "broken")
    assert [trial.params for trial in study.trials] == [trial.params for trial in whole.trials]


def test_a_failing_trial_is_recorded_and_not_fatal(tiny, tmp_path, monkeypatch):
    original, calls = trials.objective, []

    def sometimes(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return original(*arguments)

    monkeypatch.setattr(trials, "objective", sometimes)
    study, _ = run_search(tmp_path)
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.FAIL) == 1 and states.count(TrialState.COMPLETE) == 3
    assert "out of memory" in study.trials[0].user_attrs["error"]


def test_a_worker_whose_trial_was_given_up_meanwhile_goes_on_with_the_next(
    tiny, tmp_path, monkeypatch
):
    storage, real = f"sqlite:///{(tmp_path / 'shared.db').as_posix()}", trials.objective
    study = optuna_search.open_search(tmp_path, small("Resnet", trials=3), COHORT, storage)
    optuna_search.enqueue(study, 3)

    def given_up(trial, *arguments):
        if trial.number == 0:
            study.tell(0, state=TrialState.FAIL)  # before the trial writes anything
        value = real(trial, *arguments)
        if trial.number == 1:
            study.tell(1, state=TrialState.FAIL)  # after the last thing that it wrote
        return value

    said: list[str] = []
    monkeypatch.setattr(trials, "objective", given_up)
    monkeypatch.setattr(trials, "say", said.append)
    optuna_search.search(
        TRAIN, VALIDATION, small("Resnet", trials=3), tmp_path, DEVICE, storage=storage
    )
    assert [trial.state for trial in study.get_trials()] == [
        TrialState.FAIL,
        TrialState.FAIL,
        TrialState.COMPLETE,
    ]
    assert ["was given up" in line and line.split()[1] for line in said] == ["0", "1"]


def test_a_search_in_which_everything_fails_ends_with_a_sentence(tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no")

    monkeypatch.setattr(trials, "objective", broken)
    with pytest.raises(UserError, match="failed"):
        run_search(tmp_path)


def test_the_test_set_is_out_of_reach_by_construction():
    assert "test" not in inspect.signature(optuna_search.search).parameters
    assert "test" not in inspect.signature(optuna_search.objective).parameters


def test_every_protocol_fold_profile_and_cohort_has_a_search_and_settings_of_its_own(tmp_path):
    first = small("Resnet")
    changed = ({"protocol": "slice"}, {}, {"fold": 1}, {"profile": "paper"})
    chosen = [
        (dataclasses.replace(first, **changes), cohort)
        for changes in changed
        for cohort in (COHORT, "beef" * 16)
    ]
    names = {optuna_search.open_search(tmp_path, *one).study_name for one in chosen}
    assert len(names) == len({optuna_search.search_paths(tmp_path, *one)[1] for one in chosen}) == 8


def test_a_damaged_database_is_named_by_whoever_opens_it(tmp_path):
    config = small("Resnet", trials=2)
    optuna_search.search_paths(tmp_path, config, COHORT)[0].write_bytes(b"no database" * 100)
    for opened in (optuna_search.open_search, optuna_search.known_search):
        with pytest.raises(UserError, match=r"study\.db.*cannot be opened"):
            opened(tmp_path, config, COHORT)


def test_settings_found_on_another_cohort_or_profile_are_never_taken(tiny, tmp_path):
    _, config = run_search(tmp_path)
    assert optuna_search.best_settings(tmp_path, config, COHORT)
    assert optuna_search.best_settings(tmp_path, config, "beef" * 16) == {}
    other = dataclasses.replace(config, profile="paper")
    assert optuna_search.best_settings(tmp_path, other, COHORT) == {}


# --- The figure of a search ---


def drawn_search(
    complete: int, pruned: int = 0, failed: int = 0, one_class: int = 0, flat: bool = False
) -> optuna.Study:
    """A study whose score depends on the learning rate and not on the optimizer."""
    distributions = {
        "lr": FloatDistribution(0.0, 1.0),
        "optimizer": CategoricalDistribution(["adamw", "sgd"]),
    }
    study = optuna.create_study(study_name="Resnet_atk-patient_fold0-cpu")
    generator = random.Random(0)

    def add(state: TrialState, charge: float = 0.0) -> None:
        lr = generator.random()
        value = 1.0 if flat else 1.0 + lr + charge
        study.add_trial(
            create_trial(
                state=state,
                value=value,
                params={"lr": lr, "optimizer": generator.choice(["adamw", "sgd"])},
                distributions=distributions,
                intermediate_values={1: value},
            )
        )

    for state, count, charge in (
        (TrialState.COMPLETE, complete, 0.0),
        (TrialState.PRUNED, pruned, 0.0),
        (TrialState.COMPLETE, one_class, optuna_search.ONE_CLASS),
    ):
        for _ in range(count):
            add(state, charge)
    for _ in range(failed):
        study.add_trial(create_trial(state=TrialState.FAIL))
    return study


def words_of(figure) -> str:
    """Everything that is written in a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def test_the_figure_shows_every_finished_trial_the_best_so_far_and_what_decided():
    study = drawn_search(complete=20, pruned=3, failed=2, one_class=1)
    open_figures = matplotlib.pyplot.get_fignums()
    figure = optuna_search.search_figures(study)
    history, importances = figure.axes
    shown = {
        collection.get_label(): collection.get_offsets().tolist()
        for collection in history.collections
    }
    scored = [[trial.number, trial.value] for trial in study.trials[:20]]
    assert shown["complete"] == scored
    assert {label: len(points) for label, points in shown.items()} == {
        "complete": 20,
        "pruned (last epoch's)": 3,
        "failed": 2,
        "answered one class": 1,
    }
    best = history.lines[0].get_ydata()
    assert best[-1] == min(value for _, value in scored) and (best[1:] <= best[:-1]).all()
    assert history.get_ylim()[1] < 3, "10 is added for one class, and must not flatten the others"
    names = [label.get_text() for label in importances.get_yticklabels()]
    assert names[-1] == "lr", "the only setting that decides is on top"
    assert [bar.get_width() for bar in importances.patches][::-1] == list(
        optuna.importance.get_param_importances(study).values()
    )
    for said in (
        "n = 26 trials",
        "21 complete",
        "3 pruned",
        "2 failed",
        "Resnet_atk-patient_fold0-cpu",
    ):
        assert said in words_of(figure)
    assert (
        figure._repr_png_().startswith(b"\x89PNG")
        and matplotlib.pyplot.get_fignums() == open_figures
    )


@pytest.mark.parametrize(
    "study",
    [drawn_search(3, pruned=9), drawn_search(8, flat=True)],
    ids=["too few", "all alike"],
)
def test_importances_that_would_mean_nothing_are_words(study):
    assert optuna_search.importances_of(study) == {}
    figure = optuna_search.search_figures(study)
    assert "need at least 4 complete trials" in words_of(figure) and not figure.axes[1].patches


@pytest.mark.parametrize(
    "study", [drawn_search(0), drawn_search(0, failed=3), drawn_search(0, one_class=2)]
)
def test_a_search_without_any_useful_trial_is_drawn_too(study):
    figure = optuna_search.search_figures(study)
    assert figure._repr_png_() and f"n = {len(study.trials)} trials" in words_of(figure)


def test_runs_show_the_searches_that_they_use_and_make_none(tiny, tmp_path):
    """Under `cpu` all five folds use the search of fold 0; under `paper` each has its search."""
    workspace = experiment.Workspace(tmp_path, "phantom", "cpu", tmp_path, COHORT)

    def figures(configs):
        return experiment.search_figures([Run(workspace, config) for config in configs])

    configs = [
        make_config("cpu", "Resnet", protocol=protocol, fold=fold, trials=3)
        for protocol, folds in (("patient", 5), ("slice", 1))
        for fold in range(folds)
    ]
    assert figures(configs) == []
    assert not list(tmp_path.rglob("*")), "looking creates nothing"
    small_configs = [
        dataclasses.replace(small("Resnet", fold=fold, trials=3, search_epochs=1), profile="cpu")
        for fold in (0, 1)
    ]
    for config in small_configs:
        optuna_search.search(TRAIN, VALIDATION, config, workspace.optuna("Resnet"), DEVICE)
    (figure,) = figures(configs)
    assert "Search Resnet-patient_fold0-cpu" in words_of(figure) and "3 trials" in words_of(figure)
    paper = [dataclasses.replace(config, profile="paper") for config in small_configs]
    for config in paper:
        optuna_search.search(TRAIN, VALIDATION, config, workspace.optuna("Resnet"), DEVICE)
    assert len(figures(paper)) == 2
    assert figures([dataclasses.replace(config, trials=0) for config in configs]) == []
