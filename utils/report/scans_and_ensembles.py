"""Tables and figures of ensembles and of whole scans, from their records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils import metrics
from utils.drawing import (
    BASE,
    GREY,
    MISSING,
    canvas,
    interval_bars,
    known_point,
    save_figure,
    show,
    size_of,
    styled,
)
from utils.evaluation.records import read_records
from utils.evaluation.rows import provenance
from utils.evaluation.schema import AttackScores, Record, Score, attacks_of, clean_of

#: The share of patients whose true class a conformal set may miss.
ALPHA = 0.1

AGGREGATOR_COLORS = {
    "mean": "#8C8C8C",
    "attention": "#E69F00",
    "gru": "#882255",
    "transformer": "#0072B2",
}


ATTACK_TITLES = {
    "one_image": "one image for all members (feasible)",
    "separate_images": "an image a member, same strength (no input)",
    "original_project": "an image a member, 10 steps of 0.0001 (the original project's step)",
}


ATTACK_COLORS = {
    "one_image": "#CC79A7",
    "separate_images": "#8C8C8C",
    "original_project": "#E69F00",
}


def ensemble_text(record: Record) -> str:
    """Weights of each form by fold, the members' scores and diversity, and the accuracy under one
    image for all members and under one for each."""
    lines = [
        "Weights, fitted on validation patients (pools: coefficients of the members' "
        "log-probabilities)"
    ]
    for run in record.runs:
        for variant, done in run.variants.items():
            weights = done["weights"].get("weights") or done["weights"]["coefficients"]
            values = "  ".join(f"{name} {value:.2f}" for name, value in weights.items())
            lines.append(f"  fold {run.fold}  {variant:<17} {values}")
    lines.append(
        "\nMembers alone on the same clean test slices: balanced accuracy over three classes (%)"
    )
    for run in record.runs:
        for name, score in (run.members).items():
            size = f"n = {score.n_slices:,} / {score.n_patients:,}"
            lines.append(f"  fold {run.fold}  {name:<17} {show(score):<20} {size}")
    lines.append(
        "\nDiversity on clean test slices: share of different answers, correlation of errors"
    )
    for run in record.runs:
        for pair, scores in run.diversity.items():
            correlation = show(scores["error_correlation"], "decimal")
            lines.append(
                f"  fold {run.fold}  {pair:<36} {show(scores['disagreement']):<20} % {correlation}"
            )
    lines.append("\nOne image for all members, and one a member, which is no input: accuracy (%)")
    for variant, eps, name, block in _relaxed(record):
        accuracy = show(block.scores["accuracy"])
        size = f"n = {block.n_slices:,} / {block.n_patients:,}"
        lines.append(
            f"  {variant:<16} eps {eps:<7} {ATTACK_TITLES[name]:<58} {accuracy:<20} {size}"
        )
    return "\n".join(lines)


def _relaxed(record: Record) -> list[tuple[str, str, str, AttackScores]]:
    """(variant, eps, attack, scores) of the attacks that compare one image for all members with one
    for each."""
    return [
        (variant, eps, name, block)
        for variant, evaluation in record.variants.items()
        for eps, attacks in evaluation.other_norms.get("relaxed", {}).items()
        for name, block in attacks.items()
    ]


@styled
def relaxation_figure(record: Record) -> Figure:
    """Accuracy of each uniform ensemble under one image, and under a separate image a member."""
    found = _relaxed(record)
    sweep = list(dict.fromkeys(eps for _, eps, _, _ in found))
    figure, axes = canvas(
        1,
        len(sweep),
        (4.6 * len(sweep), 3.6),
        "An ensemble attacked as one model, and as several",
        provenance([record]),
        sharey=True,
    )
    for panel, eps in zip(axes[0], sweep, strict=True):
        blocks = {(variant, name): block for variant, at, name, block in found if at == eps}
        variants = list(dict.fromkeys(variant for variant, _ in blocks))
        for offset, name in zip((-0.25, 0, 0.25), ATTACK_TITLES, strict=True):
            for place, variant in enumerate(variants):
                point = known_point(blocks[variant, name].scores["accuracy"])
                panel.bar(
                    place + offset,
                    point[0],
                    0.23,
                    color=ATTACK_COLORS[name],
                    label=ATTACK_TITLES[name] if place == 0 else None,
                )
                bars = interval_bars(point)
                panel.errorbar(place + offset, point[0], bars, color=BASE, linewidth=1, capsize=2)
        panel.set(
            xticks=range(len(variants)),
            xticklabels=variants,
            ylim=(0, 100),
            title=f"eps {eps} · {size_of(next(iter(blocks.values())))}",
        )
    axes[0][0].set_ylabel("robust accuracy (%)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower left")
    return figure


@styled
def diversity_figure(record: Record) -> Figure:
    """Share of different answers (above) and correlation of errors (below the diagonal) of every
    pair of members."""
    pairs = [pair for run in record.runs for pair in run.diversity]
    names = list(dict.fromkeys(name for pair in pairs for name in pair.split(" / ")))
    figure, axes = canvas(
        1,
        len(record.runs),
        (4.4 * len(record.runs), 4.2),
        "How unlike the members are on clean test slices",
        provenance([record]),
    )
    for panel, run in zip(axes[0], record.runs, strict=True):
        grid = np.full((len(names), len(names)), np.nan)
        for pair, scores in run.diversity.items():
            a, b = (names.index(name) for name in pair.split(" / "))
            for place, key in (((a, b), "disagreement"), ((b, a), "error_correlation")):
                if scores[key].value is not None:
                    grid[place] = scores[key].value
        panel.imshow(grid, cmap="BuPu", vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(grid):
            text = "" if row == column else MISSING if np.isnan(value) else f"{value:.2f}"
            panel.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value > 0.6 else BASE,
            )
        panel.grid(False)
        panel.set(
            xticks=range(len(names)),
            yticks=range(len(names)),
            yticklabels=names,
            title=f"fold {run.fold}: above the diagonal different answers,\n"
            "below it correlation of errors",
        )
        panel.set_xticklabels(names, rotation=45, ha="right", color=GREY)
    return figure


# -- whole scans -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PatientReliability:
    """How far the answers about patients can be trusted, clean or at one eps.

    coverage: share of conformal sets that hold the true class; set_size: their mean size, of three
        classes.
    risk: error among those answered at least as confidently as the median of clean scans; answered:
        their share.
    """

    coverage: Score
    set_size: float
    risk: Score
    answered: float
    n_patients: int


def patient_reliability(
    record: Record, variant: str, alpha: float = ALPHA
) -> dict[str, PatientReliability]:
    """`clean` and each `eps …` → how far the answers of a variant can be trusted there.

    Thresholds are of clean scans in every case: an attacker does not wait for a recalibration.
    """
    logits = clean_of(record.predictions, variant)
    declared = metrics.scored(logits)  # a fold whose members were not trained has no answers
    rows, clean = record.rows.take(declared), logits[declared].astype(np.float64)
    folds = record.predictions["fold"][declared].astype(int)
    thresholds = metrics.cross_conformal(clean, rows.labels, folds, alpha)
    half = np.median(metrics.merge_classes(metrics.probabilities(clean)).max(axis=1))
    answers = {"clean": clean} | {
        f"eps {eps}": attacked[declared]
        for eps, attacks in attacks_of(record.predictions, variant).items()
        for attacked in attacks.values()
    }
    found = {}
    for name, given in answers.items():
        inside = metrics.scored(given)
        part, logits = rows.take(inside), given[inside].astype(np.float64)
        truth = metrics.THREE[part.labels]
        covered = metrics.conformal_sets(logits, thresholds[inside])
        probability = metrics.merge_classes(metrics.probabilities(logits))
        coverage = metrics.share(covered[np.arange(len(truth)), truth], part.labels, part.patients)
        selective = metrics.selective_risk(
            probability.argmax(axis=1) != truth,
            probability.max(axis=1),
            half,
            part.labels,
            part.patients,
        )
        found[name] = PatientReliability(
            Score.from_json(coverage, "coverage"),
            float(covered.sum(axis=1).mean()),
            Score(value=selective["risk"], ci=selective["ci"] and tuple(selective["ci"])),
            selective["answered"],
            len(truth),
        )
    return found


def sequence_text(record: Record, alpha: float = ALPHA) -> str:
    """Conformal sets and abstention of every variant, on clean and on attacked scans."""
    lines = [
        "Conformal sets over three classes, calibrated on the other half of each fold's test "
        f"patients for {1 - alpha:.0%} coverage;",
        "abstention: the half of the patients answered most confidently, and the same threshold "
        "under attack",
        "",
        f"{'':<34}{'scans':<16}{'coverage (%)':<22}{'mean set size':<15}"
        f"{'error when half answer (%)':<30}{'answered':<10}n patients",
    ]
    for variant in record.variants:
        for name, found in patient_reliability(record, variant, alpha).items():
            lines.append(
                f"{variant:<34}{name:<16}{show(found.coverage):<22}{found.set_size:<15.2f}{show(found.risk):<30}"
                f"{found.answered:<10.0%}{found.n_patients}"
            )
    return "\n".join(lines)


@dataclass(frozen=True)
class PooledBudgets:
    """How many patients are still diagnosed right when an attacker may change so many of their
    slices, at one eps.

    robust: the share at each of `budgets`.
    """

    budgets: list[int]
    robust: list[Score]
    n_patients: int
    eps: str


def pooled_budgets(record: Record, variant: str, choice: str) -> PooledBudgets:
    """The slice budgets of all folds that have the variant.

    Args:
        choice: how slices are chosen, `gradient` or `random`.
    """
    parts = [
        run.of_variant(variant)["slice_budget"] for run in record.runs if run.of_variant(variant)
    ]
    labels, patients = (
        np.concatenate([part[key] for part in parts]) for key in ("labels", "people")
    )
    # The least number of slices that turned a diagnosis; below 0 where no number did.
    least = np.concatenate([part["least"][choice] for part in parts])
    budgets = parts[0]["budgets"]
    robust = [metrics.share((least < 0) | (least > budget), labels, patients) for budget in budgets]
    scores = [Score.from_json(share, "share") for share in robust]
    return PooledBudgets(budgets, scores, len(labels), parts[0]["eps"])


@dataclass(frozen=True)
class ChoiceOfSlices:
    """Whether slices chosen by gradient flip a scan's diagnosis sooner than slices at random, over
    all variants and budgets of more than no and fewer than all slices.

    sooner, later: in how many comparisons fewer, or more, patients are robust against slices chosen
        by gradient, by an uncorrected paired interval that excludes zero; least, most: the
        smallest and the largest difference of robust shares, gradient minus random.
    """

    n_comparisons: int
    sooner: int
    later: int
    least: float
    most: float
    n_patients: int


def choice_of_slices(record: Record) -> ChoiceOfSlices | None:
    """The comparison of both choices; None where no scan was attacked slice by slice."""
    differences: list[Score] = []
    n_patients = 0
    for variant in record.variants:
        parts = [
            part for run in record.runs if (part := run.of_variant(variant).get("slice_budget"))
        ]
        if not parts:
            continue
        labels, patients = (
            np.concatenate([part[key] for part in parts]) for key in ("labels", "people")
        )
        n_patients = max(n_patients, len(np.unique(patients)))
        least = {
            choice: np.concatenate([part["least"][choice] for part in parts])
            for choice in ("gradient", "random")
        }
        for budget in parts[0]["budgets"][1:-1]:
            chosen, at_random = (
                (least[choice] < 0) | (least[choice] > budget) for choice in ("gradient", "random")
            )
            found = metrics.paired_robust_difference(
                (chosen, chosen), (at_random, at_random), labels, patients
            )["accuracy"]
            differences.append(Score.from_json(found, "difference"))
    if not differences:
        return None
    values = [score.value or 0.0 for score in differences]
    bounds = [score.bounds or (0.0, 0.0) for score in differences]
    return ChoiceOfSlices(
        len(differences),
        sum(high < 0 for _, high in bounds),
        sum(low > 0 for low, _ in bounds),
        min(values),
        max(values),
        n_patients,
    )


def _panels_of_sources(
    record: Record, title: str
) -> tuple[Figure, np.ndarray, dict[str, list[tuple[str, str]]]]:
    """A figure with one panel for each source of features, the panels, and source → its (variant,
    aggregator)s."""
    sources: dict[str, list[tuple[str, str]]] = {}
    for variant in record.variants:
        source, aggregator = variant.rsplit(" ", 1)
        sources.setdefault(source, []).append((variant, aggregator))
    size = (max(7.6, 3.6 * len(sources) + 1.8), 3.8)
    figure, axes = canvas(1, len(sources), size, title, provenance([record]), sharey=True)
    return figure, axes[0], sources


@styled
def slice_budget_figure(record: Record) -> Figure:
    """Patients whose diagnosis is right and robust against the number of slices that an attacker
    may change; one panel a source of features."""
    figure, panels, sources = _panels_of_sources(
        record, "How many slices must be touched to flip a patient's diagnosis"
    )
    for panel, (source, variants) in zip(panels, sources.items(), strict=True):
        for variant, aggregator in variants:
            color = AGGREGATOR_COLORS[aggregator]
            chosen = pooled_budgets(record, variant, "gradient")
            at_random = pooled_budgets(record, variant, "random")
            value, low, high = np.array([known_point(score) for score in chosen.robust]).T
            places = range(len(chosen.budgets))
            panel.plot(
                places, value, "-", color=color, label=aggregator, marker="o", markersize=3.5
            )
            panel.fill_between(places, low, high, color=color, alpha=0.10, linewidth=0)
            of_random = [known_point(score)[0] for score in at_random.robust]
            panel.plot(places, of_random, ":", color=color)
        panel.set(
            xticks=places,
            xticklabels=chosen.budgets,
            xlabel="slices touched",
            ylim=(0, 100),
            title=f"{source}\neps {chosen.eps} · n = {chosen.n_patients} patients",
        )
    panels[0].set_ylabel("diagnoses right and robust (%)")
    figure.legend(
        *panels[-1].get_legend_handles_labels(),
        loc="outside right upper",
        title="solid: chosen by gradient\ndotted: at random",
    )
    return figure


@styled
def abstention_figure(record: Record) -> Figure:
    """Error against the share of patients answered, clean and at the largest eps; one panel a
    source of features."""
    figure, panels, sources = _panels_of_sources(
        record, "Answer only when sure: error among the patients answered"
    )
    for panel, (source, variants) in zip(panels, sources.items(), strict=True):
        for variant, aggregator in variants:
            color = AGGREGATOR_COLORS[aggregator]
            clean = clean_of(record.predictions, variant)
            count = _risk_curve(panel, record, clean, color, aggregator)
            eps, attacked = _largest_eps(record, variant)
            counts = [_risk_curve(panel, record, logits, color) for logits in attacked]
        size = f"n = {count} patients" + (f", {counts[-1]} attacked" if counts else "")
        panel.set(
            xlabel="patients answered (%)", ylim=(0, 100), xlim=(8, 102), title=f"{source}\n{size}"
        )
    panels[0].set_ylabel("error, three classes (%)")
    figure.legend(
        *panels[-1].get_legend_handles_labels(),
        loc="outside right upper",
        title="solid: clean\ndotted: attacked" + (f" at {eps}" if eps else ""),
    )
    return figure


def _largest_eps(record: Record, variant: str) -> tuple[str, list[np.ndarray]]:
    """The largest eps and the logits (N, 4) of each attack there; an empty text and list where
    there was no attack."""
    sweep = attacks_of(record.predictions, variant)
    eps = [*sweep][-1] if sweep else ""
    return eps, [*sweep.get(eps, {}).values()]


def _risk_curve(
    panel: Axes, record: Record, logits: np.ndarray, color: str, label: str | None = None
) -> int:
    """Draws error against coverage of logits (N, 4): solid with its interval if it gets a label,
    else dotted. Returns the number of patients."""
    inside = metrics.scored(logits)
    part = record.rows.take(inside)
    curve = metrics.risk_coverage(logits[inside].astype(np.float64), part.labels, part.patients)
    coverage = [100 * point["coverage"] for point in curve]
    risk = [100 * point["risk"] for point in curve]
    panel.plot(coverage, risk, "-" if label else ":", color=color, label=label)
    if label:
        low, high = ([100 * point["ci"][side] for point in curve] for side in (0, 1))
        panel.fill_between(coverage, low, high, color=color, alpha=0.08, linewidth=0)
    return part.n_slices


#: Model → file name → figure of its record.
FIGURES = {
    "Ensemble": {"relaxation": relaxation_figure, "diversity": diversity_figure},
    "Sequence": {"slice_budget": slice_budget_figure, "abstention": abstention_figure},
}


def draw_figures(root: Path | str) -> dict[Path, Figure]:
    """Writes and returns the figures of ensembles and whole scans under `root`, path → figure."""
    drawn = {}
    for (model, protocol), record in read_records(root).items():
        for name, draw in FIGURES.get(model, {}).items():
            path = Path(root) / "assets" / model / f"{name}_{protocol}.png"
            drawn[path] = figure = draw(record)
            save_figure(figure, path)
    return drawn
