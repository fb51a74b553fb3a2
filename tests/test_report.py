"""A record says what its predictions and units bear, nothing else; tables, figures and publishing follow from it."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from utils import comparisons, diagnosis, figures, metrics, records, report
from utils.records import (
    attacks_of,
    read_entries,
    robust_decisions,
    table_rows,
    summarise,
    variants_of,
    write_record,
)
from utils.utils_funcs import ROOT, UserError

EPS = ("1/255", "4/255", "8/255")
N_BOOT = 50
ATTACKS = {"noise": 0.05, "fgsm": 0.6, "pgd20": 1.0, "pgd20_merged": 1.0, "pgd20_binary": 0.9}


def workspace(
    model: str = "Resnet",
    protocol: str = "patient",
    *,
    seed: int = 0,
    fall: float = 0.6,
    full: bool = False,
    n_folds: int = 2,
    **told,
):
    """Predictions and units of a small study whose attacks lower the true logit by strength × eps × `fall`; a `full` one
    has images of its twin and measures of a sample too."""
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
            down = strength * 2**number * fall * (1 + generator.random(count))
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
        **told,
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
    """The person is recognised everywhere, the diagnosis right on clean images alone, every second row asked."""
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
    """Sample measures of every second row: the k-th image falls at k/255, none is made healthier, all are made sicker."""
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


def write_workspace(root: Path, models=("Resnet", "Resnet_atk"), **told) -> Path:
    for number, model in enumerate(models):
        for protocol in ("slice", "patient"):
            rows, runs = workspace(
                model,
                protocol,
                seed=number,
                fall=0.1 if model.endswith("_atk") else 0.6,
                full=True,
                **told,
            )
            write_record(
                root / "assets" / model / f"{protocol}.json",
                summarise(rows, runs, n_boot=N_BOOT),
                rows,
            )
    return root


@pytest.fixture(scope="module")
def record() -> dict:
    return summarise(*workspace(), n_boot=N_BOOT)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_workspace(tmp_path_factory.mktemp("study"))
    for name in ("README.md", "CITATION.cff", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    return root


# ------------------------------------------------------------------------------------------------------ records


def test_record_has_the_promised_shape(record: dict) -> None:
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
    assert promised <= set(record) and record["schema_version"] == 1
    assert record["folds"] == [0, 1] and record["seeds"] == [0]
    assert set(record["clean"]["slice"]) == set(record["clean"]["person"]) == set(metrics.METRICS)
    assert record["clean"]["n_slices"] == 92 and record["clean"]["n_people"] == 23
    assert list(record["attacks"]) == list(record["worst_case"]) == list(EPS)
    assert {"balanced_accuracy_3", "accuracy", "n_slices", "n_people", "attacks"} <= set(
        record["worst_case"]["4/255"]
    )
    for score in record["clean"]["slice"].values():
        assert score["ci"][0] <= score["value"] <= score["ci"][1]
    json.dumps(record, allow_nan=False)


def test_metadata_of_runs_is_merged(record: dict) -> None:
    block = record["attacks"]["4/255"]["pgd20"]
    assert (block["n_attacked"], block["seconds"], block["steps"], block["n_slices"]) == (
        14,
        3.0,
        20,
        92,
    )
    assert record["wall_seconds"] == {"train": 20.0, "attack": 10.0}
    assert [check["fold"] for check in record["sanity"]] == [0, 1]
    counts = [{"n_set": 80, "n_unchanged": 0}, {"n_set": 80, "n_unchanged": 1}]
    assert records._merge_meta(counts) == {"n_set": 160, "n_unchanged": 1}


def test_a_check_that_did_not_pass_is_named_beneath_the_table(tree: Path) -> None:
    rows = table_rows(read_entries(tree))
    assert report._failed_checks(rows, "patient") == ""
    row = next(row for row in rows if row.trained)
    check = row.entries["patient"].record["sanity"][1]
    check["passed"], check["note"] = False, "the stronger attack does not work"
    assert (
        f"row {row.number}, `{row.model}`, fold 1, seed 0: the stronger attack does not work"
        in report._failed_checks(rows, "patient")
    )


def test_what_pgd_left_and_fgsm_misclassified_is_counted_from_the_predictions(
    tmp_path: Path,
) -> None:
    rows, runs = workspace(fall=0.0)
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
        tmp_path / "assets" / "Resnet" / "patient.json", summarise(rows, runs, n_boot=N_BOOT), rows
    )
    told = report._failed_checks(table_rows(read_entries(tmp_path)), "patient")
    assert (
        f"look (at 4/255 PGD left 2 of {(rows['fold'] == 1).sum()} images that FGSM fells, pulled towards *Moderate*, where FGSM makes "
        "them *Very mild*)"
    ) in told


def test_patients_are_scored_by_the_mean_of_their_slices(tree: Path) -> None:
    entries = read_entries(tree)
    table = report.scores_markdown([entries["Resnet", "patient"].record])
    predictions = entries["Resnet", "patient"].predictions
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


def test_every_attack_stands_in_the_row_that_names_it_under_both_protocols() -> None:
    """Two records rarely hold the same attacks in the same order."""
    whole = read_entries(ROOT)["Resnet", "patient"]
    other = copy.deepcopy(whole.record)
    other["protocol"], attacks = "slice", other["attacks"]["4/255"]
    other["attacks"]["4/255"] = {
        name: attacks[name] for name in reversed(attacks) if name != "square"
    }
    entries = {"slice": records.Entry(whole.path, other), "patient": whole}
    figure = figures.model_robustness_figure("Resnet", entries)
    for panel, entry in zip(figure.axes[2:4], entries.values(), strict=True):
        names = [label.get_text().split(" (n")[0] for label in figure.axes[2].get_yticklabels()]
        drawn = {
            names[round(container[0].get_ydata()[0])]: container[0].get_xdata()[0]
            for container in panel.containers
        }
        blocks = entry.record["attacks"]["4/255"]
        aims = {name: figures.AIMED_AT[block.get("view", "four")] for name, block in blocks.items()}
        assert drawn == {
            name: pytest.approx(100 * blocks[name][aim]["value"])
            for name, aim in aims.items()
            if blocks[name][aim]["value"] is not None
        }
    sizes = [
        label.get_text()
        for label in figure.axes[2].get_yticklabels()
        if label.get_text().startswith("square ")
    ]
    assert sizes == [f"square (n = – | {attacks['square']['n_slices']:,})"]


def test_a_run_that_names_no_precision_searched_in_float32() -> None:
    metas = [
        {"norm": "linf", "seconds": 1.0},
        {"norm": "linf", "seconds": 2.0, "precision": "bf16"},
    ]
    assert records._merge_meta(metas) == {
        "norm": "linf",
        "seconds": 3.0,
        "precision": ["fp32", "bf16"],
    }
    assert records._merge_meta(metas[1:])[
        "precision"
    ] == "bf16" and "precision" not in records._merge_meta(metas[:1])


def test_a_search_in_bfloat16_is_named_beneath_the_table_with_what_float32_still_found(
    tree: Path,
) -> None:
    rows = table_rows(read_entries(tree))
    assert report._bfloat16_searches(rows, "patient") == ""
    row = next(row for row in rows if row.trained)
    check = row.entries["patient"].record["sanity"][1]
    check |= {
        "check": "float32_finds_no_more",
        "figure": {"apgd_t_float32": [1, 11], "apgd_t_float32_merged": [0, 12]},
    }
    told = f"row {row.number}, `{row.model}`, fold 1, seed 0: 1 of 11 (four classes), 0 of 12 (three classes)"
    assert told in report._bfloat16_searches(rows, "patient")


def test_the_machines_that_each_run_ran_on_are_named_beneath_the_table(tree: Path) -> None:
    rows = table_rows(read_entries(tree))
    row = next(row for row in rows if row.trained)
    row.entries["patient"].record["units"][1]["hardware"] = "one GPU + 2 cores"
    told = report._machines([row], "patient")
    assert (
        f"2 cores: row {row.number} (fold 0); one GPU + 2 cores: row {row.number} (fold 1)." in told
    )
    assert report._machines([row for row in rows if not row.trained], "patient") == ""


def test_worst_case_is_the_mean_of_minima_not_the_minimum_of_means() -> None:
    rows, runs = workspace()
    record = summarise(rows, runs, n_boot=N_BOOT)
    labels = rows["labels"]
    alive = rows["clean"].argmax(1) == labels
    for name in ATTACKS:
        alive &= rows[f"4/255:{name}"].argmax(1) == labels
    alive &= np.isnan(rows["4/255:autoattack"]).any(1) | (
        rows["4/255:autoattack"].argmax(1) == labels
    )
    worst = record["worst_case"]["4/255"]
    assert worst["accuracy"]["value"] == pytest.approx(alive.mean(), abs=1e-6)
    assert worst["balanced_accuracy"]["value"] == pytest.approx(
        np.mean([alive[labels == k].mean() for k in range(4)]), abs=1e-6
    )
    assert worst["accuracy"]["value"] < min(
        block["accuracy"]["value"]
        for block in record["attacks"]["4/255"].values()
        if block["n_slices"] == worst["n_slices"]
    )
    assert worst["attacks"] == sorted([*ATTACKS, "autoattack"])


def test_attack_on_a_sample_has_its_own_n_and_lowers_only_its_images(record: dict) -> None:
    assert record["attacks"]["4/255"]["autoattack"]["n_slices"] == 23
    assert record["worst_case"]["4/255"]["n_slices"] == 92


def test_clean_error_is_not_robust() -> None:
    labels, clean = np.array([0, 1]), np.array([[0, -1, -9, -9], [0, -1, -9, -9.0]])
    four, three, covered = robust_decisions(
        clean, [np.array([[0, -1, -9, -9], [-1, 0, -9, -9.0]])], labels
    )
    assert four.tolist() == three.tolist() == [True, False] and covered.all()


def test_other_norms_stay_out_of_the_worst_case(record: dict) -> None:
    assert record["other_norms"]["l2"]["0.5"]["pgd_l2"]["accuracy"]["value"] == 0
    assert (
        "0.5" not in record["worst_case"] and record["worst_case"]["1/255"]["accuracy"]["value"] > 0
    )


def test_curve_over_eps_never_rises() -> None:
    rows, runs = workspace()
    strong = rows["1/255:pgd20"].copy()
    strong[:20] = metrics.to_half(-9.0 * np.eye(4)[rows["labels"][:20]])
    record = summarise({**rows, "1/255:pgd20": strong}, runs, n_boot=N_BOOT)
    curve = [
        record["clean"]["slice"]["accuracy"]["value"],
        *(worst["union"]["accuracy"]["value"] for worst in record["worst_case"].values()),
    ]
    assert curve == sorted(curve, reverse=True)
    assert all(
        worst["union"]["accuracy"]["value"] <= worst["accuracy"]["value"]
        for worst in record["worst_case"].values()
    )


def test_auroc_under_attack_needs_a_binary_attack_and_is_the_most_wrong_ranking(
    record: dict,
) -> None:
    worst = record["worst_case"]["4/255"]["auroc"]["value"]
    assert worst <= record["attacks"]["4/255"]["pgd20_binary"]["auroc"]["value"]
    rows, runs = workspace()
    without = summarise(
        {name: x for name, x in rows.items() if not name.endswith("_binary")}, runs, n_boot=N_BOOT
    )
    assert without["worst_case"]["4/255"]["auroc"]["value"] is None


def test_pooled_predictions_are_scored_not_fold_means() -> None:
    rows, runs = workspace()
    record = summarise(rows, runs, n_boot=N_BOOT)
    pooled = balanced_accuracy_score(rows["labels"], rows["clean"].argmax(1))
    assert record["clean"]["slice"]["balanced_accuracy"]["value"] == pytest.approx(pooled, abs=1e-6)


def test_runs_stand_whole_in_the_record_so_that_it_can_be_rebuilt() -> None:
    rows, runs = workspace()
    record = json.loads(json.dumps(summarise(rows, runs, n_boot=N_BOOT)))
    assert summarise(rows, record["units"], n_boot=N_BOOT) == record


@pytest.mark.parametrize(
    "key, other", [("profile", "cpu"), ("data", "phantom"), ("cohort_sha256", "cd")]
)
def test_runs_that_cannot_be_pooled_are_refused(key: str, other: str) -> None:
    rows, runs = workspace()
    runs[1][key] = other
    with pytest.raises(UserError, match=key):
        summarise(rows, runs, n_boot=N_BOOT)


def test_mixed_initialisation_is_said() -> None:
    rows, runs = workspace()
    runs[1]["init"] = "imagenet1k"
    assert summarise(rows, runs, n_boot=N_BOOT)["init"] == "random + imagenet1k"


def test_rows_without_a_run_are_refused() -> None:
    rows, runs = workspace()
    with pytest.raises(UserError, match="no unit"):
        summarise(rows, runs[:1], n_boot=N_BOOT)


def test_patients_of_the_search_are_left_out_of_a_second_headline() -> None:
    rows, runs = workspace(search="fold0", search_people=[1, 12])
    part = summarise(rows, runs, n_boot=N_BOOT)["clean_without_search_people"]
    kept = ~np.isin(rows["patient_id"], [1, 12])
    assert part["n_people"] == 21 and part["n_slices"] == kept.sum()
    assert part["slice"]["accuracy"]["value"] == pytest.approx(
        (rows["clean"].argmax(1) == rows["labels"])[kept].mean(), abs=1e-6
    )
    assert part["worst_case"]["4/255"]["n_people"] == 21
    assert "clean_without_search_people" not in summarise(*workspace(), n_boot=N_BOOT)


def test_variants_have_blocks_of_their_own() -> None:
    rows, runs = workspace("Ensemble")
    mean = {f"mean/{name}": x for name, x in rows.items() if name == "clean" or ":" in name}
    pooled = {**rows, **mean, "knn/clean": metrics.to_half(9.0 * np.eye(4)[rows["labels"]])}
    assert variants_of(pooled) == [None, "mean", "knn"]
    assert list(attacks_of(pooled)["4/255"]) == list(
        attacks_of(pooled, "mean")["4/255"]
    ) and not attacks_of(pooled, "knn")
    record = summarise(
        pooled,
        [{**run, "variants": {"mean": {"attacks": run["attacks"]}}} for run in runs],
        n_boot=N_BOOT,
    )
    assert record["variants"]["mean"]["worst_case"] == record["worst_case"]
    assert record["variants"]["knn"]["clean"]["slice"]["accuracy"]["value"] == 1
    assert "clean" not in summarise(
        {
            name: x
            for name, x in pooled.items()
            if name not in rows
            or name in ("labels", "fold", "seed", "patient_id", "slice_index", "file_sha256")
        },
        runs,
        n_boot=N_BOOT,
    )


def test_temperatures_are_applied_fold_by_fold() -> None:
    rows, runs = workspace()
    for run, temperature in zip(runs, (1.0, 4.0), strict=True):
        run["temperature"] = temperature
    scaled = rows["clean"] / np.where(rows["fold"] == 0, 1.0, 4.0)[:, None]
    expected = metrics.score(scaled, rows["labels"], rows["patient_id"], n_boot=2)["ece"]["value"]
    assert summarise(rows, runs, n_boot=N_BOOT)["clean_calibrated"]["ece"]["value"] == expected


def test_record_of_another_schema_version_is_refused(tmp_path: Path, record: dict) -> None:
    path = tmp_path / "assets" / "Resnet" / "patient.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**record, "schema_version": 99}))
    with pytest.raises(UserError, match="99"):
        read_entries(tmp_path)


# ------------------------------------------------------------------------------------------- tables and figures


def test_constant_answer_stands_first_in_every_table(tree: Path) -> None:
    rows = table_rows(read_entries(tree))
    assert [row.name for row in rows] == ["Constant answer", "Resnet", "Resnet_atk"]
    assert [row.number for row in rows] == [1, 2, 3]
    text = report.results_text([entry.record for entry in read_entries(tree).values()])
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
    record = summarise(rows, runs, n_boot=N_BOOT)
    write_record(tmp_path / "assets" / "Dinov2_atk" / "slice.json", record, rows)
    assert "Dinov2_atk" in report.results_text([record]) and "WORST CASE" in report.attacks_text(
        record
    )
    assert "assets/results/headline.png" in report.results_markdown(read_entries(tmp_path))
    assert len(report.draw_figures(tmp_path)) == 10


def test_numbers_in_the_readme_are_those_of_the_records(tree: Path) -> None:
    text = report.write_readme(tree).read_text(encoding="utf-8")
    for entry in read_entries(tree).values():
        score = entry.record["clean"]["slice"]["balanced_accuracy_3"]
        assert report.show(score) in text and report.show(score, brief=True) in text
    assert "not a result" in text, "a demo run must be announced as one"
    assert report.write_readme(tree).read_text(encoding="utf-8") == text, (
        "rewriting changes nothing"
    )


def test_a_readme_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# no markers\n")
    with pytest.raises(UserError, match="results:begin"):
        report.write_readme(tmp_path)


def test_counterparts_are_compared_on_the_same_images(tree: Path) -> None:
    entries = read_entries(tree)
    difference = comparisons.counterpart_difference(entries, "Resnet", "patient")
    robust, clean = (
        entries[name, "patient"].record["worst_case"]["4/255"]["balanced_accuracy_3"]["value"]
        for name in ("Resnet_atk", "Resnet")
    )
    assert difference["worst_case"]["balanced_accuracy_3"]["value"] == pytest.approx(
        robust - clean, abs=2e-6
    )
    assert (
        difference["n_slices"] == 92
        and comparisons.counterpart_difference(entries, "Dinov2", "patient") is None
    )


def test_counterparts_trained_with_other_means_are_no_pair(tree: Path, tmp_path: Path) -> None:
    write_workspace(tmp_path, ("Resnet",), profile="cpu")
    write_workspace(tmp_path, ("Resnet_atk",))
    assert comparisons.counterpart_difference(read_entries(tmp_path), "Resnet", "patient") is None


def test_where_there_are_results_the_findings_pass_over_rehearsals(tmp_path: Path) -> None:
    write_workspace(tmp_path, ("Resnet",), profile="cpu")
    write_workspace(tmp_path, ("Resnet_atk",))  # a rehearsal, and the most robust of both
    text = report.findings_markdown(read_entries(tmp_path))
    assert "`Resnet` (row 2)" in text and "Resnet_atk" not in text


def test_an_attack_on_fewer_slices_prints_its_own_n(tmp_path: Path) -> None:
    rows, runs = workspace()
    few = np.arange(len(rows["labels"])) % 4 == 0
    for name in [name for name in rows if ":" in name]:
        rows[name] = np.where(few[:, None], rows[name], np.float16(np.nan))
    record = summarise(rows, runs, n_boot=N_BOOT)
    assert (
        record["clean"]["n_slices"],
        record["worst_case"]["4/255"]["n_slices"],
        record["worst_case"]["4/255"]["n_people"],
    ) == (92, 23, 23)
    write_record(tmp_path / "assets" / "Resnet" / "patient.json", record, rows)
    assert "92 / 23 (23 attacked)" in report.results_markdown(read_entries(tmp_path))


def test_the_transfer_matrix_holds_each_direction_once_and_pgd_on_its_diagonal(tree: Path) -> None:
    entries = list(read_entries(tree).values())
    cells = figures.transfer_cells(entries, "patient")
    assert set(cells) == {
        (a, b) for a in ("Resnet", "Resnet_atk") for b in ("Resnet", "Resnet_atk")
    }
    records = {entry.model: entry.record for entry in entries if entry.protocol == "patient"}
    assert (
        cells["Resnet_atk", "Resnet"]
        == records["Resnet"]["attacks"]["4/255"]["transfer_Resnet_atk"]
    )
    assert cells["Resnet", "Resnet"] == records["Resnet"]["attacks"]["4/255"]["pgd20"]
    assert (
        figures.transfer_cells([entry for entry in entries if entry.protocol == "slice"], "patient")
        == {}
    )


def test_sample_measures_of_all_folds_are_pooled_with_their_own_patients(tree: Path) -> None:
    entry = read_entries(tree)["Resnet", "patient"]
    pooled = figures._pooled_measures(entry)
    assert len(pooled["labels"]) == sum(
        len(run["measures"]["rows"]) for run in entry.record["units"]
    )
    for number, fold in enumerate((0, 1)):
        own = np.flatnonzero(entry.predictions["fold"] == fold)[
            entry.record["units"][number]["measures"]["rows"]
        ]
        part = slice(0, len(own)) if number == 0 else slice(-len(own), None)
        assert np.array_equal(pooled["people"][part], entry.predictions["patient_id"][own])
        assert np.array_equal(pooled["labels"][part], entry.predictions["labels"][own])
    assert (
        np.isnan(pooled["healthier"][pooled["labels"] == 0]).all()
        and np.isnan(pooled["minimal_linf"]).sum() == 2
    )
    value, low, high = figures._share(pooled["sicker"] == 1, pooled, ~np.isnan(pooled["sicker"]))
    assert (value, high) == (100, 100) and 50 < low < 100, (
        "all of a few patients are not all patients"
    )


def test_probes_of_all_folds_are_pooled_with_their_own_patients(tree: Path) -> None:
    entry = read_entries(tree)["Resnet", "patient"]
    pooled = comparisons.pooled_probe(entry)
    own = np.concatenate(
        [
            np.flatnonzero(entry.predictions["fold"] == run["fold"])[run["leak_probe"]["rows"]]
            for run in entry.record["units"]
        ]
    )
    assert np.array_equal(pooled["people"], entry.predictions["patient_id"][own])
    assert pooled["recognised"]["4/255"].all() and not pooled["right"]["4/255"].any()
    without = records.Entry(
        entry.path,
        entry.record | {"units": [{**run, "leak_probe": {}} for run in entry.record["units"]]},
    )
    assert comparisons.pooled_probe(without) == {}


def test_figures_are_drawn_from_records_alone_and_say_whose_they_are(
    tree: Path, tmp_path: Path
) -> None:
    shutil.copytree(tree / "assets", tmp_path / "assets")
    drawn = report.draw_model_figures(tmp_path, "Resnet_atk") | report.draw_result_figures(tmp_path)
    assert [path.stem for path in drawn] == [*figures.MODEL_FIGURES, *figures.RESULT_FIGURES]
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
                "n = 92 slices of 23 people",
                "10 people,\n40 slices",
                "2 runs",
                "n = 46 slices of 23 people",
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
    assert figures._of_class({(640, 20), (3200, 100)}) == "20 to 100 people,\n640 to 3,200 slices"
    assert figures._sizes([(92, 23), (92, 23)]) == "n = 92 slices of 23 people"
    assert (
        figures._sizes([(2560, 80), (1280, 40)])
        == "n = 1,280 to 2,560 slices of 40 to 80 people a model"
    )


def test_every_form_of_ensemble_has_a_shape_of_its_own() -> None:
    assert set(figures.FORM_MARKERS) == {" ".join(form) for form in diagnosis.FORMS}
    assert len(set(figures.FORM_MARKERS.values())) == len(diagnosis.FORMS)


def test_redrawing_changes_no_byte(tree: Path, tmp_path: Path) -> None:
    entry = {"patient": read_entries(tree)["Resnet", "patient"]}
    first, second = (
        report.save_figure(figures.confusion_figure("Resnet", entry), tmp_path / name).read_bytes()
        for name in ("first.png", "second.png")
    )
    assert first == second


def test_image_grid_says_what_it_shows(tmp_path: Path) -> None:
    figure = figures.image_grid(
        [np.zeros((8, 8), np.uint8)] * 5, list("abcde"), 3, label="data: phantom"
    )
    assert report.save_figure(figure, tmp_path / "grid.png").stat().st_size > 0
    assert "data: phantom" in [text.get_text() for text in figure.texts]


def test_findings_name_their_rows(tree: Path) -> None:
    text = report.findings_markdown(read_entries(tree))
    assert "(row 2)" in text or "(row 3)" in text
    assert "3 `Resnet_atk` − 2 `Resnet`" in text and "No records" in report.findings_markdown({})


def as_results(root: Path, models: dict[str, float], controls: bool = False) -> dict:
    """Records of profile `cpu`, each model's attacks as strong as `models` says."""
    for number, (model, fall) in enumerate(models.items()):
        for protocol in ("slice", "patient"):
            rows, runs = workspace(
                model, protocol, fall=fall, full=True, seed=number, n_folds=5, profile="cpu"
            )
            write_record(
                root / "assets" / model / f"{protocol}.json",
                summarise(rows, runs, n_boot=N_BOOT),
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
            summarise(plain, runs, n_boot=N_BOOT),
            plain,
        )
    return read_entries(root)


