"""Ensembles and sequence models: which patients are taken, what is refused, what a record holds.

And what the report makes of these records.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch

from utils import diagnosis, experiment, report, sequence
from utils.backbones import build_model, save_half, save_model
from utils.config import make_config
from utils.data import ImageSet
from utils.evaluation import records, rows, schema
from utils.metrics.scores import to_half
from utils.pipeline import ensembles, scan_attacks
from utils.pipeline.members import FORMS, MissingMembersError, with_more_variants
from utils.pipeline.scans import few_patients, patient_rows
from utils.pipeline.store import RunResult
from utils.pipeline.workspace import Workspace, half_of
from utils.report import scans_and_ensembles
from utils.utils_funcs import ROOT, UserError


def image_set(patients: int = 12, each: int = 3) -> ImageSet:
    count = patients * each
    patient = torch.arange(count) // each
    return ImageSet(
        torch.zeros(count, 1, 4, 4, dtype=torch.uint8),
        torch.arange(count),
        patient % 3,
        patient,
        torch.arange(count) % each,
        [f"{k:064x}" for k in range(count)],
        "test",
        pixels=[f"{k:064x}" for k in range(count)],
        cohort_sha256="c0ffee00" * 8,
    )


def test_a_part_of_the_patients_is_whole_patients_of_every_class():
    part = few_patients(image_set(), 5)
    patients, counts = np.unique(part.patients.numpy(), return_counts=True)
    assert len(patients) == 5 and (counts == 3).all()
    assert set((patients % 3).tolist()) == {0, 1, 2}
    assert len(few_patients(image_set(), None)) == 36


def test_a_patients_row_has_the_hash_of_the_slices_in_order():
    part, config = image_set(), make_config("demo", "Resnet")
    patients = sequence.gather_scans(part.images, part.labels, part.patients, part.slices)
    rows = patient_rows(part, patients, config)
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(1))
    shuffled = patient_rows(part.pick(order), patients, config)
    assert (
        np.array_equal(rows["file_sha256"], shuffled["file_sha256"])
        and len(np.unique(rows["file_sha256"], axis=0)) == 12
    )
    assert rows["labels"].tolist() == patients.labels.tolist() and (rows["slice_index"] == -1).all()


def test_missing_members_are_named_with_the_command_that_makes_them(tmp_path, capsys):
    workspace = Workspace(tmp_path, "phantom", "demo", tmp_path, "")
    with pytest.raises(
        MissingMembersError,
        match="utils.experiment train --profile demo --model Efficientnet --protocol patient "
        "--fold 0",
    ):
        diagnosis.run_ensemble(workspace)
    with pytest.raises(MissingMembersError, match="Resnet_atk"):
        diagnosis.run_sequence(workspace)
    assert diagnosis.run_available(workspace, "Sequence") is None
    assert "is left out" in capsys.readouterr().out


@pytest.fixture(scope="module")
def trained(phantom_raw, tmp_path_factory):
    """A workspace of the phantom cohort with untrained networks as members.

    Efficientnet's weights are an fp16 copy.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALZHEIMER_RUNS", str(tmp_path_factory.mktemp("runs")))
        workspace = dataclasses.replace(
            experiment.open_workspace("demo", phantom_raw), data="phantom"
        )
        for name in ("Efficientnet", "Efficientnet_atk", "Resnet", "Resnet_atk"):
            path = workspace.checkpoint(make_config("demo", name))
            member = build_model(name, pretrained=False, input_size=32)
            save_model(member, path, {"cohort_sha256": workspace.cohort_sha256})
            if name == "Efficientnet":
                save_half(path, half_of(path))
                path.unlink()
        yield workspace


@pytest.fixture
def ran(monkeypatch):
    """The forms that were evaluated, by an evaluation that attacks nothing.

    What is tested is which form runs, and what is kept.
    """
    forms = []

    def evaluated(workspace, config, form, model, sources, test, answers, chosen, *, relaxed):
        forms.append(form)
        with torch.no_grad():
            clean = to_half(
                model.combine(torch.stack([answers[name] for name in model.members])).numpy()
            )
        rows = {f"{form}/clean": clean, f"{form}/4/255:fgsm": clean}
        description = {
            "attacks": {"4/255": {"fgsm": {"norm": "linf"}}},
            "members": list(model.members),
            "weights": ensembles.weights_of(model),
        }
        return rows, description, [{"check": "any", "passed": True, "variant": form}]

    monkeypatch.setattr(ensembles, "evaluated_form", evaluated)
    return forms


