"""The search for a model's settings: an Optuna study, pruned, resumable, without the test set.

A search holds a fixed number of enqueued trials, and any number of workers takes them one by one
until none waits. On one machine (SQLite, the default) a killed worker's trial is taken up again
from its last epoch, to the same numbers. Over several machines (any other Optuna storage URL, as
`postgresql://…`) a killed worker's trial counts as failed.
"""

from utils.optuna_search.figures import importances_of, search_figures, trials_table
from utils.optuna_search.space import SPACE, suggest
from utils.optuna_search.storage import (
    best_settings,
    check_storage,
    enqueue,
    known_search,
    open_search,
    search_name,
    search_paths,
)
from utils.optuna_search.trials import ONE_CLASS, objective, search

__all__ = [
    "ONE_CLASS",
    "SPACE",
    "best_settings",
    "check_storage",
    "enqueue",
    "importances_of",
    "known_search",
    "objective",
    "open_search",
    "search",
    "search_figures",
    "search_name",
    "search_paths",
    "suggest",
    "trials_table",
]
