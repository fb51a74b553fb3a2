"""Our figures next to those of the project from which this repository grew."""

from __future__ import annotations

from dataclasses import dataclass

from utils.drawing import MISSING, show
from utils.evaluation.records import Records, without_rehearsals
from utils.evaluation.schema import Score
from utils.report.rendering import render
from utils.report.tables import markdown
from utils.utils_funcs import PROTOCOLS

#: What the original project reported (published split, 224 px, L-infinity eps 0.005, accuracy in
#: percent): without and with adversarial training, and the latter under its own FGSM and PGD.
ORIGINAL = {
    "Dinov2": ("96.0", "92.0", "41.7", "71.9 to 73.7"),
    "Resnet": ("98.6", "93.4", "43.8", "88.6"),
    "Efficientnet": ("98.9", "99.5", "8.1", "98.7 to 98.8"),
}

ORIGINAL_EPS = "0.005"


def original_markdown(records: Records) -> str:
    """The original project's figures next to ours, accuracy in percent, and why they differ."""
    records = without_rehearsals(records)
    titles = ["model", "reported: clean", "reported: FGSM", "reported: PGD"]
    for protocol in PROTOCOLS:
        titles += [
            f"ours, `{protocol}`: clean",
            f"ours, `{protocol}`: worst case at {ORIGINAL_EPS}",
        ]
    table = [titles]
    for backbone, (clean, trained, fgsm, pgd) in ORIGINAL.items():
        for model, reported in (
            (backbone, (clean, "0.3 to 3.4 over the three", "not given for each")),
            (f"{backbone}_atk", (trained, fgsm, pgd)),
        ):
            cells = [cell for protocol in PROTOCOLS for cell in _ours(records, model, protocol)]
            table.append([model, *reported, *cells])
    return render("original.md.j2", table=markdown(table))


@dataclass(frozen=True)
class OriginalClaim:
    """The original project's accuracy of a model under its own PGD, in percent as it was printed,
    and ours on the same split at the same eps, over all attacks."""

    model: str
    reported: str
    ours: Score
    n_slices: int
    n_patients: int


def original_claim(records: Records) -> OriginalClaim | None:
    """The claim that differs most from ours: EfficientNet-B0, adversarially trained."""
    record = records.get(("Efficientnet_atk", "slice"))
    worst = (record.worst_case or {}).get(ORIGINAL_EPS) if record else None
    if worst is None or "accuracy" not in worst.scores:
        return None
    reported = ORIGINAL["Efficientnet"][3]
    size = worst.n_slices, worst.n_patients
    return OriginalClaim("Efficientnet_atk", reported, worst.scores["accuracy"], *size)


def _ours(records: Records, model: str, protocol: str) -> tuple[str, str]:
    """Our accuracy on clean images and under all attacks at the original eps."""
    record = records.get((model, protocol))
    clean = record.clean if record else None
    worst = (record.worst_case or {}).get(ORIGINAL_EPS) if record else None
    cells = []
    for counted, scores in ((clean, clean and clean.slice), (worst, worst and worst.scores)):
        if counted and scores and "accuracy" in scores:
            size = f"(n = {counted.n_slices:,} / {counted.n_patients:,})"
            cells.append(f"{show(scores['accuracy'])} {size}")
        else:
            cells.append(MISSING)
    return cells[0], cells[1]
