"""Records of ensembles and of whole persons → their tables and figures; no data, weights or GPU needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from utils import metrics
from utils.figures import BASE, GREY, canvas, save_figure, show, styled
from utils.records import Entry, attacks_of, clean_of, provenance, read_entries

#: One miss in so many is what a conformal set allows itself.
ALPHA = 0.1
AGGREGATOR_COLOURS = {
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
ATTACK_COLOURS = {
    "one_image": "#CC79A7",
    "separate_images": "#8C8C8C",
    "original_project": "#E69F00",
}


# ----------------------------------------------------------------------------------------------------------- ensembles


def ensemble_text(record: dict) -> str:
    """Weights of each form by fold, the members' own scores and diversity, and what one image and several leave standing."""
    lines = [
        "Weights, fitted on validation people (pools: coefficients of the members' log-probabilities)"
    ]
    for run in record["units"]:
        for variant, own in run["variants"].items():
            weights = own["weights"].get("weights") or own["weights"]["coefficients"]
            lines.append(
                f"  fold {run['fold']}  {variant:<17} "
                + "  ".join(f"{name} {value:.2f}" for name, value in weights.items())
            )
    lines.append(
        "\nMembers alone on the same clean test slices: balanced accuracy over three classes (%)"
    )
    for run in record["units"]:
        for name, own in run.get("members", {}).items():
            lines.append(
                f"  fold {run['fold']}  {name:<17} {show(own):<20} n = {own['n_slices']:,} / {own['n_people']:,}"
            )
    lines.append(
        "\nDiversity on clean test slices: share of different answers, correlation of errors"
    )
    for run in record["units"]:
        for pair, own in run["diversity"].items():
            lines.append(
                f"  fold {run['fold']}  {pair:<36} {show(own['disagreement']):<20} % {show(own['error_correlation'], 'decimal')}"
            )
    lines.append("\nOne image for all members, and one a member, which is no input: accuracy (%)")
    for variant, eps, name, block in _relaxed(record):
        lines.append(
            f"  {variant:<16} eps {eps:<7} {ATTACK_TITLES[name]:<58} {show(block['accuracy']):<20} n = {block['n_slices']:,} / "
            f"{block['n_people']:,}"
        )
    return "\n".join(lines)


def _relaxed(record: dict) -> list[tuple[str, str, str, dict]]:
    return [
        (variant, eps, name, block)
        for variant, blocks in record["variants"].items()
        for eps, attacks in blocks["other_norms"].get("relaxed", {}).items()
        for name, block in attacks.items()
    ]


@styled
def relaxation_figure(entry: Entry) -> Figure:
    """Accuracy of each uniform ensemble under one image, and under a separate image a member."""
    found = _relaxed(entry.record)
    sweep = list(dict.fromkeys(eps for _, eps, _, _ in found))
    figure, axes = canvas(
        1,
        len(sweep),
        (4.6 * len(sweep), 3.6),
        "An ensemble attacked as one model, and as several",
        provenance([entry]),
        sharey=True,
    )
    for panel, eps in zip(axes[0], sweep, strict=True):
        variants = list(dict.fromkeys(variant for variant, own, _, _ in found if own == eps))
        for offset, name in zip((-0.25, 0, 0.25), ATTACK_TITLES, strict=True):
            for place, variant in enumerate(variants):
                block = next(
                    block for v, e, n, block in found if (v, e, n) == (variant, eps, name)
                )["accuracy"]
                value, (low, high) = 100 * block["value"], (100 * bound for bound in block["ci"])
                panel.bar(
                    place + offset,
                    value,
                    0.23,
                    color=ATTACK_COLOURS[name],
                    label=ATTACK_TITLES[name] if place == 0 else None,
                )
                panel.errorbar(
                    place + offset,
                    value,
                    [[value - low], [high - value]],
                    color=BASE,
                    linewidth=1,
                    capsize=2,
                )
        size = next(block for _, own, _, block in found if own == eps)
        panel.set(
            xticks=range(len(variants)),
            xticklabels=variants,
            ylim=(0, 100),
            title=f"eps {eps} · n = {size['n_slices']:,} slices of {size['n_people']:,} people",
        )
    axes[0][0].set_ylabel("accuracy left (%)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower left")
    return figure


# ------------------------------------------------------------------------------------------------------- whole persons