def test_verdicts_are_corrected_for_their_number(tmp_path: Path) -> None:
    entries = as_results(tmp_path, {"Resnet": 5.0, "Resnet_atk": 0.0})
    rows = table_rows(entries)
    alone = comparisons.Comparison(
        rows[1], rows[0], "", {"value": 0.1, "ci": [0.01, 0.2], "p": 0.03}, 9, 9
    )
    assert comparisons.corrected([alone])[0].verdict == "better"
    assert [one.verdict for one in comparisons.corrected([alone, alone])] == ["undecided"] * 2, (
        "each is below 0.05, two are not"
    )
    [sentence] = [
        part
        for part in report.findings_markdown(entries).split(". ")
        if part.startswith("After Holm's correction for")
    ]
    assert "correction for 2 comparisons" in sentence and "`Resnet_atk` (row 3)" in sentence


def test_networks_stand_beside_controls_with_a_corrected_verdict(tmp_path: Path) -> None:
    entries = as_results(tmp_path, {"Resnet": 5.0, "Resnet_atk": 0.0}, controls=True)
    found = comparisons.patient_auroc_against_controls(table_rows(entries))
    assert len(found) == 2 * len(comparisons.RIVALS)
    same = next(
        one for one in found if one.first.model == "Resnet"
    )  # the controls answer as this network does
    assert (
        same.score["value"] == 0
        and same.verdict == "undecided"
        and same.score["ci"][0] < 0 < same.score["ci"][1]
    )
    adjusted = metrics.holm([one.score["p"] for one in found])
    assert [one.p_holm for one in found] == pytest.approx(adjusted.tolist())
    robust = comparisons.robust_accuracy_against_exact(table_rows(entries), EPS)
    assert [one.what for one in robust] == [*EPS, *EPS]
    assert (
        next(
            one for one in robust if one.first.model == "Resnet_atk" and one.what == "1/255"
        ).verdict
        == "better"
    )
    text = report.findings_markdown(entries)
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
    entries = as_results(tmp_path, {"Resnet": 0.9})
    for run in (entry := entries["Resnet", "patient"]).record["units"]:
        size = len(run["leak_probe"]["rows"])
        run["leak_probe"]["neighbour"] = dict.fromkeys(run["leak_probe"]["right"], [1] * size)
        run["leak_probe"]["recognised"] = {
            name: [1 if name == "clean" else 0] * size for name in run["leak_probe"]["right"]
        }
        run["leak_probe"]["right"] = {
            name: [1] * (size // 2) + [int(name == "clean")] * (size - size // 2)
            for name in run["leak_probe"]["right"]
        }
    text = report.withdrawn_markdown(table_rows({("Resnet", "patient"): entry}))
    assert "of 1 records the patients seemed to go first in 1 and the diagnoses in 0" in text
    assert "in 0 and 1 of 1 where all slices count" in text and text.startswith("**Withdrawn")


def test_a_row_that_lacks_folds_stands_in_no_table_of_all_patients(tmp_path: Path) -> None:
    as_results(tmp_path, {"Resnet": 0.9})
    rows, runs = workspace("Ensemble", "patient", profile="cpu")
    plain = {name: values for name, values in rows.items() if ":" not in name and name != "clean"}
    plain["weighted mixed/clean"] = rows["clean"]
    weights = {"weights": {"weights": {"Resnet": 1.0, "Resnet_atk": 1e-9}}, "attacks": {}}
    runs = [{**run, "attacks": {}, "variants": {"weighted mixed": weights}} for run in runs]
    write_record(
        tmp_path / "assets" / "Ensemble" / "patient.json",
        summarise(plain, runs, n_boot=N_BOOT),
        plain,
    )
    text = report.results_markdown(read_entries(tmp_path))
    name = "Ensemble · weighted mixed (all weight on Resnet)"
    headline, apart = text.split("**One fold alone**")
    assert name not in headline and name in apart, "two folds of five are not all patients"


def test_choices_on_fold_0_are_named_and_scored_without_its_patients(tmp_path: Path) -> None:
    rows, runs = workspace(
        "Resnet", "patient", profile="cpu", search="fold0 recipes", search_people=[0, 1, 10]
    )
    record = summarise(rows, runs, n_boot=N_BOOT)
    assert (
        record["search"] == "fold0 recipes"
        and record["clean_without_search_people"]["n_people"] == 20
    )
    write_record(tmp_path / "assets" / "Resnet" / "patient.json", record, rows)
    assert "`search: fold0 recipes`" in report.results_markdown(read_entries(tmp_path))


def test_the_age_matched_part_is_a_column_only_for_the_cohort_it_was_made_of(
    tmp_path: Path,
) -> None:
    entries = as_results(tmp_path, {"Resnet": 0.9})
    assert "60+" not in report.results_markdown(entries)
    everybody = entries["Resnet", "patient"].record["clean"]["person"]["auroc"]["value"]
    score = {
        "value": 0.65,
        "ci": [0.5, 0.75],
        "everybody": {"value": round(everybody, 3), "ci": [0.6, 1.0]},
    }
    page = {
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
        path.write_text(json.dumps(page | change), encoding="utf-8")
        report._ages.cache_clear()
        text = report.results_markdown(read_entries(tmp_path))
        assert ("60+ (n = 17)" in text) is shown and (
            "on all, 0.650 [0.500, 0.750] on these" in text
        ) is shown, change
    report._ages.cache_clear()


def test_scores_are_recomputed_from_the_predictions(tmp_path: Path) -> None:
    write_workspace(tmp_path, ("Resnet",))
    path = tmp_path / "assets" / "Resnet" / "patient.json"
    record = records.read_record(path)
    right = record["clean"]["slice"]["accuracy"]["value"]
    record["clean"]["slice"]["accuracy"]["value"] = 0.123
    path.write_text(json.dumps(record), encoding="utf-8")
    assert path in report.recompute(tmp_path)
    assert records.read_record(path)["clean"]["slice"]["accuracy"]["value"] == right


def test_every_model_has_one_colour_of_its_own() -> None:
    assert len(set(figures.COLOURS.values())) == len(figures.COLOURS)


def test_importing_report_needs_no_torch() -> None:
    code = "import sys, utils.report; sys.exit(any(name in sys.modules for name in ('torch', 'sklearn', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# -------------------------------------------------------------------------------------------------- publishing


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


def test_the_original_figures_stand_beside_ours_of_the_same_eps(tree: Path) -> None:
    text = report.original_markdown(read_entries(tree))
    assert len(re.findall(r"^\| (?:Dinov2|Resnet|Efficientnet)(?:_atk)? \|", text, re.M)) == 6
    resnet = next(line for line in text.splitlines() if line.startswith("| Resnet |"))
    clean = read_entries(tree)["Resnet", "patient"].record["clean"]["slice"]["accuracy"]
    assert report.show(clean) in resnet and "98.6" in resnet
    assert all(
        mark in report.original_markdown({}) for mark in ("| – | – | – | – |", "separate image")
    )


def test_a_rehearsal_does_not_stand_beside_results(tree: Path) -> None:
    entries = read_entries(tree)
    assert report.without_rehearsals(entries) == entries, "nothing but rehearsals here"
    run = copy.deepcopy(entries["Resnet", "patient"].record) | {"profile": "cpu"}
    mixed = entries | {("Resnet", "patient"): records.Entry(entries["Resnet", "patient"].path, run)}
    assert [key for key in report.without_rehearsals(mixed) if key[0] != "Baselines"] == [
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
    entries = read_entries(tree)
    card = report.model_card(entries)
    for model, protocol in entries:
        if model in ("Resnet", "Resnet_atk"):
            line = next(
                line
                for line in card.splitlines()
                if line.startswith(f"| `{model}` | `{protocol}` |")
            )
            assert (
                report.show(
                    entries[model, protocol].record["clean"]["slice"]["balanced_accuracy_3"]
                )
                in line
            )
    assert "Not for" in card and "Known faults" in card and "no record yet" in report.model_card({})


def test_the_committed_model_card_follows_the_records() -> None:
    assert (ROOT / "assets" / "model_card.md").read_text(encoding="utf-8") == report.model_card(
        read_entries(ROOT)
    )
