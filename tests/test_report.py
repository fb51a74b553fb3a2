"""A record says what its predictions and runs bear, nothing else; tables, figures and publishing
follow from it."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from utils import drawing, metrics, report
from utils.evaluation import comparisons, records
from utils.evaluation.records import (
    read_records,
    robust_decisions,
    summarize,
    without_rehearsals,
    write_record,
)
from utils.evaluation.rows import TableRow, table_rows
from utils.evaluation.schema import Json, Record, Score, attacks_of, variants_of
from utils.report import model_figures, notes, page, result_figures
from utils.utils_funcs import ROOT, UserError

EPS = ("1/255", "4/255", "8/255")
N_BOOT = 50
ATTACKS = {"noise": 0.05, "fgsm": 0.6, "pgd20": 1.0, "pgd20_merged": 1.0, "pgd20_binary": 0.9}


def workspace(
    model: str = "Resnet",
    protocol: str = "patient",
    *,
    seed: int = 0,
    weakness: float = 0.6,
    full: bool = False,
    n_folds: int = 2,
    **changes,
) -> tuple[dict[str, np.ndarray], list[Json]]:
    """Predictions and runs of a small workspace whose attacks lower the true logit by strength ×
    eps × `weakness`; a `full` one has images made on its counterpart and measures of a sample too.
    `changes` are keys of its runs."""
    generator = np.random.default_rng(seed)
    class_of_patient = np.repeat(np.arange(4), (10, 7, 4, 2))
    patients = np.repeat(np.arange(len(class_of_patient)), 4)
    labels, count = class_of_patient[patients], 4 * len(class_of_patient)
    folds = patients % n_folds if protocol == "patient" else np.zeros(count, dtype=int)
    logits = generator.normal(size=(count, 4)) + 2 * np.eye(4)[labels]
    rows = {
        "labels": labels.astype(np.int8),
        "fold": folds.astype(np.int8),
        "seed": np.zeros(count, np.int8),
        "patient_id": patients.astype(np.int32),
        "slice_index": np.tile(np.arange(4), len(class_of_patient)).astype(np.int16),
        "file_sha256": np.arange(count * 32).astype(np.uint8).reshape(count, 32),
        "clean": metrics.to_half(logits),
    }
    meta: dict = {}
    for number, eps in enumerate(EPS):
        for name, strength in ATTACKS.items():
            down = strength * 2**number * weakness * (1 + generator.random(count))
            rows[f"{eps}:{name}"] = metrics.to_half(logits - down[:, None] * np.eye(4)[labels])
            meta.setdefault(eps, {})[name] = {
                "n_attacked": 7,
                "seconds": 1.5,
                "steps": 20,
                "norm": "linf",
            }
    sampled = rows["4/255:pgd20"].copy()
    sampled[np.arange(count) % 4 > 0] = np.nan
    rows["4/255:autoattack"], meta["4/255"]["autoattack"] = (
        sampled,
        {"n_attacked": 3, "seconds": 9.0, "norm": "linf"},
    )
    rows["0.5:pgd_l2"], meta["0.5"] = (
        metrics.to_half(-9.0 * np.eye(4)[labels]),
        {"pgd_l2": {"norm": "l2", "seconds": 1.0}},
    )
    if full:
        source = "Resnet" if model.endswith("_atk") else "Resnet_atk"
        rows[f"4/255:transfer_{source}"] = metrics.to_half(logits - np.eye(4)[labels])
        meta["4/255"][f"transfer_{source}"] = {"n_attacked": 7, "seconds": 1.0, "norm": "linf"}
    history = [
        {
            "epoch": e,
            "train_loss": 1 / e,
            "train_accuracy": 1 - 0.5 / e,
            "validation_loss": 1.2 / e,
            "validation_accuracy": 0.6,
            "validation_balanced_accuracy": 0.5,
            "adversarial_validation_loss": None,
        }
        for e in (1, 2, 3)
    ]
    run = {
        "model": model,
        "regime": "atk" if model.endswith("_atk") else "clean",
        "protocol": protocol,
        "data": "real",
        "profile": "demo",
        "init": "random",
        "search": "none",
        "search_people": [],
        "seed": 0,
        "cohort_sha256": "ab",
        "config": {"headline_eps": "4/255", "epochs": 3},
        "environment": {"torch": "2"},
        "hardware": "2 cores",
        "wall_seconds": {"train": 10.0, "attack": 5.0},
        "git_commit": "abc",
        "git_dirty": False,
        "attacks": meta,
        "sanity": [
            {"check": "pgd_le_fgsm", "passed": True, "figure": {"1/255": [0.1, 0.2]}, "note": ""}
        ],
        "history": history,
        "best_epoch": 2,
        "explanation": {},
        **changes,
    }
    return rows, [
        {
            **copy.deepcopy(run),
            "fold": int(fold),
            "measures": sample_of(labels[folds == fold]) if full else {},
            "leak_probe": probe_of(int((folds == fold).sum())) if full else {},
        }
        for fold in np.unique(folds)
    ]


def probe_of(count: int) -> dict:
    """The patient is recognized everywhere, the diagnosis right on clean images alone, every second
    row asked."""
    rows = list(range(0, count, 2))
    names, no, yes = (
        ("clean", "1/255", "noise 1/255", "4/255", "noise 4/255"),
        [0] * len(rows),
        [1] * len(rows),
    )
    return {
        "rows": rows,
        "gap": 4,
        "recognised": dict.fromkeys(names, yes),
        "right": {name: yes if "/" not in name or "noise" in name else no for name in names},
        "bands": [0.0, 2.0, 4.0],
        "shares": [[0.5, 0.3, 0.2]] * len(rows),
        "noise_shares": [0.1, 0.2, 0.7],
    }


def sample_of(labels: np.ndarray) -> dict:
    """Sample measures of every second row: the k-th image is misclassified at k/255, none is made
    healthier, all sicker."""
    rows = np.arange(0, len(labels), 2)
    none = [None if label == 0 else 0.0 for label in labels[rows].tolist()]
    sicker = [None if label == 3 else 1.0 for label in labels[rows].tolist()]
    return {
        "eps": "4/255",
        "pgd_steps": 20,
        "rows": rows.tolist(),
        "minimal_linf": [k / 255 if k else None for k in range(len(rows))],
        "healthier": none,
        "sicker": sicker,
        "convergence": [
            {"kind": kind, "count": count, "standing": (np.arange(len(rows)) % count == 0).tolist()}
            for kind, count in (("steps", 1), ("steps", 10), ("restarts", 2))
        ],
    }


def write_workspace(root: Path, models=("Resnet", "Resnet_atk"), **changes) -> Path:
    for number, model in enumerate(models):
        for protocol in ("slice", "patient"):
            rows, runs = workspace(
                model,
                protocol,
                seed=number,
                weakness=0.1 if model.endswith("_atk") else 0.6,
                full=True,
                **changes,
            )
            write_record(
                root / "assets" / model / f"{protocol}.json",
                summarize(rows, runs, n_boot=N_BOOT),
                rows,
            )
    return root


def edited(record: Record, edit: Callable[[Json], object]) -> Record:
    """The record as if its file had been changed by `edit`."""
    changed = copy.deepcopy(record.to_json())
    edit(changed)
    return Record.from_json(changed, "edited", record.path)


def trained_row(records: dict[tuple[str, str], Record], edit: Callable[[Json], object]) -> TableRow:
    """The first row of a network under `patient`, its record changed by `edit`."""
    key = next(key for key in records if key[1] == "patient")
    rows = table_rows(records | {key: edited(records[key], edit)})
    return next(row for row in rows if row.model == key[0])


@pytest.fixture(scope="module")
def record() -> Record:
    return summarize(*workspace(), n_boot=N_BOOT)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_workspace(tmp_path_factory.mktemp("workspace"))
    for name in ("README.md", "CITATION.cff", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    return root


# -- records ---------------------------------------------------------------------------------------


def test_record_has_the_promised_shape(record: Record) -> None:
    promised = {
        "schema_version",
        "model",
        "regime",
        "protocol",
        "data",
        "profile",
        "init",
        "search",
        "folds",
        "seeds",
        "cohort_sha256",
        "config",
        "environment",
        "hardware",
        "wall_seconds",
        "git_commit",
        "git_dirty",
        "clean",
        "attacks",
        "worst_case",
        "sanity",
    }
    written = record.to_json()
    assert promised <= set(written) and written["schema_version"] == 1
    assert written["folds"] == [0, 1] and written["seeds"] == [0]
    assert set(written["clean"]["slice"]) == set(written["clean"]["person"]) == set(metrics.METRICS)
    assert written["clean"]["n_slices"] == 92 and written["clean"]["n_people"] == 23
    assert list(written["attacks"]) == list(written["worst_case"]) == list(EPS)
    assert {"balanced_accuracy_3", "accuracy", "n_slices", "n_people", "attacks"} <= set(
        written["worst_case"]["4/255"]
    )
    for score in written["clean"]["slice"].values():
        assert score["ci"][0] <= score["value"] <= score["ci"][1]
    json.dumps(written, allow_nan=False)


def test_metadata_of_runs_is_merged(record: Record) -> None:
    block = record.attacks["4/255"]["pgd20"]
    assert (block.n_attacked, block.seconds, block.source["steps"], block.n_slices) == (
        14,
        3.0,
        20,
        92,
    )
    assert record.wall_seconds == {"train": 20.0, "attack": 10.0}
    assert [check.fold for check in record.sanity] == [0, 1]
    counts = [{"n_set": 80, "n_unchanged": 0}, {"n_set": 80, "n_unchanged": 1}]
    assert records.merge_meta(counts) == {"n_set": 160, "n_unchanged": 1}


def test_a_check_that_did_not_pass_is_named_beneath_the_table(tree: Path) -> None:
    assert report.failed_checks(table_rows(read_records(tree)), "patient") == ""
    failure = {"passed": False, "note": "the stronger attack does not work"}
    row = trained_row(read_records(tree), lambda changed: changed["sanity"][1].update(failure))
    assert (
        f"row {row.number}, `{row.model}`, fold 1, seed 0: the stronger attack does not work"
        in report.failed_checks([row], "patient")
    )


def test_what_pgd_left_and_fgsm_misclassified_is_counted_from_the_predictions(
    tmp_path: Path,
) -> None:
    rows, runs = workspace(weakness=0.0)
    two = np.flatnonzero((rows["fold"] == 1) & (rows["labels"] == 2))[:2]
    for name, answer in (("pgd20", (0, 0, 1, 0.5)), ("fgsm", (0, 1, 0.5, 0))):
        rows[f"4/255:{name}"][rows["fold"] == 1] = 9 * np.eye(4)[rows["labels"][rows["fold"] == 1]]
        rows[f"4/255:{name}"][two] = answer
    runs[1]["sanity"][0] |= {
        "passed": False,
        "note": "look",
        "figure": {"1/255": [0.1, 0.1], "4/255": [0.5, 0.4]},
    }
    write_record(
        tmp_path / "assets" / "Resnet" / "patient.json", summarize(rows, runs, n_boot=N_BOOT), rows
    )
    note = report.failed_checks(table_rows(read_records(tmp_path)), "patient")
    assert (
        f"look (at 4/255 PGD missed 2 of {(rows['fold'] == 1).sum()} images that FGSM "
        "misclassifies, pulled towards *Moderate*, where FGSM makes them *Very mild*)"
    ) in note


def test_patients_are_scored_by_the_mean_of_their_slices(tree: Path) -> None:
    record = read_records(tree)["Resnet", "patient"]
    table, predictions = report.scores_markdown([record]), record.predictions
    patients, labels = predictions["patient_id"], predictions["labels"]
    logits = predictions["clean"].astype(float)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    mean = np.stack([shares[patients == patient].mean(axis=0) for patient in np.unique(patients)])
    three = np.stack([mean[:, 0], mean[:, 1], mean[:, 2] + mean[:, 3]], axis=1).argmax(axis=1)
    truth = np.minimum([labels[patients == patient][0] for patient in np.unique(patients)], 2)
    [line] = [line for line in table.splitlines() if "| Resnet |" in line]
    cells = [cell.strip() for cell in line.split("|")]
    place = [cell.strip() for cell in table.splitlines()[0].split("|")].index(
        "by patient: bal.acc. 3"
    )
    assert cells[place].split()[0] == f"{100 * balanced_accuracy_score(truth, three):.1f}"


def test_every_attack_is_drawn_in_the_row_that_names_it_under_both_protocols() -> None:
    """Two records rarely hold the same attacks in the same order."""
    whole = read_records(ROOT)["Resnet", "patient"]

    def reverse_attacks(other: Json) -> None:
        other["protocol"], attacks = "slice", other["attacks"]["4/255"]
        other["attacks"]["4/255"] = {
            name: attacks[name] for name in reversed(attacks) if name != "square"
        }

    shown = {"slice": edited(whole, reverse_attacks), "patient": whole}
    figure = model_figures.model_robustness_figure("Resnet", shown)
    for panel, record in zip(figure.axes[2:4], shown.values(), strict=True):
        names = [label.get_text().split(" (n")[0] for label in figure.axes[2].get_yticklabels()]
        drawn = {
            names[round(container[0].get_ydata()[0])]: container[0].get_xdata()[0]
            for container in panel.containers
        }
        aims = {
            name: block.scores[model_figures.AIMED_AT[block.view]]
            for name, block in record.attacks["4/255"].items()
        }
        assert drawn == {
            name: pytest.approx(100 * score.value)
            for name, score in aims.items()
            if score.value is not None
        }
    sizes = [
        label.get_text()
        for label in figure.axes[2].get_yticklabels()
        if label.get_text().startswith("square ")
    ]
    assert sizes == [f"square (n = – | {whole.attacks['4/255']['square'].n_slices:,})"]


def test_a_run_that_names_no_precision_searched_in_float32() -> None:
    metas = [
        {"norm": "linf", "seconds": 1.0},
        {"norm": "linf", "seconds": 2.0, "precision": "bf16"},
    ]
    assert records.merge_meta(metas) == {
        "norm": "linf",
        "seconds": 3.0,
        "precision": ["fp32", "bf16"],
    }
    assert records.merge_meta(metas[1:])[
        "precision"
    ] == "bf16" and "precision" not in records.merge_meta(metas[:1])


def test_a_search_in_bfloat16_is_named_beneath_the_table_with_what_float32_still_found(
    tree: Path,
) -> None:
    assert report.bfloat16_searches(table_rows(read_records(tree)), "patient") == ""
    searched = {
        "check": "float32_finds_no_more",
        "figure": {"apgd_t_float32": [1, 11], "apgd_t_float32_merged": [0, 12]},
    }
    row = trained_row(read_records(tree), lambda changed: changed["sanity"][1].update(searched))
    assert (
        f"row {row.number}, `{row.model}`, fold 1, seed 0: 1 of 11 (four classes), 0 of 12 (three "
        "classes)"
    ) in report.bfloat16_searches([row], "patient")


def test_the_machines_that_each_run_ran_on_are_named_beneath_the_table(tree: Path) -> None:
    rows = table_rows(read_records(tree))
    machine = {"hardware": "one GPU + 2 cores"}
    row = trained_row(read_records(tree), lambda changed: changed["units"][1].update(machine))
    assert (
        f"2 cores: row {row.number} (fold 0); one GPU + 2 cores: row {row.number} (fold 1)."
        in report.machines([row], "patient")
    )
    assert report.machines([row for row in rows if not row.trained], "patient") == ""


def test_worst_case_is_the_mean_of_minima_not_the_minimum_of_means() -> None:
    rows, runs = workspace()
    record = summarize(rows, runs, n_boot=N_BOOT)
    labels = rows["labels"]
    robust = rows["clean"].argmax(1) == labels
    for name in ATTACKS:
        robust &= rows[f"4/255:{name}"].argmax(1) == labels
    robust &= np.isnan(rows["4/255:autoattack"]).any(1) | (
        rows["4/255:autoattack"].argmax(1) == labels
    )
    worst = record.worst_case["4/255"]
    assert worst.scores["accuracy"].value == pytest.approx(robust.mean(), abs=1e-6)
    assert worst.scores["balanced_accuracy"].value == pytest.approx(
        np.mean([robust[labels == k].mean() for k in range(4)]), abs=1e-6
    )
    assert worst.scores["accuracy"].value < min(
        block.scores["accuracy"].value
        for block in record.attacks["4/255"].values()
        if block.n_slices == worst.n_slices
    )
    assert worst.attacks == sorted([*ATTACKS, "autoattack"])


def test_attack_on_a_sample_has_its_own_n_and_lowers_only_its_images(record: Record) -> None:
    assert record.attacks["4/255"]["autoattack"].n_slices == 23
    assert record.worst_case["4/255"].n_slices == 92


def test_clean_error_is_not_robust() -> None:
    labels, clean = np.array([0, 1]), np.array([[0, -1, -9, -9], [0, -1, -9, -9.0]])
    four, three, covered = robust_decisions(
        clean, [np.array([[0, -1, -9, -9], [-1, 0, -9, -9.0]])], labels
    )
    assert four.tolist() == three.tolist() == [True, False] and covered.all()


def test_other_norms_stay_out_of_the_worst_case(record: Record) -> None:
    assert record.other_norms["l2"]["0.5"]["pgd_l2"].scores["accuracy"].value == 0
    assert "0.5" not in record.worst_case
    assert record.worst_case["1/255"].scores["accuracy"].value > 0


def test_curve_over_eps_never_rises() -> None:
    rows, runs = workspace()
    strong = rows["1/255:pgd20"].copy()
    strong[:20] = metrics.to_half(-9.0 * np.eye(4)[rows["labels"][:20]])
    record = summarize({**rows, "1/255:pgd20": strong}, runs, n_boot=N_BOOT)
    curve = [
        record.clean.slice["accuracy"].value,
        *(worst.union["accuracy"].value for worst in record.worst_case.values()),
    ]
    assert curve == sorted(curve, reverse=True)
    assert all(
        worst.union["accuracy"].value <= worst.scores["accuracy"].value
        for worst in record.worst_case.values()
    )


def test_auroc_under_attack_needs_a_binary_attack_and_is_the_most_wrong_ranking(
    record: Record,
) -> None:
    worst = record.worst_case["4/255"].scores["auroc"].value
    assert worst <= record.attacks["4/255"]["pgd20_binary"].scores["auroc"].value
    rows, runs = workspace()
    without = summarize(
        {name: x for name, x in rows.items() if not name.endswith("_binary")}, runs, n_boot=N_BOOT
    )
    assert without.worst_case["4/255"].scores["auroc"].value is None


def test_pooled_predictions_are_scored_not_fold_means() -> None:
    rows, runs = workspace()
    record = summarize(rows, runs, n_boot=N_BOOT)
    pooled = balanced_accuracy_score(rows["labels"], rows["clean"].argmax(1))
    assert record.clean.slice["balanced_accuracy"].value == pytest.approx(pooled, abs=1e-6)


def test_runs_are_whole_in_the_record_so_that_it_can_be_rebuilt() -> None:
    rows, runs = workspace()
    written = json.loads(json.dumps(summarize(rows, runs, n_boot=N_BOOT).to_json()))
    assert summarize(rows, written["units"], n_boot=N_BOOT).to_json() == written


@pytest.mark.parametrize(
    "key, other", [("profile", "cpu"), ("data", "phantom"), ("cohort_sha256", "cd")]
)
def test_runs_that_cannot_be_pooled_are_refused(key: str, other: str) -> None:
    rows, runs = workspace()
    runs[1][key] = other
    with pytest.raises(UserError, match=key):
        summarize(rows, runs, n_boot=N_BOOT)


def test_mixed_initialisation_is_said() -> None:
    rows, runs = workspace()
    runs[1]["init"] = "imagenet1k"
    assert summarize(rows, runs, n_boot=N_BOOT).init == "random + imagenet1k"


def test_rows_without_a_run_are_refused() -> None:
    rows, runs = workspace()
    with pytest.raises(UserError, match="no run"):
        summarize(rows, runs[:1], n_boot=N_BOOT)


def test_patients_of_the_search_are_left_out_of_a_second_headline() -> None:
    rows, runs = workspace(search="fold0", search_people=[1, 12])
    part = summarize(rows, runs, n_boot=N_BOOT).clean_without_search_patients
    kept = ~np.isin(rows["patient_id"], [1, 12])
    assert part.n_patients == 21 and part.n_slices == kept.sum()
    assert part.slice["accuracy"].value == pytest.approx(
        (rows["clean"].argmax(1) == rows["labels"])[kept].mean(), abs=1e-6
    )
    assert part.worst_case["4/255"].n_patients == 21
    assert "clean_without_search_people" not in summarize(*workspace(), n_boot=N_BOOT).to_json()


def test_variants_have_separate_blocks() -> None:
    rows, runs = workspace("Ensemble")
    mean = {f"mean/{name}": x for name, x in rows.items() if name == "clean" or ":" in name}
    pooled = {**rows, **mean, "knn/clean": metrics.to_half(9.0 * np.eye(4)[rows["labels"]])}
    assert variants_of(pooled) == [None, "mean", "knn"]
    assert list(attacks_of(pooled)["4/255"]) == list(
        attacks_of(pooled, "mean")["4/255"]
    ) and not attacks_of(pooled, "knn")
    record = summarize(
        pooled,
        [{**run, "variants": {"mean": {"attacks": run["attacks"]}}} for run in runs],
        n_boot=N_BOOT,
    )
    assert record.variants["mean"].worst_case == record.worst_case
    assert record.variants["knn"].clean.slice["accuracy"].value == 1
    only_variants = summarize(
        {
            name: x
            for name, x in pooled.items()
            if name not in rows
            or name in ("labels", "fold", "seed", "patient_id", "slice_index", "file_sha256")
        },
        runs,
        n_boot=N_BOOT,
    )
    assert only_variants.clean is None and "clean" not in only_variants.to_json()


def test_temperatures_are_applied_fold_by_fold() -> None:
    rows, runs = workspace()
    for run, temperature in zip(runs, (1.0, 4.0), strict=True):
        run["temperature"] = temperature
    scaled = rows["clean"] / np.where(rows["fold"] == 0, 1.0, 4.0)[:, None]
    expected = metrics.score(scaled, rows["labels"], rows["patient_id"], n_boot=2)["ece"]["value"]
    assert summarize(rows, runs, n_boot=N_BOOT).clean_calibrated.ece.value == expected


def test_record_of_another_schema_version_is_refused(tmp_path: Path, record: Record) -> None:
    path = tmp_path / "assets" / "Resnet" / "patient.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**record.to_json(), "schema_version": 99}))
    with pytest.raises(UserError, match="99"):
        read_records(tmp_path)


# -- tables and figures ----------------------------------------------------------------------------


def test_constant_answer_comes_first_in_every_table(tree: Path) -> None:
    rows = table_rows(read_records(tree))
    assert [row.name for row in rows] == ["Constant answer", "Resnet", "Resnet_atk"]
    assert [row.number for row in rows] == [1, 2, 3]
    text = report.results_text([*read_records(tree).values()])
    assert text.count("Constant answer") == 2
    lines = [line for line in text.splitlines() if "Constant answer" in line]
    assert all("33.3" in line and "[" not in line for line in lines), (
        "it is known exactly: no interval"
    )
    assert "data: real · profile demo · random init" in text
    assert "Row 3: python -m utils.experiment grid --profile demo --models Resnet_atk" in text


def test_tables_work_with_any_subset_of_records(tmp_path: Path) -> None:
    assert "No record" in report.results_text([]) and "No record" in report.results_markdown({})
    rows, runs = workspace("Dinov2_atk", "slice")
    record = summarize(rows, runs, n_boot=N_BOOT)
    write_record(tmp_path / "assets" / "Dinov2_atk" / "slice.json", record, rows)
    assert "Dinov2_atk" in report.results_text([record]) and "WORST CASE" in report.attacks_text(
        record
    )
    assert "assets/results/headline.png" in report.results_markdown(read_records(tmp_path))
    assert len(report.draw_figures(tmp_path)) == 10


def test_numbers_in_the_readme_are_those_of_the_records(tree: Path) -> None:
    def pages() -> str:
        report.write_readme(tree)
        paths = (tree / "README.md", tree / report.RESULTS_PAGE)
        return "\n".join(path.read_text(encoding="utf-8") for path in paths)

    text = pages()
    for record in read_records(tree).values():
        score = record.clean.slice["balanced_accuracy_3"]
        assert drawing.show(score) in text and drawing.show(score, brief=True) in text
    assert "not a result" in text, "a demo run must be announced as one"
    assert pages() == text, "rewriting changes nothing"


def test_links_follow_a_page_into_its_folder() -> None:
    text = (
        "[a](README.md#x) ![b](assets/results/b.png) [c](assets/Resnet/c.json) [d](#here) "
        '[e](https://assets/e) <img src="assets/f.gif" width="1">'
    )
    assert page.rebased(text, Path("assets/results")) == (
        "[a](../../README.md#x) ![b](b.png) [c](../Resnet/c.json) [d](#here) "
        '[e](https://assets/e) <img src="../f.gif" width="1">'
    )


def test_a_page_of_rehearsals_or_of_nothing_is_still_a_page(tmp_path: Path) -> None:
    assert "No record" in report.summary_markdown({}, tmp_path)
    write_workspace(tmp_path, ("Resnet",))
    text = report.summary_markdown(read_records(tmp_path), tmp_path)
    assert "not a result" in text
    assert "example.png" not in text, "no example is kept there"


def test_a_readme_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# no markers\n")
    with pytest.raises(UserError, match="results:begin"):
        report.write_readme(tmp_path)


def test_counterparts_are_compared_on_the_same_images(tree: Path) -> None:
    found = read_records(tree)
    difference = comparisons.counterpart_difference(found, "Resnet", "patient")
    robust, clean = (
        found[name, "patient"].worst_case["4/255"].scores["balanced_accuracy_3"].value
        for name in ("Resnet_atk", "Resnet")
    )
    assert difference.robust["balanced_accuracy_3"].value == pytest.approx(robust - clean, abs=2e-6)
    assert difference.n_slices == 92
    assert comparisons.counterpart_difference(found, "Dinov2", "patient") is None


def test_counterparts_trained_with_other_means_are_no_pair(tree: Path, tmp_path: Path) -> None:
    write_workspace(tmp_path, ("Resnet",), profile="cpu")
    write_workspace(tmp_path, ("Resnet_atk",))
    assert comparisons.counterpart_difference(read_records(tmp_path), "Resnet", "patient") is None


def test_where_there_are_results_the_findings_pass_over_rehearsals(tmp_path: Path) -> None:
    write_workspace(tmp_path, ("Resnet",), profile="cpu")
    write_workspace(tmp_path, ("Resnet_atk",))  # a rehearsal, and the most robust of both
    text = report.findings_markdown(read_records(tmp_path))
    assert "`Resnet` (row 2)" in text and "Resnet_atk" not in text


def test_an_attack_on_fewer_slices_prints_its_own_n(tmp_path: Path) -> None:
    rows, runs = workspace()
    few = np.arange(len(rows["labels"])) % 4 == 0
    for name in [name for name in rows if ":" in name]:
        rows[name] = np.where(few[:, None], rows[name], np.float16(np.nan))
    record = summarize(rows, runs, n_boot=N_BOOT)
    assert (
        record.clean.n_slices,
        record.worst_case["4/255"].n_slices,
        record.worst_case["4/255"].n_patients,
    ) == (92, 23, 23)
    write_record(tmp_path / "assets" / "Resnet" / "patient.json", record, rows)
    assert "92 / 23 (23 attacked)" in report.results_markdown(read_records(tmp_path))


def test_the_transfer_matrix_holds_each_direction_once_and_pgd_on_its_diagonal(tree: Path) -> None:
    found = list(read_records(tree).values())
    cells = result_figures.transfer_cells(found, "patient")
    assert set(cells) == {
        (a, b) for a in ("Resnet", "Resnet_atk") for b in ("Resnet", "Resnet_atk")
    }
    [clean] = [one for one in found if (one.model, one.protocol) == ("Resnet", "patient")]
    assert cells["Resnet_atk", "Resnet"] == clean.attacks["4/255"]["transfer_Resnet_atk"]
    assert cells["Resnet", "Resnet"] == clean.attacks["4/255"]["pgd20"]
    of_slices = [one for one in found if one.protocol == "slice"]
    assert result_figures.transfer_cells(of_slices, "patient") == {}


def test_sample_measures_of_all_folds_are_pooled_with_their_own_patients(tree: Path) -> None:
    record = read_records(tree)["Resnet", "patient"]
    pooled = model_figures.pooled_measures(record)
    assert len(pooled.rows.labels) == sum(len(run.measures["rows"]) for run in record.runs)
    for number, fold in enumerate((0, 1)):
        of_fold = np.flatnonzero(record.predictions["fold"] == fold)
        sampled = of_fold[record.runs[number].measures["rows"]]
        part = slice(0, len(sampled)) if number == 0 else slice(-len(sampled), None)
        assert np.array_equal(pooled.rows.patients[part], record.predictions["patient_id"][sampled])
        assert np.array_equal(pooled.rows.labels[part], record.predictions["labels"][sampled])
    assert np.isnan(pooled.healthier[pooled.rows.labels == 0]).all()
    assert np.isnan(pooled.minimal_linf).sum() == 2
    defined = ~np.isnan(pooled.sicker)
    value, low, high = model_figures.percent_true(
        pooled.sicker[defined] == 1, pooled.rows.take(defined)
    )
    assert (value, high) == (100, 100) and 50 < low < 100, (
        "all of a few patients are not all patients"
    )


def test_probes_of_all_folds_are_pooled_with_their_own_patients(tree: Path) -> None:
    record = read_records(tree)["Resnet", "patient"]
    pooled = comparisons.pooled_probe(record)
    sampled = np.concatenate(
        [
            np.flatnonzero(record.predictions["fold"] == run.fold)[run.leak_probe["rows"]]
            for run in record.runs
        ]
    )
    assert np.array_equal(pooled.patients, record.predictions["patient_id"][sampled])
    assert pooled.recognized["4/255"].all() and not pooled.right["4/255"].any()

    def without_probe(changed: Json) -> None:
        for run in changed["units"]:
            run["leak_probe"] = {}

    assert comparisons.pooled_probe(edited(record, without_probe)) is None


def test_figures_are_drawn_from_records_alone_and_say_whose_they_are(
    tree: Path, tmp_path: Path
) -> None:
    shutil.copytree(tree / "assets", tmp_path / "assets")
    drawn = report.draw_model_figures(tmp_path, "Resnet_atk") | report.draw_result_figures(tmp_path)
    assert [path.stem for path in drawn] == [
        *model_figures.MODEL_FIGURES,
        *result_figures.RESULT_FIGURES,
    ]
    for path, figure in drawn.items():
        words = " ".join(
            text.get_text() for text in figure.findobj(match=lambda x: hasattr(x, "get_text"))
        )
        assert (
            path.is_file()
            and "data: real · profile demo · random init" in words
            and figure.get_figwidth() <= 12.5
        )
        assert any(
            size in words
            for size in (
                "n = 92 slices of 23 patients",
                "10 patients,\n40 slices",
                "2 runs",
                "n = 46 slices of 23 patients",
                "]\nn = 92",
                "n = 92 / 23",
            )
        )


def test_no_legend_of_the_figures_that_compare_models_leaves_the_page(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "assets", tmp_path / "assets", ignore=shutil.ignore_patterns("*.png", "*.gif")
    )
    for path, figure in report.draw_result_figures(tmp_path).items():
        figure.canvas.draw()
        page, footer = (
            figure.bbox,
            next(
                text for text in figure.texts if text.get_text().startswith("data:")
            ).get_window_extent(),
        )
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert (
                page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
            ), path.name
            assert not box.overlaps(footer), path.name


def test_models_of_other_sizes_are_not_given_one_n() -> None:
    assert (
        result_figures.of_class({(640, 20), (3200, 100)})
        == "20 to 100 patients,\n640 to 3,200 slices"
    )
    assert drawing.sizes_text([(92, 23), (92, 23)]) == "n = 92 slices of 23 patients"
    assert (
        drawing.sizes_text([(2560, 80), (1280, 40)])
        == "n = 1,280 to 2,560 slices of 40 to 80 patients a model"
    )


def test_every_form_of_ensemble_has_another_marker() -> None:
    from utils.pipeline.ensembles import FORMS

    assert set(drawing.FORM_MARKERS) == {" ".join(form) for form in FORMS}
    assert len(set(drawing.FORM_MARKERS.values())) == len(FORMS)


def test_redrawing_changes_no_byte(tree: Path, tmp_path: Path) -> None:
    shown = {"patient": read_records(tree)["Resnet", "patient"]}
    first, second = (
        drawing.save_figure(
            model_figures.confusion_figure("Resnet", shown), tmp_path / name
        ).read_bytes()
        for name in ("first.png", "second.png")
    )
    assert first == second


def test_image_grid_says_what_it_shows(tmp_path: Path) -> None:
    figure = drawing.image_grid(
        [np.zeros((8, 8), np.uint8)] * 5, list("abcde"), 3, label="data: phantom"
    )
    assert drawing.save_figure(figure, tmp_path / "grid.png").stat().st_size > 0
    assert "data: phantom" in [text.get_text() for text in figure.texts]


def test_findings_name_their_rows(tree: Path) -> None:
    text = report.findings_markdown(read_records(tree))
    assert "(row 2)" in text or "(row 3)" in text
    assert "3 `Resnet_atk` − 2 `Resnet`" in text and "No records" in report.findings_markdown({})


def as_results(root: Path, models: dict[str, float], controls: bool = False) -> dict:
    """Records of profile `cpu`, each model's attacks as strong as `models` says."""
    for number, (model, weakness) in enumerate(models.items()):
        for protocol in ("slice", "patient"):
            rows, runs = workspace(
                model, protocol, weakness=weakness, full=True, seed=number, n_folds=5, profile="cpu"
            )
            write_record(
                root / "assets" / model / f"{protocol}.json",
                summarize(rows, runs, n_boot=N_BOOT),
                rows,
            )
    if controls:
        rows, runs = workspace("Baselines", "patient", n_folds=5, profile="cpu")
        plain = {
            name: rows[name]
            for name in ("labels", "fold", "seed", "patient_id", "slice_index", "file_sha256")
        }
        for name in comparisons.RIVALS:
            plain[f"{name}/clean"] = rows["clean"]
        for eps in EPS:
            plain[f"{comparisons.EXACT_CONTROL}/{eps}:exact"] = metrics.to_half(
                -9.0 * np.eye(4)[rows["labels"]]
            )
        meta = {
            comparisons.EXACT_CONTROL: {
                "attacks": {eps: {"exact": {"norm": "linf"}} for eps in EPS}
            }
        }
        runs = [{**run, "attacks": {}, "variants": meta} for run in runs]
        write_record(
            root / "assets" / "Baselines" / "patient.json",
            summarize(plain, runs, n_boot=N_BOOT),
            plain,
        )
    return read_records(root)