def test_an_ensemble_grows_form_by_form_and_evaluates_none_twice(trained, ran):
    first = diagnosis.run_ensemble(trained, forms=("uniform mixed",))
    assert list(first.variants) == ["uniform mixed"] and first.runs[0].config["fp16_members"] == [
        "Efficientnet"
    ]
    second = diagnosis.run_ensemble(trained, forms=("uniform mixed", "uniform clean"))
    assert ran == ["uniform mixed", "uniform clean"] and list(second.variants) == [
        "uniform clean",
        "uniform mixed",
    ]
    assert second.variants["uniform mixed"] == first.variants["uniform mixed"]
    assert [check.variant for check in second.sanity] == list(second.variants)
    assert diagnosis.run_ensemble(trained, forms=("uniform clean",)) == second and len(ran) == 2
    assert "Members alone" in scans_and_ensembles.ensemble_text(second)
    assert set(second.runs[0].members) == {
        "Efficientnet",
        "Efficientnet_atk",
        "Resnet",
        "Resnet_atk",
    }


def test_ensembles_of_other_members_are_never_pooled(trained, ran):
    diagnosis.run_ensemble(trained, forms=("uniform mixed",))
    with pytest.raises(
        UserError, match="holds ensembles of Efficientnet, Resnet, and these are of Resnet"
    ):
        diagnosis.run_ensemble(trained, fold=1, backbones=("Resnet",))
    with pytest.raises(UserError, match="Unknown form 'uniform fixed'"):
        diagnosis.run_ensemble(trained, forms=("uniform fixed",))


def test_an_ensemble_without_its_members_shows_what_is_recorded(trained, ran, capsys):
    before = diagnosis.run_ensemble(trained, forms=("uniform mixed",))
    path = trained.checkpoint(make_config("demo", "Resnet"))
    hidden = path.rename(path.with_suffix(".hidden"))
    try:
        shown = diagnosis.run_ensemble(trained, forms=("uniform mixed", "stacking mixed"))
        assert shown.variants.keys() >= before.variants.keys()
        assert "stacking mixed, since Resnet is not trained here" in capsys.readouterr().out
    finally:
        hidden.rename(path)


def a_run(*variants: str, weights: dict[str, str], patients: int = 6) -> RunResult:
    rows = {
        "file_sha256": np.arange(patients * 32, dtype=np.uint8).reshape(patients, 32),
        **{f"{name}/clean": np.ones((patients, 4)) for name in variants},
    }
    return RunResult(
        rows,
        {
            "model": "Sequence",
            "fold": 0,
            "variants": {name: {} for name in variants},
            "weights_sha256": weights,
            "sanity": [{"variant": name} for name in variants],
            "git_dirty": False,
            "git_commit": variants[0],
            "hardware": "here",
            "init": "random",
            "config": {"members": list(weights), "eps": "4/255"},
            "wall_seconds": {"train": 1.0, "attack": 2.0},
        },
    )


def test_a_run_grows_by_the_sources_that_are_trained_later():
    first = a_run("Efficientnet gru", weights={"Efficientnet": "a"})
    second = a_run(
        "Resnet gru", "Resnet + Efficientnet gru", weights={"Resnet": "b", "Efficientnet": "a"}
    )
    both = with_more_variants(first, second)
    assert list(both.meta["variants"]) == [
        "Efficientnet gru",
        "Resnet gru",
        "Resnet + Efficientnet gru",
    ]
    assert [check["variant"] for check in both.meta["sanity"]] == list(both.meta["variants"])
    assert both.meta["config"] == {
        "members": ["Efficientnet", "Resnet"],
        "fp16_members": [],
        "eps": "4/255",
    }
    assert both.meta["wall_seconds"] == {"train": 2.0, "attack": 4.0}
    assert (
        both.meta["git_commit"] == "Efficientnet gru + Resnet gru"
        and both.meta["hardware"] == "here"
    )
    assert {name for name in both.rows if "/" in name} == {
        "Efficientnet gru/clean",
        "Resnet gru/clean",
        "Resnet + Efficientnet gru/clean",
    }

    turned = with_more_variants(first, second, order=("Resnet + Efficientnet gru", "Resnet gru"))
    assert list(turned.meta["variants"]) == [
        "Resnet + Efficientnet gru",
        "Resnet gru",
        "Efficientnet gru",
    ]
    assert [name for name in turned.rows if "/" in name] == [
        f"{name}/clean" for name in turned.meta["variants"]
    ]


