"""One run of a model, from data to record: search, train, attack, explain, save.

    python -m utils.experiment prepare        the tensors of both protocols
    python -m utils.experiment run --profile cpu --model Resnet --fold 0
                                              one run, resumed if it was stopped
    python -m utils.experiment grid --profile cpu --shard 1/4
                                              a quarter of all runs that no record holds
    python -m utils.experiment attack --model Resnet_atk --eps 4/255
                                              a trained model attacked, or your own

Names of `utils.pipeline` that notebooks use are importable from here.
"""

from utils.pipeline.command import main
from utils.pipeline.driver import Run, runs_of
from utils.pipeline.texts import (
    balance_text,
    cohort_text,
    defaults_text,
    example_images,
    fits_markdown,
    protocols_text,
    sanity_text,
    search_figures,
    search_text,
)
from utils.pipeline.workspace import Workspace, open_workspace, results_root

__all__ = [
    "Run",
    "Workspace",
    "balance_text",
    "cohort_text",
    "defaults_text",
    "example_images",
    "fits_markdown",
    "open_workspace",
    "protocols_text",
    "results_root",
    "runs_of",
    "sanity_text",
    "search_figures",
    "search_text",
]

if __name__ == "__main__":
    main()