def test_verdicts_are_corrected_for_their_number(tmp_path: Path) -> None:
    found = as_results(tmp_path, {"Resnet": 5.0, "Resnet_atk": 0.0})
    rows = table_rows(found)
    score = Score(value=0.1, ci=(0.01, 0.2), p=0.03)
    alone = comparisons.Comparison(rows[1], rows[0], "patient", None, score, 9, 9)
    assert comparisons.corrected([alone])[0].verdict == "better"
    assert [one.verdict for one in comparisons.corrected([alone, alone])] == ["undecided"] * 2, (
        "each is below 0.05, two are not"
    )
    [sentence] = [
        part
        for part in report.findings_markdown(found).split(". ")
        if part.startswith("After Holm's correction for")
    ]
    assert "correction for 2 comparisons" in sentence and "`Resnet_atk` (row 3)" in sentence


def test_networks_are_compared_with_controls_by_a_corrected_verdict(tmp_path: Path) -> None:
    results = as_results(tmp_path, {"Resnet": 5.0, "Resnet_atk": 0.0}, controls=True)
    found = comparisons.patient_auroc_against_controls(table_rows(results))
    assert len(found) == 2 * len(comparisons.RIVALS)
    same = next(
        one for one in found if one.first.model == "Resnet"
    )  # the controls answer as this network does
    assert (
        same.score.value == 0
        and same.verdict == "undecided"
        and same.score.ci[0] < 0 < same.score.ci[1]
    )
    adjusted = metrics.holm([one.score.p for one in found])
    assert [one.p_holm for one in found] == pytest.approx(adjusted.tolist())
    robust = comparisons.robust_accuracy_against_exact(table_rows(results), EPS)
    assert [one.eps for one in robust] == [*EPS, *EPS]
    assert (
        next(
            one for one in robust if one.first.model == "Resnet_atk" and one.eps == "1/255"
        ).verdict
        == "better"
    )
    text = report.findings_markdown(results)
    assert (
        "No comparison finds a network better" in text
        and f"for the {len(found)} comparisons" in text
    )