def sequence_text(entry: Entry, alpha: float = ALPHA) -> str:
    """Conformal sets and abstention of every form, on clean and on attacked studies."""
    lines = [
        f"Conformal sets over three classes, calibrated on the other half of each fold's test people for {1 - alpha:.0%} coverage;",
        "abstention: the half of the people answered most confidently, and the same threshold under attack",
        "",
        f"{'':<34}{'studies':<16}{'coverage (%)':<22}{'mean set size':<15}{'error when half answer (%)':<30}{'answered':<10}n people",
    ]
    for variant in entry.record["variants"]:
        for name, own in patient_reliability(entry, variant, alpha).items():
            answered = (
                "–"
                if own["selective"]["answered"] is None
                else f"{own['selective']['answered']:.0%}"
            )
            risk = {"value": own["selective"]["risk"], "ci": own["selective"]["ci"]}
            lines.append(
                f"{variant:<34}{name:<16}{show(own['coverage']):<22}{own['set_size']:<15.2f}{show(risk):<30}"
                f"{answered:<10}{own['n_people']}"
            )
    return "\n".join(lines)


def patient_reliability(entry: Entry, variant: str, alpha: float = ALPHA) -> dict[str, dict]:
    """`clean` and each eps → {"coverage" (score), "set_size", "selective" (`metrics.selective_risk`), "n_people"}.

    Thresholds are of clean studies in every case: an attacker does not wait for a recalibration.
    """
    declared = metrics.scored(
        clean_of(entry.predictions, variant)
    )  # a fold whose members were not trained has no answers
    rows, clean = (
        entry.rows.take(declared),
        clean_of(entry.predictions, variant)[declared].astype(np.float64),
    )
    thresholds = metrics.cross_conformal(
        clean, rows.labels, entry.predictions["fold"][declared].astype(int), alpha
    )
    half = np.median(metrics.merge_classes(metrics.probabilities(clean)).max(axis=1))
    found = {}
    studies = {"clean": clean} | {
        f"eps {eps}": logits[declared]
        for eps, own in attacks_of(entry.predictions, variant).items()
        for logits in own.values()
    }
    for name, logits in studies.items():
        inside = metrics.scored(logits)
        own, who = logits[inside].astype(np.float64), rows.take(inside)
        sets = metrics.conformal_sets(own, thresholds[inside])
        truth = metrics.THREE[who.labels]
        probability = metrics.merge_classes(metrics.probabilities(own))
        found[name] = {
            "coverage": metrics.share(sets[np.arange(len(truth)), truth], who.labels, who.patients),
            "set_size": float(sets.sum(axis=1).mean()),
            "selective": metrics.selective_risk(
                probability.argmax(axis=1) != truth,
                probability.max(axis=1),
                half,
                who.labels,
                who.patients,
            ),
            "n_people": len(truth),
        }
    return found


def pooled_budgets(
    record: dict, variant: str, choice: str
) -> tuple[list[int], list[dict], int, str]:
    """(budgets, share of people standing at each with its interval, n people, eps), pooled over the folds that have the form."""
    parts = [
        run["variants"][variant]["slice_budget"]
        for run in record["units"]
        if variant in run["variants"]
    ]
    labels, patients = (
        np.concatenate([part[key] for part in parts]) for key in ("labels", "people")
    )
    least, budgets = np.concatenate([part["least"][choice] for part in parts]), parts[0]["budgets"]
    return (
        budgets,
        [metrics.share((least < 0) | (least > budget), labels, patients) for budget in budgets],
        len(labels),
        parts[0]["eps"],
    )


@styled
def slice_budget_figure(entry: Entry) -> Figure:
    """People whose diagnosis stands against the number of slices that an attacker may touch; one panel a backbone."""
    variants = list(entry.record["variants"])
    sources = list(dict.fromkeys(variant.rsplit(" ", 1)[0] for variant in variants))
    figure, axes = canvas(
        1,
        len(sources),
        (max(7.6, 3.6 * len(sources) + 1.8), 3.8),
        "How many slices must be touched to flip a person's diagnosis",
        provenance([entry]),
        sharey=True,
    )
    for panel, source in zip(axes[0], sources, strict=True):
        for variant in (name for name in variants if name.rsplit(" ", 1)[0] == source):
            colour = AGGREGATOR_COLOURS[variant.rsplit(" ", 1)[1]]
            for choice, dashes in (("gradient", "-"), ("random", ":")):
                budgets, shares, count, eps = pooled_budgets(entry.record, variant, choice)
                value, low, high = (
                    100
                    * np.array(
                        [share[key] if key == "value" else share["ci"][key] for share in shares]
                    )
                    for key in ("value", 0, 1)
                )
                panel.plot(
                    range(len(budgets)),
                    value,
                    dashes,
                    color=colour,
                    label=variant.rsplit(" ", 1)[1] if choice == "gradient" else None,
                    marker="o" if choice == "gradient" else None,
                    markersize=3.5,
                )
                if choice == "gradient":
                    panel.fill_between(
                        range(len(budgets)), low, high, color=colour, alpha=0.10, linewidth=0
                    )
        panel.set(
            xticks=range(len(budgets)),
            xticklabels=budgets,
            xlabel="slices touched",
            ylim=(0, 100),
            title=f"{source}\neps {eps} · n = {count} people",
        )
    axes[0][0].set_ylabel("diagnoses right and standing (%)")
    figure.legend(
        *axes[0][-1].get_legend_handles_labels(),
        loc="outside right upper",
        title="solid: chosen by gradient\ndotted: at random",
    )
    return figure