def test_a_run_never_mixes_weights_or_patients():
    first = a_run("Resnet gru", weights={"Resnet": "a"})
    with pytest.raises(UserError, match="Resnet has other weights now"):
        with_more_variants(
            first, a_run("Resnet + Resnet_atk gru", weights={"Resnet": "b", "Resnet_atk": "c"})
        )
    with pytest.raises(UserError, match="other patients"):
        with_more_variants(
            first, a_run("Efficientnet gru", weights={"Efficientnet": "a"}, patients=5)
        )


def a_scan_evaluation():
    """(scans, chosen, curve, clean, found, budget) of four patients.

    One is a clean error, one is misclassified once one slice is attacked, one once all are, and one
    is robust.
    """
    labels = torch.tensor([0, 1, 2, 0])
    patients = sequence.Scans(
        torch.zeros(4, 8, 1), torch.ones(4, 8, dtype=torch.bool), labels, torch.arange(4)
    )
    clean = 5 * np.eye(4)[[1, 1, 2, 0]]
    rounds = {
        f"4/255:rounds_{view}": np.array([[10, 4, 1], [20, 1, 1]]) for view in ("four", "three")
    }
    found = {
        "4/255:scan_pgd10": 5 * np.eye(4)[[1, 0, 0, 0]],
        **rounds,
        "least_gradient": np.array([0, 1, 8, -1]),
        "least_random": np.array([0, 4, 8, -1]),
    }
    return (
        patients,
        np.arange(4),
        np.arange(4),
        clean,
        found,
        {"eps": ("4/255",), "budgets": (1, 4)},
    )


def test_checks_pass_on_a_sound_evaluation_of_patients():
    checks = scan_attacks.scan_checks("Resnet gru", *a_scan_evaluation())
    assert all(check["passed"] for check in checks) and len(checks) == 9


@pytest.mark.parametrize(
    "broken, check",
    [
        ({"4/255:scan_pgd10": 5 * np.eye(4)[[0, 0, 0, 0]]}, "scan_attack_le_clean_three"),
        ({"4/255:rounds_three": np.array([[10, 4, 3], [20, 3, 1]])}, "converged_in_steps_three"),
        ({"least_gradient": np.array([1, 1, 8, -1])}, "no_slice_is_clean"),
        ({"least_random": np.array([0, 4, 8, 8])}, "all_slices_are_the_full_attack"),
    ],
)
def test_each_check_fails_on_a_broken_evaluation(broken, check):
    patients, chosen, curve, clean, found, budget = a_scan_evaluation()
    failed = [
        row["check"]
        for row in scan_attacks.scan_checks(
            "Resnet gru", patients, chosen, curve, clean, found | broken, budget
        )
        if not row["passed"]
    ]
    assert check in failed


class FlatBackbone(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
        )

    def features(self, images):
        return ((images.flatten(1) - 0.5) @ self.weight).tanh()


@pytest.fixture
def scans(monkeypatch):
    """(model, scans, ran): a small scan model, seven patients, and the attacks that were run."""
    torch.manual_seed(0)
    model = sequence.ScanModel(
        FlatBackbone(),
        sequence.build_aggregator("attention", 6),
        torch.zeros(6),
        torch.full((6,), 0.2),
    ).eval()
    values = torch.randint(80, 170, (7, 4, 1, 4, 4), generator=torch.Generator().manual_seed(2)).to(
        torch.uint8
    )
    mask = torch.ones(7, 4, dtype=torch.bool)
    mask[1, 3], values[1, 3] = False, 0
    with torch.no_grad():
        labels = model(values.float() / 255, mask).argmax(1)
    ran, attack_scan = [], sequence.attack_scan

    def noted(*given, **more):
        ran.append(given[5])
        return attack_scan(*given, **more)

    monkeypatch.setattr(sequence, "attack_scan", noted)
    monkeypatch.setattr(scan_attacks, "choose_device", lambda: torch.device("cpu"))
    return model, sequence.Scans(values, mask, labels, torch.arange(20, 27)), ran


SMALL = dict(
    train=None,
    validation=None,
    test=None,
    eps=("1/255", "4/255"),
    steps=2,
    doublings=1,
    budgets=(1, 2),
    epochs=1,
)


