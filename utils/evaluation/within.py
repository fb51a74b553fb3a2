"""What a model's answers are worth for patients of its training and for other patients, clean and
under attack: comparisons from a record of protocol `within`.

Both parts of its test set hold the same slices of the same patients (`utils.within`), so every
difference is paired by image, and intervals are over patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from utils import metrics
from utils.evaluation.comparisons import LEVEL, N_BOOT
from utils.evaluation.records import robust_decisions
from utils.evaluation.schema import Record, Rows, Score, attacks_of, clean_of

Distance = Literal["far", "near"]


@dataclass(frozen=True)
class Gap:
    """Known patients against others, at one eps, over three classes.

    Attributes:
        eps: None on clean images.
        same, other: balanced accuracy (robust, under attack) of each part.
        difference: `same` minus `other`, with the p-value of none.
        kept_same, kept_other, kept_difference: of the slices that were right when clean, the share
            that is robust; None on clean images.
        kept_by_both: `kept_difference` on the slices alone that were right in both parts.
        n_slices, n_patients: in each part, over all seeds.
        p_holm: that of `tested` after Holm's correction for all gaps of a table.
    """

    model: str
    eps: str | None
    same: Score
    other: Score
    difference: Score
    kept_same: Score | None
    kept_other: Score | None
    kept_difference: Score | None
    kept_by_both: Score | None
    n_slices: int
    n_patients: int
    p_holm: float = 1.0

    @property
    def tested(self) -> Score:
        """The difference that the analysis plan in `models/results.ipynb` decides by: on clean
        images that of balanced accuracy; under attack that of the share kept of slices that were
        right in both parts, since an answer that was wrong from the start says nothing of how
        firmly it is held."""
        return self.kept_by_both or self.difference

    @property
    def decided(self) -> bool:
        """Whether that difference is told from none at the level of 5 % after the correction."""
        return self.p_holm < LEVEL


@dataclass(frozen=True)
class _Part:
    """One part of a record: of each slice whether its three-class decision is right, clean and
    under all attacks up to an eps, in the order of `keys`."""

    rows: Rows
    clean: np.ndarray
    robust: np.ndarray
    four: np.ndarray


def gaps(record: Record, distance: Distance = "far", *, n_boot: int = N_BOOT) -> list[Gap]:
    """The gap on clean images and at every eps of a record, on slices that both parts hold, with
    Holm's correction over them."""
    found = [
        _gap(record, eps, distance, n_boot)
        for eps in (None, *attacks_of(record.predictions, f"same_{distance}"))
    ]
    return corrected([gap for gap in found if gap is not None])


def corrected(found: Sequence[Gap]) -> list[Gap]:
    """These gaps with Holm's correction for their number."""
    p_values = [1.0 if gap.tested.p is None else gap.tested.p for gap in found]
    return [
        replace(gap, p_holm=float(p)) for gap, p in zip(found, metrics.holm(p_values), strict=True)
    ]


def _gap(record: Record, eps: str | None, distance: Distance, n_boot: int) -> Gap | None:
    """None where no slice is in both parts: folds are missing."""
    in_same, in_other = same_slices(record, distance)
    if not len(in_same):
        return None
    same = _part(record, f"same_{distance}", eps, in_same)
    other = _part(record, f"other_{distance}", eps, in_other)
    labels, patients = same.rows.labels, same.rows.patients

    def scores(part: _Part) -> Score:
        found = metrics.score_robust(part.four, part.robust, labels, patients, n_boot=n_boot)
        return Score.from_json(found["balanced_accuracy_3"], "balanced_accuracy_3")

    difference = metrics.paired_robust_difference(
        (same.four, same.robust), (other.four, other.robust), labels, patients, n_boot=n_boot
    )["balanced_accuracy_3"]
    kept: dict[str, Score | None] = dict.fromkeys(("first", "second", "difference"))
    by_both = None
    if eps is not None:
        kept |= _kept(same, other, labels, patients, n_boot)
        both = same.clean & other.clean
        of_both = [replace(part, clean=both, robust=part.robust & both) for part in (same, other)]
        by_both = _kept(of_both[0], of_both[1], labels, patients, n_boot)["difference"]
    return Gap(
        record.model,
        eps,
        scores(same),
        scores(other),
        Score.from_json(difference, "difference"),
        kept["first"],
        kept["second"],
        kept["difference"],
        by_both,
        same.rows.n_slices,
        same.rows.n_patients,
    )


def _kept(
    same: _Part, other: _Part, labels: np.ndarray, patients: np.ndarray, n_boot: int
) -> dict[str, Score]:
    found = metrics.kept_shares(
        (same.clean, same.robust),
        (other.clean, other.robust),
        labels,
        patients,
        n_boot=n_boot,
        test=True,
    )
    return {name: Score.from_json(score, name) for name, score in found.items()}


def same_slices(record: Record, distance: Distance) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the slices that a record holds in both parts under one seed, once as slices of
    patients in the training and once of others, in one order."""
    rows = record.predictions

    def places(part: str) -> dict[tuple[int, bytes], int]:
        inside = np.flatnonzero(metrics.scored(clean_of(rows, f"{part}_{distance}")))
        return {
            (int(rows["seed"][row]), rows["file_sha256"][row].tobytes()): int(row) for row in inside
        }

    same, other = places("same"), places("other")
    shared = sorted(same.keys() & other.keys())
    in_same, in_other = ([place[key] for key in shared] for place in (same, other))
    return np.array(in_same, np.int64), np.array(in_other, np.int64)


def _part(record: Record, variant: str, eps: str | None, rows: np.ndarray) -> _Part:
    """What withstood every attack at this and at every smaller eps."""
    labels = record.rows.labels[rows]
    clean = clean_of(record.predictions, variant)[rows]
    four, three = metrics.correct(clean, labels)
    if eps is None:
        return _Part(record.rows.take(rows), three, three, four)
    attacked: list[np.ndarray] = []
    for at, attacks in attacks_of(record.predictions, variant).items():
        attacked += [logits[rows] for logits in attacks.values()]
        if at == eps:
            break
    robust_four, robust_three, _ = robust_decisions(clean, attacked, labels)
    return _Part(record.rows.take(rows), three, robust_three, robust_four)