@styled
def abstention_figure(entry: Entry) -> Figure:
    """Error against the share of people answered, clean and under the study attack; one panel a backbone."""
    variants = list(entry.record["variants"])
    sources = list(dict.fromkeys(variant.rsplit(" ", 1)[0] for variant in variants))
    figure, axes = canvas(
        1,
        len(sources),
        (max(7.6, 3.6 * len(sources) + 1.8), 3.8),
        "Answer only when sure: error among the people answered",
        provenance([entry]),
        sharey=True,
    )
    for panel, source in zip(axes[0], sources, strict=True):
        for variant in (name for name in variants if name.rsplit(" ", 1)[0] == source):
            colour = AGGREGATOR_COLOURS[variant.rsplit(" ", 1)[1]]
            attacked = list(attacks_of(entry.predictions, variant).items())[-1:]
            studies = [("clean", clean_of(entry.predictions, variant), "-")] + [
                (eps, logits, ":") for eps, own in attacked for logits in own.values()
            ]
            for name, logits, dashes in studies:
                inside = metrics.scored(logits)
                who = entry.rows.take(inside)
                curve = metrics.risk_coverage(
                    logits[inside].astype(np.float64), who.labels, who.patients
                )
                x, y = (
                    [100 * point["coverage"] for point in curve],
                    [100 * point["risk"] for point in curve],
                )
                panel.plot(
                    x,
                    y,
                    dashes,
                    color=colour,
                    label=variant.rsplit(" ", 1)[1] if name == "clean" else None,
                )
                if name == "clean":
                    panel.fill_between(
                        x,
                        [100 * point["ci"][0] for point in curve],
                        [100 * point["ci"][1] for point in curve],
                        color=colour,
                        alpha=0.08,
                        linewidth=0,
                    )
        n = f"n = {int(metrics.scored(studies[0][1]).sum())} people" + (
            f", {int(inside.sum())} attacked" if len(studies) > 1 else ""
        )
        panel.set(
            xlabel="people answered (%)", ylim=(0, 100), xlim=(8, 102), title=f"{source}\n{n}"
        )
    axes[0][0].set_ylabel("error, three classes (%)")
    figure.legend(
        *axes[0][-1].get_legend_handles_labels(),
        loc="outside right upper",
        title="solid: clean\ndotted: attacked" + (f" at {attacked[0][0]}" if attacked else ""),
    )
    return figure


@styled
def diversity_figure(entry: Entry) -> Figure:
    """Share of different answers (above) and correlation of errors (below the diagonal) of every pair of members."""
    runs = entry.record["units"]
    names = list(
        dict.fromkeys(
            name for run in runs for pair in run["diversity"] for name in pair.split(" / ")
        )
    )
    figure, axes = canvas(
        1,
        len(runs),
        (4.4 * len(runs), 4.2),
        "How unlike the members are on clean test slices",
        provenance([entry]),
    )
    for panel, run in zip(axes[0], runs, strict=True):
        grid = np.full((len(names), len(names)), np.nan)
        for pair, own in run["diversity"].items():
            a, b = (names.index(name) for name in pair.split(" / "))
            grid[a, b], grid[b, a] = (
                np.nan if own[key]["value"] is None else own[key]["value"]
                for key in ("disagreement", "error_correlation")
            )
        panel.imshow(grid, cmap="BuPu", vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(grid):
            text = "" if row == column else "–" if np.isnan(value) else f"{value:.2f}"
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
            title=f"fold {run['fold']}: above the diagonal different answers,\nbelow it correlation of errors",
        )
        panel.set_xticklabels(names, rotation=45, ha="right", color=GREY)
    return figure


#: Model → file name → figure of its entry.
FIGURES = {
    "Ensemble": {"relaxation": relaxation_figure, "diversity": diversity_figure},
    "Sequence": {"slice_budget": slice_budget_figure, "abstention": abstention_figure},
}


def draw_figures(root: Path | str) -> dict[Path, Figure]:
    """Writes and returns the figures of ensembles and whole persons under `root`, path → figure."""
    drawn = {}
    for (model, protocol), entry in read_entries(root).items():
        for name, draw in FIGURES.get(model, {}).items():
            figure = draw(entry)
            drawn[save_figure(figure, Path(root) / "assets" / model / f"{name}_{protocol}.png")] = (
                figure
            )
    return drawn
