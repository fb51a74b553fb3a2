"""Fixtures that several test files share: a small phantom cohort and its tensors."""

from __future__ import annotations

import os
import sys

# One thread for each worker of `pytest -n`: more would only wait for each other. Set before PyTorch
# is imported, and inherited by the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# The processes that tests start (and the workers of `pytest -n`) keep compiled modules, also where
# the machine forbids it: otherwise each compiles PyTorch and timm anew, which takes ten seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("PYTHONPYCACHEPREFIX", os.path.join(sys.prefix, "pycache"))
# Tests ask no hub: models start from random weights, as they do on a machine without a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ALZHEIMER_QUIET", "1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


@pytest.fixture(scope="session")
def phantom_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom cohort at 64 px in the raw folder layout."""
    from utils.phantom import write_phantom

    return write_phantom(tmp_path_factory.mktemp("phantom") / "raw_dataset", size=64, seed=3)


@pytest.fixture(scope="session")
def phantom_sets(phantom_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom's prepared tensors, `slice/` and `patient/fold<k>/`."""
    from utils.cohort.raw import read_raw
    from utils.cohort.table import build_cohort
    from utils.data import assign_folds, patients_of, prepare

    raw = read_raw(phantom_raw)
    cohort = build_cohort(raw)[0]
    folder = tmp_path_factory.mktemp("sets")
    prepare(raw, cohort, assign_folds(*patients_of(cohort)), folder)
    return folder
