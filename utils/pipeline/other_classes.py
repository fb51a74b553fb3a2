"""Your own model on data with other classes than this project's four: attacked in the same way, and
scored as it is, since nobody said which of its classes could be merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from utils import metrics
from utils.config import RunConfig, parse_eps
from utils.data import ImageSet
from utils.drawing import show
from utils.evaluation.predictions import misclassified
from utils.evaluation.schema import Score, Scores
from utils.evaluation.suite import evaluate_suite
from utils.report.card import Card


@dataclass(frozen=True)
class OtherResult:
    """One evaluation of a model with K classes.

    Attributes:
        clean: scores of `metrics.score_flags` of the clean images; worst: eps → the same of what
            withstood every attack at this and at every smaller eps.
        attacks: eps → attack → accuracy over all images, and how many were attacked.
        sanity: the rows of the suite's checks.
    """

    model: str
    classes: tuple[str, ...]
    suite: str
    clean: Scores
    worst: dict[str, Scores]
    attacks: dict[str, dict[str, dict[str, float]]]
    sanity: list[dict]
    n_slices: int
    n_patients: int

    def to_json(self) -> dict[str, Any]:
        """What the card's JSON file holds; keys as in a record where a record has them."""

        def scores(found: Scores) -> dict:
            return {name: score.to_json() for name, score in found.items()}

        size = {"n_slices": self.n_slices, "n_people": self.n_patients}
        return {
            "model": self.model,
            "classes": list(self.classes),
            "suite": self.suite,
            "clean": {"slice": scores(self.clean), **size},
            "attacks": self.attacks,
            "worst_case": {eps: scores(found) | size for eps, found in self.worst.items()},
            "sanity": self.sanity,
        }


def attack_other_classes(
    model: nn.Module, test: ImageSet, classes: Sequence[str], config: RunConfig, name: str
) -> OtherResult:
    """Attacks a model of any classes with the suite of `config`.

    Args:
        model: pixels → logits (N, K).
        test: labels from 0 to K - 1.
        classes: their names (K).
    """
    result = evaluate_suite(model, test.images, test.labels, test.patients, config, classes=classes)
    labels, patients = test.labels.numpy(), test.patients.numpy()
    robust = ~misclassified(result.clean_logits, labels)

    def scores() -> Scores:
        found = metrics.score_flags(robust, labels, patients, len(classes))
        return {key: Score.from_json(score, key) for key, score in found.items()}

    clean, worst = scores(), {}
    attacks: dict[str, dict[str, dict[str, float]]] = {}
    linf = {key: logits for key, logits in result.logits.items() if _is_linf(result.meta[key])}
    for eps in sorted({eps for eps, _ in linf}, key=parse_eps):
        for (at, attack), logits in linf.items():
            if at == eps:
                wrong = misclassified(logits, labels)
                robust &= ~wrong
                counted = ~np.isnan(logits).any(1)
                attacks.setdefault(eps, {})[attack] = {
                    "accuracy": round(float((~wrong)[counted].mean()), 6),
                    "n_slices": int(counted.sum()),
                    "n_attacked": result.meta[at, attack]["n_attacked"],
                }
        worst[eps] = scores()
    return OtherResult(
        model=name,
        classes=tuple(classes),
        suite=config.suite,
        clean=clean,
        worst=worst,
        attacks=attacks,
        sanity=result.sanity,
        n_slices=len(test),
        n_patients=len(np.unique(patients)),
    )


def card_of_other(result: OtherResult) -> Card:
    """The card of a result."""
    return Card(
        model=result.model,
        suite=result.suite,
        clean=result.clean,
        worst=result.worst,
        shown={
            "balanced_accuracy": f"balanced accuracy, {len(result.classes)} classes (%)",
            "accuracy": "accuracy (%)",
        },
        checks=result.sanity,
        n_slices=result.n_slices,
        n_patients=result.n_patients,
        content=result.to_json(),
    )


def _is_linf(meta: dict) -> bool:
    return meta["norm"] == "linf"


def other_text(result: OtherResult) -> str:
    """The result as a table for a terminal."""
    lines = [
        f"{result.model}: {result.n_slices:,} images, classes {', '.join(result.classes)}; percent "
        "with 95 % intervals",
        f"{'':<28}{'balanced accuracy':<24}accuracy",
    ]
    rows = {"clean": result.clean} | {
        f"worst case at {eps}": scores for eps, scores in result.worst.items()
    }
    for title, scores in rows.items():
        cells = [show(scores[name]) for name in ("balanced_accuracy", "accuracy")]
        lines.append(f"{title:<28}{cells[0]:<24}{cells[1]}")
    lines.append("")
    for eps, found in result.attacks.items():
        single = ", ".join(f"{name} {100 * one['accuracy']:.1f}" for name, one in found.items())
        lines.append(f"accuracy at {eps} under each attack alone: {single}")
    return "\n".join(lines)