def test_attacks_on_scans_resume_from_their_file_and_never_from_one_of_other_settings(
    scans, tmp_path, monkeypatch
):
    model, patients, ran = scans
    config, path = make_config("demo", "Resnet"), tmp_path / "attention.npz"
    chosen, curve = np.array([0, 1, 3, 4, 6]), np.array([1, 4])

    def attacked(budget=SMALL, of=model, chosen=chosen, curve=curve, config=config):
        ran.clear()
        return scan_attacks.attacked_scans(
            of, patients, chosen, curve, config, budget, path, "attention"
        )

    def same(one, other):
        return one.keys() == other.keys() and all(
            np.array_equal(one[key], other[key]) for key in one
        )

    first = attacked()
    assert ran and {attack.view for attack in ran} == {"four", "three", "binary"}
    assert {attack.momentum for attack in ran} == {None, sequence.MOMENTUM}
    for eps in SMALL["eps"]:
        columns = {key.partition(":")[2] for key in first if key.startswith(f"{eps}:scan_")}
        assert columns == {
            "scan_pgd2",
            "scan_mpgd2",
            "scan_pgd2_merged",
            "scan_mpgd2_merged",
            "scan_pgd2_binary",
        }
        assert all(first[f"{eps}:{name}"].shape == (5, 4) for name in columns)
    assert (
        path.with_suffix(".safetensors").is_file()
        and len(first["least_gradient"]) == len(first["least_random"]) == 2
    )
    assert same(attacked(), first) and not ran, "the file is taken"
    assert same(attacked(SMALL | {"train": 3, "test": 9}), first) and not ran, (
        "these are settings of what comes before"
    )

    # Curves of older code are measured again, and the attacks on whole scans, which cost most, are
    # not.
    np.savez(path, **{**first, "curve_state": np.array(0), "least_gradient": np.full(2, 77)})
    with monkeypatch.context() as patched:
        patched.setattr(scan_attacks, "attacked_in_view", lambda *_: pytest.fail("attacked again"))
        assert same(attacked(), first)

    longer = attacked(SMALL | {"steps": 3})
    assert ran and "4/255:scan_pgd3" in longer and "4/255:scan_pgd2" not in longer
    for other in (
        dict(budget=SMALL | {"doublings": 2}),
        dict(chosen=np.array([0, 1, 2, 4, 6])),
        dict(curve=np.array([1, 6])),
        dict(config=dataclasses.replace(config, seed=1)),
    ):
        attacked(**other)
        assert ran, other
    assert same(attacked(), first) and ran, "attacked again, and to the same numbers"
    with torch.no_grad():
        model.aggregator.head.bias += 1e-3
    attacked()
    assert ran, "other weights"


def test_every_attack_on_scans_is_scored_and_described(scans, tmp_path):
    model, patients, _ = scans
    everyone = np.arange(7)
    found = scan_attacks.attacked_scans(
        model,
        patients,
        everyone,
        everyone,
        make_config("demo", "Resnet"),
        SMALL,
        tmp_path / "a.npz",
        "a",
    )
    metadata = scan_attacks.attack_metadata(found, 7)
    assert {f"{eps}:{name}" for eps, name in metadata} == {key for key in found if ":scan_" in key}
    assert {name: attack["view"] for (_, name), attack in metadata.items()} == {
        "scan_pgd2": "four",
        "scan_mpgd2": "four",
        "scan_pgd2_merged": "three",
        "scan_mpgd2_merged": "three",
        "scan_pgd2_binary": "binary",
    }
    clean = model(patients.values.float() / 255, patients.mask).detach().numpy()
    checks = scan_attacks.scan_checks("a", patients, everyone, everyone, clean, found, SMALL)
    assert [
        row["check"]
        for row in checks
        if not row["passed"] and not row["check"].startswith("converged")
    ] == []


# --- From records ---


def sequence_record(tmp_path):
    generator = np.random.default_rng(0)
    labels = np.array([0] * 10 + [1] * 7 + [2] * 3)
    clean = 2 * np.eye(4)[labels] + generator.normal(size=(20, 4))
    attacked = np.full((20, 4), np.nan)
    attacked[::2] = -clean[::2]
    rows = {
        "labels": labels.astype(np.int8),
        "fold": np.zeros(20, np.int8),
        "seed": np.zeros(20, np.int8),
        "patient_id": np.arange(20, dtype=np.int32),
        "slice_index": np.full(20, -1, np.int16),
        "file_sha256": np.zeros((20, 32), np.uint8),
        "Resnet gru/clean": to_half(clean),
        "Resnet gru/4/255:scan_pgd3": to_half(attacked),
    }
    budget = {
        "eps": "4/255",
        "budgets": [0, 1, 32],
        "people": list(range(0, 20, 2)),
        "labels": labels[::2].tolist(),
        "least": {"gradient": [1, 32] * 5, "random": [32] * 10},
    }
    run = {
        "model": "Sequence",
        "regime": "both",
        "protocol": "patient",
        "data": "phantom",
        "profile": "demo",
        "init": "random",
        "search": "none",
        "fold": 0,
        "seed": 0,
        "cohort_sha256": "0",
        "config": {"headline_eps": "4/255"},
        "wall_seconds": {"train": 1, "attack": 1},
        "git_commit": "0",
        "git_dirty": False,
        "sanity": [],
        "variants": {
            "Resnet gru": {
                "attacks": {"4/255": {"scan_pgd3": {"norm": "linf"}}},
                "slice_budget": budget,
            }
        },
    }
    record = records.summarize(rows, [run], n_boot=100)
    path = tmp_path / "assets" / "Sequence" / "patient.json"
    records.write_record(path, record, rows)
    return records.read_records(tmp_path)["Sequence", "patient"]


