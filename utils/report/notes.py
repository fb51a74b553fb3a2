"""What a page reports besides its claims, as values: scores without the patients of a choice, the
counts of a withdrawn claim, and how much of a map lies on planted evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.evaluation import comparisons
from utils.evaluation.rows import TableRow
from utils.evaluation.schema import CleanScores, Score
from utils.utils_funcs import MODELS, read_json


@dataclass(frozen=True)
class WithoutSearchPatients:
    """Scores of a row without the patients on whom its settings were chosen."""

    row: TableRow
    protocol: str
    scores: CleanScores


def without_search_patients(rows: Sequence[TableRow]) -> list[WithoutSearchPatients]:
    """For every record whose search saw patients that are test patients of another fold."""
    return [
        WithoutSearchPatients(row, protocol, record.clean_without_search_patients)
        for row in rows[1:]
        if row.variant is None
        for protocol, record in row.records.items()
        if record.clean_without_search_patients
    ]


@dataclass(frozen=True)
class ProbeCounts:
    """Of `n_records`, in how many PGD seems to destroy the recognition of patients before their
    diagnoses, and in how many after them, by uncorrected intervals that exclude 0."""

    n_records: int
    patients_first: int
    diagnoses_first: int


@dataclass(frozen=True)
class WithdrawnClaim:
    """How often the probe by features says which of the two an attack destroys first, where slices
    close to the image do not count, and where all slices count."""

    eps: str
    distant_slices: ProbeCounts
    all_slices: ProbeCounts


def withdrawn_claim(rows: Sequence[TableRow]) -> WithdrawnClaim | None:
    """The counts that contradict each other; None where no network was probed both ways."""
    records = []
    for row in rows:
        if row.model in MODELS and row.variant is None:
            for record in row.records.values():
                probe = comparisons.pooled_probe(record)
                if probe and probe.neighbor:
                    records.append(record)
    if not records:
        return None
    distant = comparisons.probe_differences(records, "recognized")
    every = comparisons.probe_differences(records, "neighbor")
    return WithdrawnClaim(
        comparisons.PROBE_EPS,
        ProbeCounts(len(distant), *comparisons.away_from_zero(distant)),
        ProbeCounts(len(every), *comparisons.away_from_zero(every)),
    )


@dataclass(frozen=True)
class PlantedMap:
    """How much of a backbone's map lies on planted evidence.

    training: `whole`, or what of the network was trained in which order.
    method: the kind of map of which the least lies there; share: how much, between 0 and 1.
    cells: along one side of the map's grid, the finest that was tried.
    noise: whether the image around the evidence is noise, or plain gray.
    """

    backbone: str
    training: str
    method: str
    share: Score
    n: int
    cells: int
    noise: bool


@dataclass(frozen=True)
class PlantedEvidence:
    """What maps show of phantom images in which one patch alone decides the class.

    area: of the patch, as a share of the image; init: weights from which the networks started.
    """

    area: float
    init: str
    maps: tuple[PlantedMap, ...]


def planted_evidence(root: Path) -> PlantedEvidence | None:
    """What `tests/benchmarks/planted_evidence.py` recorded under `root`; None where it did not."""
    path = root / "assets" / "planted_evidence.json"
    if not path.is_file():
        return None
    record = read_json(path)
    finest = {
        (backbone, row["training"]): row
        for backbone, rows in sorted(record["backbones"].items())
        for row in sorted(rows, key=lambda row: row["cells"])
    }
    maps = []
    for (backbone, training), row in finest.items():
        method, share = min(row["inside"].items(), key=lambda item: item[1]["value"])
        score = Score.from_json(share, f"{path}: {backbone}")
        maps.append(
            PlantedMap(backbone, training, method, score, share["n"], row["cells"], row["noise"])
        )
    area = next(iter(finest.values()))["area"]
    return PlantedEvidence(area, record["init"], tuple(maps))