def test_a_cost_is_said_with_the_variance_that_its_interval_lacks(tmp_path: Path) -> None:
    text = report.findings_markdown(as_results(tmp_path, {"Resnet": 0.9, "Resnet_atk": 0.0}))
    assert "not that of a seed" in text and "not shown to be absent" in text
    assert "for the 4 comparisons of this table" in text, (
        "one pair, two protocols, clean and attacked"
    )


def test_the_withdrawn_table_stays_withdrawn(tmp_path: Path) -> None:

    def decide(changed: Json) -> None:
        for probe in (run["leak_probe"] for run in changed["units"]):
            names, size = list(probe["right"]), len(probe["rows"])
            probe["neighbour"] = dict.fromkeys(names, [1] * size)
            probe["recognised"] = {name: [int(name == "clean")] * size for name in names}
            probe["right"] = {
                name: [1] * (size // 2) + [int(name == "clean")] * (size - size // 2)
                for name in names
            }

    record = edited(as_results(tmp_path, {"Resnet": 0.9})["Resnet", "patient"], decide)
    results = {("Resnet", "patient"): record}
    withdrawn = notes.withdrawn_claim(table_rows(results))
    assert withdrawn.distant_slices == notes.ProbeCounts(1, patients_first=1, diagnoses_first=0)
    assert withdrawn.all_slices == notes.ProbeCounts(1, patients_first=0, diagnoses_first=1)
    text = report.findings_markdown(results)
    assert "of 1 records the patients seemed to go first in 1 and the diagnoses in 0" in text
    assert "in 0 and 1 of 1 where all slices count" in text and "\n\n**Withdrawn" in text


def test_a_row_that_lacks_folds_is_in_no_table_of_all_patients(tmp_path: Path) -> None:
    as_results(tmp_path, {"Resnet": 0.9})
    rows, runs = workspace("Ensemble", "patient", profile="cpu")
    plain = {name: values for name, values in rows.items() if ":" not in name and name != "clean"}
    plain["weighted mixed/clean"] = rows["clean"]
    weights = {"weights": {"weights": {"Resnet": 1.0, "Resnet_atk": 1e-9}}, "attacks": {}}
    runs = [{**run, "attacks": {}, "variants": {"weighted mixed": weights}} for run in runs]
    write_record(
        tmp_path / "assets" / "Ensemble" / "patient.json",
        summarize(plain, runs, n_boot=N_BOOT),
        plain,
    )
    text = report.results_markdown(read_records(tmp_path))
    name = "Ensemble · weighted mixed (all weight on Resnet)"
    headline, apart = text.split("**One fold alone**")
    assert name not in headline and name in apart, "two folds of five are not all patients"


def test_choices_on_fold_0_are_named_and_scored_without_its_patients(tmp_path: Path) -> None:
    rows, runs = workspace(
        "Resnet", "patient", profile="cpu", search="fold0 recipes", search_people=[0, 1, 10]
    )
    record = summarize(rows, runs, n_boot=N_BOOT)
    assert (
        record.search == "fold0 recipes" and record.clean_without_search_patients.n_patients == 20
    )
    write_record(tmp_path / "assets" / "Resnet" / "patient.json", record, rows)
    assert "`search: fold0 recipes`" in report.results_markdown(read_records(tmp_path))


def test_the_age_matched_part_is_a_column_only_for_the_cohort_it_was_made_of(
    tmp_path: Path,
) -> None:
    found = as_results(tmp_path, {"Resnet": 0.9})
    assert "60+" not in report.results_markdown(found)
    everybody = found["Resnet", "patient"].clean.patient["auroc"].value
    score = {
        "value": 0.65,
        "ci": [0.5, 0.75],
        "everybody": {"value": round(everybody, 3), "ci": [0.6, 1.0]},
    }
    of_age = {
        "schema_version": 1,
        "other": "another set",
        "n_part": 17,
        "n_patients": 23,
        "not_found_by_class": {"Non": 6},
        "cohort_sha256": "ab",
        "rows": {"Resnet/patient": {"n_people": 17, "person_auroc": score}},
    }
    path = tmp_path / "assets" / "Baselines" / "age.json"
    stale = {
        "Resnet/patient": {
            "n_people": 17,
            "person_auroc": score | {"everybody": {"value": everybody - 0.02, "ci": [0.6, 1.0]}},
        }
    }
    for change, shown in (
        ({}, True),
        ({"cohort_sha256": "other"}, False),
        ({"rows": stale}, False),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(of_age | change), encoding="utf-8")
        report.ages.cache_clear()
        text = report.results_markdown(read_records(tmp_path))
        assert ("60+ (n = 17)" in text) is shown and (
            "on all, 0.650 [0.500, 0.750] on these" in text
        ) is shown, change
    report.ages.cache_clear()


def test_scores_are_recomputed_from_the_predictions(tmp_path: Path) -> None:
    write_workspace(tmp_path, ("Resnet",))
    path = tmp_path / "assets" / "Resnet" / "patient.json"
    right = records.read_record(path).clean.slice["accuracy"].value
    wrong = json.loads(path.read_text(encoding="utf-8"))
    wrong["clean"]["slice"]["accuracy"]["value"] = 0.123
    path.write_text(json.dumps(wrong), encoding="utf-8")
    assert path in report.recompute(tmp_path)
    assert records.read_record(path).clean.slice["accuracy"].value == right


def test_every_model_has_another_color() -> None:
    assert len(set(drawing.COLORS.values())) == len(drawing.COLORS)


def test_importing_report_needs_no_torch() -> None:
    code = (
        "import sys, utils.report; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'sklearn', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# -- publishing ------------------------------------------------------------------------------------


def copy_of(tree: Path, to: Path) -> Path:
    for name in ("README.md", "CITATION.cff", "pyproject.toml"):
        to.mkdir(parents=True, exist_ok=True)
        shutil.copy(tree / name, to / name)
    return to


def test_publish_copies_records_figures_and_notebooks(tree: Path, tmp_path: Path) -> None:
    run, place = tmp_path / "run", copy_of(tree, tmp_path / "place")
    shutil.copytree(tree / "assets" / "Resnet", run / "assets" / "Resnet")
    (run / "assets" / "Resnet" / "slice.json").unlink()
    (run / "models").mkdir()
    (run / "models" / "Resnet.ipynb").write_text("{}")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "secret.safetensors").write_text("weights")
    report.publish(run, place)
    record = Path("assets") / "Resnet" / "patient.json"
    assert (place / record).read_bytes() == (run / record).read_bytes()
    assert (place / "models" / "Resnet.ipynb").is_file() and (
        place / "assets" / "results" / "headline.png"
    ).is_file()
    assert not (place / "checkpoints").exists() and "`Resnet`" in (place / "README.md").read_text(
        encoding="utf-8"
    )


def test_publish_refuses_phantom_data(tree: Path, tmp_path: Path) -> None:
    run, place = (
        write_workspace(tmp_path / "run", models=("Resnet",), data="phantom"),
        copy_of(tree, tmp_path / "place"),
    )
    with pytest.raises(UserError, match="phantom"):
        report.publish(run, place)
    assert not (place / "assets").exists()


def test_publish_never_replaces_a_higher_profile(tree: Path, tmp_path: Path) -> None:
    place = write_workspace(
        copy_of(tree, tmp_path / "place"), models=("Resnet_atk",), profile="cpu"
    )
    run = write_workspace(tmp_path / "run", models=("Resnet", "Resnet_atk"))
    with pytest.raises(UserError, match="profile cpu"):
        report.publish(run, place)
    assert not (place / "assets" / "Resnet").exists(), "nothing is copied where anything is refused"


def test_address_follows_pyproject(tree: Path, tmp_path: Path) -> None:
    place = copy_of(tree, tmp_path)
    old, text = (
        report.repository_address(place),
        (place / "pyproject.toml").read_text(encoding="utf-8"),
    )
    (place / "pyproject.toml").write_text(text.replace(old, "someone/brains"), encoding="utf-8")
    (place / "models").mkdir()
    badge = f"https://colab.research.google.com/github/{old}/blob/main/models/Resnet.ipynb"
    (place / "models" / "Resnet.ipynb").write_text(json.dumps({"cells": [badge]}))
    assert len(report.write_address(place)) == 3
    readme = (place / "README.md").read_text(encoding="utf-8")
    assert old not in readme and "github.com/someone/brains" in readme and "cd brains\n" in readme
    assert "github.com/facebookresearch/dinov2" in readme, "other repositories keep their address"
    assert "someone/brains/blob/main" in (place / "models" / "Resnet.ipynb").read_text()
    assert report.write_address(place) == []


def test_the_original_figures_are_compared_with_ours_of_the_same_eps(tree: Path) -> None:
    text = report.original_markdown(read_records(tree))
    assert len(re.findall(r"^\| (?:Dinov2|Resnet|Efficientnet)(?:_atk)? \|", text, re.M)) == 6
    resnet = next(line for line in text.splitlines() if line.startswith("| Resnet |"))
    clean = read_records(tree)["Resnet", "patient"].clean.slice["accuracy"]
    assert drawing.show(clean) in resnet and "98.6" in resnet
    assert all(
        mark in report.original_markdown({}) for mark in ("| – | – | – | – |", "separate image")
    )


def test_a_rehearsal_is_not_shown_among_results(tree: Path) -> None:
    found = read_records(tree)
    assert without_rehearsals(found) == found, "nothing but rehearsals here"
    key = "Resnet", "patient"
    mixed = found | {key: edited(found[key], lambda changed: changed.update(profile="cpu"))}
    assert [key for key in without_rehearsals(mixed) if key[0] != "Baselines"] == [
        ("Resnet", "patient")
    ]
    text = report.results_markdown(mixed, tree)
    assert (
        "Rehearsed only (profile `demo`), and so not in these tables" in text
        and "Resnet `slice`" in text
    )
    assert not re.search(r"^\| \d+ \| Resnet_atk \|", text, re.M) and re.search(
        r"^\| \d+ \| Resnet \|", text, re.M
    )


def test_the_model_card_gives_every_trained_model_with_its_interval(tree: Path) -> None:
    found = read_records(tree)
    card = report.model_card(found)
    for model, protocol in found:
        if model in ("Resnet", "Resnet_atk"):
            line = next(
                line
                for line in card.splitlines()
                if line.startswith(f"| `{model}` | `{protocol}` |")
            )
            assert drawing.show(found[model, protocol].clean.slice["balanced_accuracy_3"]) in line
    assert "Not for" in card and "Known faults" in card and "no record yet" in report.model_card({})


def test_the_committed_model_card_follows_the_records() -> None:
    assert (ROOT / "assets" / "model_card.md").read_text(encoding="utf-8") == report.model_card(
        read_records(ROOT)
    )
