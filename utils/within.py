"""Protocol `within`: one model answers for patients it was trained on and for patients it was not.

Of each training patient some slices are left out of the training. The model is tested on these, and
on the *same* slices of the same patients in the fold in which they are test patients. So the two
parts of the test set hold the same images, and one thing differs: whether other slices of the
patient were in the training.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from utils import data
from utils.utils_funcs import UserError

#: Along a patient's stack, slices are in turn trained on and left out.
TRAINED, LEFT_OUT = 7, 9
PERIOD = TRAINED + LEFT_OUT
#: A slice this far from every trained slice of its patient shares little with it; neighbors are one
#: slice away.
FAR = 4
#: Test slices of each patient, at most.
TESTED = {"far": 2, "near": 1}
#: The fold whose test patients are the trained patients of fold k is k + 2; those of fold k + 1
#: validate in fold k.
NEXT = 2
#: The parts of the test set, as the record's variants are called.
PARTS = ("same_far", "same_near", "other_far", "other_near")


def roles_of(patients: np.ndarray, slices: np.ndarray) -> np.ndarray:
    """What each slice is used for: `train`, `far`, `near`, or nothing (empty).

    A patient's stack is cut into stretches of `TRAINED` trained slices and `LEFT_OUT` others. Where
    the first one begins differs from patient to patient, so that a part of the test set prefers no
    height of the head.

    Args:
        patients, slices: (N,) ids from 0, and positions along the body axis.
    """
    roles = np.full(len(patients), "", dtype="<U5")
    for patient in np.unique(patients):
        rows = np.flatnonzero(patients == patient)
        rows = rows[np.argsort(slices[rows], kind="stable")]
        places = np.arange(len(rows))
        # 11 has no divisor in common with the period: neighboring ids begin far apart.
        trained = (places + 11 * int(patient)) % PERIOD < TRAINED
        if not trained.any():
            continue
        distance = np.abs(places[:, None] - places[trained]).min(1)
        roles[rows[trained]] = "train"
        for role, found in (("far", distance >= FAR), ("near", distance == 1)):
            roles[rows[_spread(np.flatnonzero(found), TESTED[role])]] = role
    return roles


def _spread(places: np.ndarray, most: int) -> np.ndarray:
    """At most so many of these places, from the middles of equal stretches of them."""
    count = min(most, len(places))
    return places[((np.arange(count) + 0.5) * len(places) / max(count, 1)).astype(int)]


def load_sets(
    folder: Path,
    fold: int,
    *,
    permuted: bool,
    cohort_sha256: str | None = None,
    max_train: int | None = None,
    max_test: int | None = None,
) -> dict[str, data.ImageSet]:
    """Training, validation and test set of one fold, from the prepared sets of protocol `patient`.

    Args:
        permuted: labels are permuted among patients, so that nothing can be learned but who a
            patient is: a control.
        max_train: train on only so many slices (None: all), chosen by `data.spread`.
        max_test: validate, and test in each part, on only so many (None: all), chosen likewise.

    Raises:
        UserError: a set is missing, damaged or of another cohort, or the patients have too few
            slices.
    """
    of_fold = data.load_sets(folder, "patient", fold, cohort_sha256=cohort_sha256)
    elsewhere = data.load_set(folder, "patient", (fold + NEXT) % data.N_FOLDS, "test")
    everyone = dict(of_fold)
    if permuted:
        label_of = permuted_labels(
            torch.cat([part.patients for part in of_fold.values()]).numpy(),
            torch.cat([part.labels for part in of_fold.values()]).numpy(),
        )
        everyone = {name: _relabeled(part, label_of) for name, part in everyone.items()}
        elsewhere = _relabeled(elsewhere, label_of)
    trained = everyone["train"].patients.unique()
    known = elsewhere.pick(torch.isin(elsewhere.patients, trained).nonzero().flatten())
    chosen = {
        "train": _with_roles(everyone["train"], ("train",)),
        "validation": everyone["validation"],
        "same": _with_roles(known, ("far", "near"), "same"),
        "other": _with_roles(everyone["test"], ("far", "near"), "other"),
    }
    for name, part in chosen.items():
        if not len(part):
            raise UserError(
                f"Protocol within finds no slice for its part {name!r} in fold {fold}: patients "
                f"have too few slices (expected about {PERIOD} or more each)."
            )
    limits = {"train": max_train} | dict.fromkeys(("validation", "same", "other"), max_test)
    for name, limit in limits.items():
        if limit is not None:
            chosen[name] = chosen[name].pick(data.spread(chosen[name], limit))
    test = joined([chosen["same"], chosen["other"]], "within test")
    return {"train": chosen["train"], "validation": chosen["validation"], "test": test}


def _with_roles(part: data.ImageSet, roles: tuple[str, ...], name: str = "") -> data.ImageSet:
    """The slices that have one of these roles; with a name, each is of the part `<name>_<role>`."""
    found = roles_of(part.patients.numpy(), part.slices.numpy())
    rows = np.flatnonzero(np.isin(found, roles))
    parts = tuple(f"{name}_{role}" for role in found[rows]) if name else ()
    return replace(part.pick(rows), parts=parts)


def permuted_labels(patients: np.ndarray, labels: np.ndarray, seed: int = 0) -> dict[int, int]:
    """Patient → the class of another patient, by one permutation of all patients."""
    ids, first = np.unique(patients, return_index=True)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(ids))
    return dict(zip(ids.tolist(), labels[first][order].tolist(), strict=True))


def _relabeled(part: data.ImageSet, label_of: dict[int, int]) -> data.ImageSet:
    return replace(part, labels=torch.tensor([label_of[one] for one in part.patients.tolist()]))


def joined(parts: list[data.ImageSet], name: str) -> data.ImageSet:
    """Several sets of one folder of prepared sets as one, in their order."""
    first = parts[0]
    return data.ImageSet(
        stack=first.stack,
        rows=torch.cat([part.rows for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        patients=torch.cat([part.patients for part in parts]),
        slices=torch.cat([part.slices for part in parts]),
        files=[file for part in parts for file in part.files],
        name=name,
        pixels=[pixel for part in parts for pixel in part.pixels],
        cohort_sha256=first.cohort_sha256,
        parts=tuple(name for part in parts for name in part.parts),
    )