def test_a_record_names_its_variants_and_its_figures_come_from_it_alone(tmp_path):
    record = sequence_record(tmp_path)
    assert record.to_json()["variants"]["Resnet gru"]["variant"] == "Resnet gru"
    assert {path.name for path in scans_and_ensembles.draw_figures(tmp_path)} == {
        "slice_budget_patient.png",
        "abstention_patient.png",
    }
    pooled = scans_and_ensembles.pooled_budgets(record, "Resnet gru", "gradient")
    assert (pooled.budgets, pooled.n_patients, pooled.eps) == ([0, 1, 32], 10, "4/255")
    assert [share.value for share in pooled.robust] == pytest.approx([1, 0.5, 0])


def test_a_fold_without_a_form_is_left_out_of_it(tmp_path):
    record = sequence_record(tmp_path)
    whole = scans_and_ensembles.patient_reliability(record, "Resnet gru")
    more = {
        name: np.concatenate([values, np.full_like(values, np.nan) if "/" in name else values])
        for name, values in record.predictions.items()
    }
    more["fold"] = np.repeat(np.array([0, 1], np.int8), 20)
    other = {**record.metas[0], "fold": 1, "variants": {}}
    record = records.summarize(more, [record.metas[0], other], n_boot=100)
    records.write_record(tmp_path / "assets" / "Sequence" / "patient.json", record, more)
    grown = records.read_records(tmp_path)["Sequence", "patient"]
    assert scans_and_ensembles.patient_reliability(grown, "Resnet gru") == whole
    assert record.variants["Resnet gru"].clean.n_patients == 20 and record.folds == [0, 1]
    assert scans_and_ensembles.pooled_budgets(record, "Resnet gru", "gradient").n_patients == 10
    checks = [
        schema.Check(name="any", passed=True, variant=name, fold=0, seed=0)
        for name in ("Resnet gru", "Resnet mean")
    ]
    grown = dataclasses.replace(grown, sanity=checks, profile="cpu")
    row = next(row for row in rows.table_rows({("Sequence", "patient"): grown}) if row.variant)
    assert (
        row.folds("patient") == [0]
        and report.runs_text(row).endswith(", fold 0 of 5")
        and report.checks_text(row, "patient") == "1/1"
    )
    assert len(scans_and_ensembles.draw_figures(tmp_path)) == 2


def test_coverage_falls_under_attack_at_the_thresholds_of_clean_scans(tmp_path):
    found = scans_and_ensembles.patient_reliability(
        sequence_record(tmp_path), "Resnet gru", alpha=0.2
    )
    assert found["clean"].n_patients == 20 and found["eps 4/255"].n_patients == 10
    assert found["eps 4/255"].coverage.value < found["clean"].coverage.value
    assert "Resnet gru" in scans_and_ensembles.sequence_text(sequence_record(tmp_path))


def test_the_committed_ensembles_leave_no_more_robust_under_several_images_than_under_one():
    record = json.loads((ROOT / "assets" / "Ensemble" / "patient.json").read_text(encoding="utf-8"))
    assert record["data"] == "real" and set(record["variants"]) == {
        f"{combiner} {membership}" for combiner, membership in FORMS
    }
    compared = 0
    for variant, blocks in record["variants"].items():
        assert blocks["variant"] == variant
        for attacks in blocks["other_norms"].get("relaxed", {}).values():
            one, several = (attacks[name]["accuracy"] for name in ("one_image", "separate_images"))
            assert several["value"] <= one["value"] and one["ci"] and several["ci"]
            compared += 1
    assert compared >= 3
