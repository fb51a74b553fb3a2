"""What notebooks print of data, searches, training defaults and checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optuna
from matplotlib.figure import Figure

from utils import data, optuna_search, training
from utils.cohort.table import COMMITTED_COHORT, Cohort, read_cohort
from utils.config import RunConfig
from utils.pipeline.driver import Run, on_fold_0
from utils.pipeline.stages import search_label
from utils.pipeline.workspace import Workspace, load_sets
from utils.report.tables import markdown
from utils.utils_funcs import CLASSES, ROOT, read_json

# --- Data ---------------------------------------------------------------------------------------


def balance_text(runs: list[Run]) -> str:
    """Patients and slices by class of each set, for the first run of each protocol."""
    first = {run.requested.protocol: run for run in reversed(runs)}
    return _balance_table(
        {
            f"{protocol} {run.requested.run_name} {name}": balance
            for protocol, run in first.items()
            for name, balance in _balances(run.workspace, run.requested).items()
        }
    )


def _balances(workspace: Workspace, config: RunConfig) -> dict[str, dict[str, tuple[int, int]]]:
    """Set → class → (patients, slices), from the prepared sets, or from the committed tables where
    there are no images."""
    if workspace.raw is not None:
        return {name: part.balance() for name, part in load_sets(workspace, config).items()}
    table, folds = read_cohort(COMMITTED_COHORT), data.read_folds(data.COMMITTED_FOLDS)
    sets = (
        data.split_slices(table)
        if config.protocol == "slice"
        else data.split_patients(table, folds, config.fold)
    )
    return {
        name: data.balance(table.label[rows], table.patient_id[rows]) for name, rows in sets.items()
    }


def _balance_table(balances: dict[str, dict[str, tuple[int, int]]]) -> str:
    lines = [f"{'':<32}" + "".join(f"{name:>22}" for name in CLASSES)]
    for title, balance in balances.items():
        cells = (f"{patients} patients, {slices:,}" for patients, slices in balance.values())
        lines.append(f"{title:<32}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def protocols_text(workspace: Workspace) -> str:
    """Patients and slices of each set of both protocols, all folds, by class."""
    return _balance_table(
        {
            f"{protocol}{f' fold {fold}' if folds > 1 else ''} {name}": data.load_set(
                workspace.sets, protocol, fold, name
            ).balance()
            for protocol, folds in (("slice", 1), ("patient", data.N_FOLDS))
            for fold in range(folds)
            for name in data.SETS
        }
    )


def cohort_text(table: Cohort) -> str:
    """Images by kind and class, and patients by class."""
    rows = {
        kind: np.bincount(table.label[table.kind == kind], minlength=len(CLASSES))
        for kind in ("real", "duplicate", "synthetic")
    }
    rows["patients"] = np.bincount(data.patients_of(table)[1], minlength=len(CLASSES))
    lines = [f"{'':<12}" + "".join(f"{name:>12}" for name in (*CLASSES, "all"))]
    for title, counts in rows.items():
        lines.append(f"{title:<12}" + "".join(f"{count:>12,}" for count in (*counts, counts.sum())))
    return "\n".join(lines)


def example_images(
    workspace: Workspace, table: Cohort, columns: int = 8
) -> tuple[list[np.ndarray], list[str], int]:
    """(images, titles, columns): slices of the first patient of each class from the top of the head
    down, then synthetic images."""
    image_of = {
        file: image
        for part in (data.load_set(workspace.sets, "slice", 0, name) for name in data.SETS)
        for file, image in zip(part.files, part.images[:, 0].numpy(), strict=True)
    }
    images, titles = [], []
    patients, label = data.patients_of(table)
    for value in np.unique(label):
        patient = patients[label == value][0]
        rows = np.flatnonzero((table.patient_id == patient) & (table.kind == "real"))
        rows = rows[np.argsort(table.slice_index[rows])]
        for row in rows[np.linspace(0, len(rows) - 1, columns).round().astype(int)]:
            images.append(image_of[table.file_sha256[row]])
            titles.append(f"{CLASSES[value]} · slice {table.slice_index[row]}")
    synthetic = np.flatnonzero(table.kind == "synthetic")
    for row in synthetic[:: max(1, len(synthetic) // columns)][:columns]:
        images.append(image_of[table.file_sha256[row]])
        titles.append(f"{CLASSES[table.label[row]]} · synthetic")
    return images, titles, columns


# --- Searches and training defaults -------------------------------------------------------------


def _searches(runs: list[Run]) -> list[tuple[RunConfig, optuna.Study]]:
    """Every search that these runs rest on and this machine holds: only `paper` searches inside
    every fold."""
    found = {}
    for run in runs:
        config = run.requested
        if config.trials:
            config = config if config.profile == "paper" else on_fold_0(config)
            folder = run.workspace.optuna(config.model)
            cohort = run.workspace.cohort_sha256
            known = optuna_search.known_search(folder, config, cohort)
            found[optuna_search.search_name(config, cohort)] = config, known
    return [(config, known) for config, known in found.values() if known is not None]


def search_text(runs: list[Run]) -> str:
    """The trials of every search that these runs rest on, best first."""
    texts = [
        f"{config.protocol} fold {config.fold} "
        f"({search_label(config)})\n{optuna_search.trials_table(known)}"
        for config, known in _searches(runs)
    ]
    profile = runs[0].workspace.profile
    return (
        "\n\n".join(texts)
        or f"No search in profile {profile}, or its trials are on another machine: the settings "
        "are those of utils/config.py."
    )


def fits_markdown(runs: list[Run]) -> str:
    """How each run was trained, a line each, as Markdown."""
    table = [["run", "epoch kept", "validation balanced accuracy", "arithmetic", "init", "seconds"]]
    for run in runs:
        fit, config = run.fit, run.requested
        kept = fit.history[fit.best_epoch - 1]
        table.append(
            [
                f"`{config.protocol}` fold {config.fold}, seed {config.seed}",
                f"{fit.best_epoch} of {len(fit.history)}"
                + (" (answered one class)" if fit.one_class else ""),
                f"{kept['validation_balanced_accuracy']:.3f}",
                fit.precision,
                fit.init,
                f"{fit.seconds:,.0f}",
            ]
        )
    return markdown(table)


def search_figures(runs: list[Run]) -> list[Figure]:
    """History and importances of every search that these runs rest on; empty where this machine
    holds none."""
    return [optuna_search.search_figures(known) for _, known in _searches(runs)]


def defaults_text(model: str, data: str | None = None, root: Path = ROOT) -> str:
    """The committed comparison of a model's training defaults (tests/benchmarks/defaults.py) as a
    table, in the order in which it was run.

    Args:
        data: "real" or "phantom": a comparison on other data is named and not shown, so that no
            notebook mixes the two.
    """
    path = Path(root) / "assets" / model / "defaults.json"
    if not path.is_file():
        return f"No comparison of training defaults was run for {model}."
    known = read_json(path)
    if data not in (None, known["data"]):
        return (
            f"The training defaults were chosen on the {known['data']} cohort "
            f"(assets/{model}/defaults.json); "
            f"this run is on {data} data."
        )
    attacked = any(
        "adversarial_validation_loss" in row.get("best", {}) for row in known["rows"].values()
    )
    return "\n".join(
        [*_defaults_origin(model, known, attacked), "", *_defaults_rows(known, attacked)]
    )


def _defaults_origin(model: str, known: dict, attacked: bool) -> list[str]:
    """What was compared, on whom, and on which machines."""
    finished = [row for row in known["rows"].values() if "best" in row]
    present = {name: size for name, size in known["validation"].items() if size[1]}
    size = f"{known['input_size']} px" if known["input_size"] else "at native size"
    machines = dict.fromkeys(
        f"{row.get('hardware', known['hardware'])}, threads: {row.get('threads', known['threads'])}"
        for row in known["rows"].values()
    )
    lines = [
        f"{model} · protocol {known['protocol']}, fold {known['fold']} · data: {known['data']} · "
        "profile: "
        f"{known['profile']} · input {size} · init "
        f"{', '.join(sorted({row['init'] for row in finished})) or 'unknown'} · "
        f"{'; '.join(machines)}",
        f"validation patients only, no test image was read: n = "
        f"{sum(patients for patients, _ in present.values())} patients, {known['n_validation']:,} "
        "slices; bal.acc.: "
        f"balanced accuracy over the {len(present)} classes present ({', '.join(present)}), loss: "
        "cross-entropy "
        "averaged over them (nats)",
    ]
    if attacked:
        eps = max(row["last"]["train_eps"] for row in finished)
        part = (
            f"one in {known['slice_stride']} slices of each patient"
            if "slice_stride" in known
            else "a part of each patient's slices"
        )
        lines.append(
            f"attacked: bal.acc. under PGD of {training.VALIDATION_STEPS} steps at eps "
            f"{255 * eps:g}/255, on {part}"
        )
    return lines


def _defaults_rows(known: dict, attacked: bool) -> list[str]:
    scores = {"bal.acc.": "validation_balanced_accuracy", "loss": "validation_loss"}
    if attacked:
        scores |= {
            "attacked": "adversarial_validation_balanced_accuracy",
            "attacked loss": "adversarial_validation_loss",
        }
    wide = max(map(len, known["rows"]))
    lines = [f"{'':<{wide}}  best epoch  " + "  ".join(scores) + "  seconds"]
    for name, row in known["rows"].items():
        if "failed" in row:
            lines.append(f"{name:<{wide}}  failed: {row['failed']}")
            continue
        cells = "  ".join(f"{row['best'][key]:>{len(title)}.3f}" for title, key in scores.items())
        epoch = f"{row['best_epoch']} of {known['epochs']}"
        note = "  ANSWERED ONE CLASS" if row["one_class"] else ""
        lines.append(f"{name:<{wide}}  {epoch:>10}  {cells}  {row['seconds']:>7,.0f}{note}")
    return lines


# --- Checks -------------------------------------------------------------------------------------


def sanity_text(checks: Sequence[dict]) -> str:
    """Checks with their verdicts, in a line each."""
    return "\n".join(
        f"{'ok' if check['passed'] else 'LOOK':>4}  {check['check']:<28} {check['note']}"
        for check in checks
    )
