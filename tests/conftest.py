"""Fixtures that several rooms' tests share: a small phantom cohort, its tensors, and the real data where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))
# Tests ask no hub: models start from random weights, as they do on a machine without a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ALZHEIMER_QUIET", "1")


@pytest.fixture(scope="session")
def phantom_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom cohort at 64 px in the raw folder layout."""
    from utils.phantom import write_phantom

    return write_phantom(tmp_path_factory.mktemp("phantom") / "raw_dataset", size=64, seed=3)


@pytest.fixture(scope="session")
def phantom_sets(phantom_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom's prepared tensors, `slice/` and `patient/fold<k>/`."""
    from utils.cohort import build_cohort, read_raw
    from utils.data import assign_folds, patients_of, prepare

    raw = read_raw(phantom_raw)
    cohort = build_cohort(raw)[0]
    folder = tmp_path_factory.mktemp("sets")
    prepare(raw, cohort, assign_folds(*patients_of(cohort)), folder)
    return folder
