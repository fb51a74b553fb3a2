"""Records → the numbered rows of every table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from utils.evaluation.records import PATIENT_UNDER_ATTACK, RECORDED, Records
from utils.evaluation.schema import Check, Evaluation, Record, WorstCase
from utils.utils_funcs import PROTOCOLS

CONSTANT = "Constant answer"

#: Where one member of an ensemble has more weight than this, the others decide nothing.
ONLY_MEMBER = 0.995


@dataclass(frozen=True)
class TableRow:
    """One line of every table and figure: a model, a variant of one, or the constant answer.

    evaluations, records: protocol → the row's scores, and the record that they come from.
    """

    number: int
    model: str
    variant: str | None
    evaluations: dict[str, Evaluation]
    records: dict[str, Record]

    @property
    def name(self) -> str:
        """What tables and figures call the row, such as `Resnet_atk` or `linear 32`."""
        if self.variant is None:
            return self.model
        if self.model == "Baselines":
            return self.variant.replace("_", " ").replace("neighbour", "neighbor")
        only = " or ".join(self._only_members())
        return f"{self.model} · {self.variant}" + (f" (all weight on {only})" if only else "")

    def _only_members(self) -> list[str]:
        """The member on which all fitted weight lies, of each run, where this is so in every run:
        an ensemble that is none, and whose name says so."""
        fitted = [
            run.of_variant(self.variant).get("weights", {}).get("weights", {})
            for record in self.records.values()
            for run in record.runs
            if self.variant in run.variants
        ]
        only = [
            max(weights, key=weights.get)
            for weights in fitted
            if max(weights.values(), default=0) > ONLY_MEMBER
        ]
        return list(dict.fromkeys(only)) if len(only) == len(fitted) else []

    @property
    def trained(self) -> bool:
        """Whether this is a network or made of networks, and not a control."""
        return self.model not in (CONSTANT, "Baselines")

    @property
    def counts_patients(self) -> bool:
        """Whether each decision of this row is about a patient, and not about a slice."""
        return self.model == "Sequence"

    def worst_case(self, protocol: str) -> WorstCase | None:
        """Its scores at the record's headline eps; None where no attack was run there."""
        return self.evaluations[protocol].worst_case.get(self.records[protocol].headline_eps)

    def checks(self, protocol: str) -> list[Check]:
        """The sanity checks of this row's evaluation, and of no other variant in the same
        record."""
        return [
            check
            for check in self.records[protocol].sanity
            if self.variant is None or check.variant == self.variant
        ]

    def folds(self, protocol: str) -> list[int]:
        """The folds that this row was scored on: a variant may be missing from some of its
        record's."""
        return sorted(
            {
                run.fold
                for run in self.records[protocol].runs
                if self.variant is None or self.variant in run.variants
            }
        )


def _constant_evaluation(record: Record) -> Evaluation:
    """The constant answer, clean and in the worst case, which is the same."""
    clean = record.constant_answer
    worst = WorstCase(
        scores={name: clean.slice[name] for name in PATIENT_UNDER_ATTACK},
        n_slices=clean.n_slices,
        n_patients=clean.n_patients,
        attacks=[],
    )
    return Evaluation(
        clean=clean, attacks={}, worst_case={record.headline_eps: worst}, other_norms={}
    )


def table_rows(records: Records) -> list[TableRow]:
    """The constant answer on the largest set of images, then every record and variant, numbered
    from 1 in the order of `RECORDED`."""
    if not records:
        return []
    largest: dict[str, Record] = {}
    for protocol in PROTOCOLS:
        if found := [record for record in records.values() if record.protocol == protocol]:
            largest[protocol] = max(found, key=lambda record: record.constant_answer.n_slices)
    constant = {protocol: _constant_evaluation(record) for protocol, record in largest.items()}
    rows = [TableRow(1, CONSTANT, None, constant, largest)]
    for model in RECORDED:
        of_model = {protocol: one for (name, protocol), one in records.items() if name == model}
        evaluations = {protocol: record.evaluations for protocol, record in of_model.items()}
        for variant in dict.fromkeys(name for found in evaluations.values() for name in found):
            of_variant = {
                protocol: found[variant]
                for protocol, found in evaluations.items()
                if variant in found
            }
            its_records = {protocol: of_model[protocol] for protocol in of_variant}
            rows.append(TableRow(len(rows) + 1, model, variant, of_variant, its_records))
    return rows


def provenance(records: Sequence[Record]) -> str:
    """What every figure and table must say: `data: real · profile cpu · random init`."""

    def distinct(values: Iterable[str]) -> str:
        return " + ".join(dict.fromkeys(values))

    data = distinct(record.data for record in records)
    profile = distinct(record.profile for record in records)
    init = distinct(record.init for record in records if record.model != "Baselines")
    return f"data: {data} · profile {profile}" + (f" · {init} init" if init else "")
