"""The leak audit of any image folder: who is on both sides of its split, and what a classifier without medicine scores.

    python -m utils.audit RAW --out report.html        # any class folders, with or without train/ and test/
    python -m utils.audit RAW --against OTHER          # the patients that two sets share, in counts alone
    python -m utils.audit RAW --against OTHER --ages TABLE.csv --id-pattern REGEX --age-from 60 --scores age.json

Exit code 0: people were found and the page says what the split shares, or patients that two sets share; 3: the images
show no people that can be told apart (the page says so), or no patient whom two sets share; 2: something cannot be
read.
"""

from __future__ import annotations

import base64
import html
import io
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from utils import audit_figures, cohort as recovery
from utils import records, shared_patients
from utils.cohort import Cohort, NoPatientsError, RawImages, Recovery, features, members_of, nearest
from utils.controls import as_rows, baseline_record, nearest_rows, shrunk
from utils.data import Folds, split_patients, split_slices
from utils.utils_funcs import CLASSES, PROTOCOLS, ROOT, UserError, atomic_path, progress

NO_PATIENTS = 3
ARRAYS = audit_figures.ARRAYS
#: Above so many images the audit measures correlations at the search size only, to stay within memory.
FULL_SIZE_LIMIT = 12_000
THRESHOLDS = np.round(np.arange(0.50, 0.9951, 0.005), 3)
EDGES = np.linspace(0, 1, 201)


# ---------------------------------------------------------------------------------------------- people from pixels


def link_evidence(vectors: np.ndarray, patient: np.ndarray) -> dict[str, np.ndarray]:
    """How far people lie apart: histograms over `EDGES` of each image's best correlation with its own person and with
    anybody else, and how many groups remain at each of `THRESHOLDS`.

    Args:
        vectors: `float32` (N, D) unit rows of real images.
        person: (N,) ids from 0.

    Returns:
        `own`, `other` (200,) counts; `groups` (T,) connected components; `gap` (2,) best link between two people and
        weakest link that joins a slice to its own, on these vectors.
    """
    own, within = np.empty(len(vectors)), []
    for members in members_of(patient):
        matrix = vectors[members] @ vectors[members].T
        within.append(recovery.tree_of(matrix))
        own[members] = np.where(np.eye(len(members), dtype=bool), -1, matrix).max(1)
    between, other = patient_tree(vectors, patient)
    weights = np.concatenate([*within, between])
    groups = len(vectors) - np.array([(weights >= threshold).sum() for threshold in THRESHOLDS])
    return {
        "own": _histogram(own),
        "other": _histogram(other),
        "groups": groups.astype(np.int32),
        "gap": np.array([other.max(), min(links.min() for links in within)]),
    }


def patient_tree(vectors: np.ndarray, patient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlations (P - 1,) of the strongest tree that joins the people to one whole, and each image's best correlation
    (N,) with anybody else; in as many passes over all pairs as the number of parts takes to shrink to one."""
    part, links, other = np.asarray(patient), np.empty((0, 3)), None
    while part.max() > 0:
        found, best = recovery.join_parts(vectors, part)
        other = best if other is None else other
        found[:, :2] = patient[found[:, :2].astype(np.int64)]
        links = recovery.kruskal(np.vstack([links, found]), patient.max() + 1)
        part = recovery.groups_above(links, patient.max() + 1, -2)[patient]
    return links[:, 2], other


def _histogram(correlations: np.ndarray) -> np.ndarray:
    return np.histogram(np.clip(correlations, 0, 1), EDGES)[0].astype(np.int32)


def sizes_by_class(patient: np.ndarray, label: np.ndarray) -> np.ndarray:
    """(P, 2) class and number of images of each person."""
    return np.array(
        [[np.bincount(label[members]).argmax(), len(members)] for members in members_of(patient)]
    )


def recompressed(image: np.ndarray, quality: int) -> np.ndarray:
    """The image after another JPEG compression."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def stability(images: Sequence[np.ndarray], patient: np.ndarray, seed: int = 0) -> list[dict]:
    """Does the recovery depend on how it is done? The same images under other blur widths, sizes, compression, noise.

    Returns:
        One row a variant: `variant`, `people` found (0: no gap), `same` (whether they are the same people), and `low`
        and `high`, the edges of the gap (NaN: none), all at the recovery's search size.
    """
    rng = np.random.default_rng(seed)

    def noisy(sigma: float) -> Callable:
        return lambda image: np.clip(
            image + np.rint(rng.normal(0, sigma, image.shape)), 0, 255
        ).astype(np.uint8)

    variants: list[tuple[str, Callable, dict]] = [("as published", lambda image: image, {})]
    variants += [
        (f"blur widths {a:g} and {b:g}", lambda image: image, {"narrow": a, "wide": b})
        for a, b in ((0.7, 4), (1, 3), (1.5, 6), (2, 8))
    ]
    variants += [
        (f"features of {side} px", lambda image: image, {"side": side}) for side in (64, 128)
    ]
    variants += [
        (f"images of {side} px", lambda image, side=side: shrunk(image, side), {})
        for side in (64, 32)
    ]
    variants += [
        (f"JPEG quality {quality}", lambda image, quality=quality: recompressed(image, quality), {})
        for quality in (90, 75, 60)
    ]
    variants += [(f"noise of {sigma} grey levels", noisy(sigma), {}) for sigma in (2, 4, 8)]
    rows = []
    for name, change, options in progress(variants, "stability"):
        vectors = features([change(image) for image in images], **options)
        rows.append({"variant": name, **_regroup(vectors, patient)})
    return rows


def _regroup(vectors: np.ndarray, patient: np.ndarray) -> dict:
    tree = recovery.strongest_tree(vectors, rounds=1)
    gap = recovery.find_gap(tree, len(vectors))
    if gap is None:
        return {"people": 0, "same": False, "low": float("nan"), "high": float("nan")}
    group = recovery.groups_above(tree, len(vectors), recovery.middle(gap))
    pairs = len(set(zip(group.tolist(), patient.tolist(), strict=True)))
    return {
        "people": int(group.max()) + 1,
        "same": pairs == group.max() + 1 == len(np.unique(patient)),
        "low": gap[0],
        "high": gap[1],
    }


# ---------------------------------------------------------------------------------------------- what the split measures


def patients_on_both_sides(cohort: Cohort) -> dict[str, int]:
    """How many people stand in the published train, in the published test folder, and in both."""
    known = cohort.patient_id >= 0
    train, test = (
        set(cohort.patient_id[known & (cohort.source_split == split)].tolist())
        for split in ("train", "test")
    )
    images = known & (cohort.source_split == "test")
    leaked = images & np.isin(cohort.patient_id, list(train))
    return {
        "train": len(train),
        "test": len(test),
        "both": len(train & test),
        "test_images": int(images.sum()),
        "test_images_of_training_people": int(leaked.sum()),
    }


def distance_to_training(cohort: Cohort) -> np.ndarray:
    """For each published test slice the number of slices to the nearest training slice of its own person (1: its direct
    neighbour was trained on); -1 where the person has none."""
    known = cohort.patient_id >= 0
    train, test = (
        known & (cohort.source_split == "train"),
        np.flatnonzero(known & (cohort.source_split == "test")),
    )
    distances = np.full(len(test), -1)
    for row, i in enumerate(test):
        own = cohort.slice_index[train & (cohort.patient_id == cohort.patient_id[i])]
        if len(own):
            distances[row] = np.abs(own - cohort.slice_index[i]).min()
    return distances


# ---------------------------------------------------------------------------------------------- synthetic images


def synthetic_evidence(raw: RawImages, cohort: Cohort) -> dict[str, np.ndarray]:
    """What the synthetic images are and where they come from.

    Returns:
        `kinds` (4, 3): images by class and kind (real, synthetic, duplicate) in the published train folder; `likeness`
        (200,): histogram over `EDGES` of each one's correlation with the nearest real image; `likeness_real` (200,):
        the same of real images with the nearest other real one; `from_test` (4, 2): by class, synthetic images, and
        those whose nearest real image is a test slice; `test_share` (4,): share of test slices among a class's real
        images; `background` (2, 2): least and greatest corner level of real and
        of synthetic images; `shortcut` (2,): accuracy in the train folder of answering the most frequent class of the
        image's kind (real or synthetic), and of the most frequent class overall.
    """
    train = cohort.source_split != "test"
    kinds = np.array(
        [
            [
                ((cohort.label == k) & (cohort.kind == kind) & train).sum()
                for kind in ("real", "synthetic", "duplicate")
            ]
            for k in range(len(CLASSES))
        ]
    )
    real, made = np.flatnonzero(cohort.kind == "real"), np.flatnonzero(cohort.kind == "synthetic")
    side = 64 if len(cohort) <= FULL_SIZE_LIMIT else recovery.SEARCH_SIDE
    vectors = {
        name: features([raw.images[i] for i in rows], side)
        for name, rows in (("real", real), ("made", made))
    }
    among_real = nearest(vectors["real"])[0][:, 0]
    from_test, likeness = np.zeros((len(CLASSES), 2), np.int32), np.zeros(len(made))
    if len(made):
        closest = nearest_rows(vectors["made"], vectors["real"])
        likeness = (vectors["made"] * vectors["real"][closest]).sum(1)
        tested = cohort.source_split[real[closest]] == "test"
        for k in range(len(CLASSES)):
            own = cohort.label[made] == k
            from_test[k] = own.sum(), (own & tested).sum()
    tested = cohort.source_split[real] == "test"
    test_share = np.array(
        [
            tested[cohort.label[real] == k].mean() if (cohort.label[real] == k).any() else 0
            for k in range(len(CLASSES))
        ]
    )
    levels = recovery.background(raw.images)
    background = np.array(
        [
            [levels[rows].min(), levels[rows].max()] if len(rows) else [np.nan] * 2
            for rows in (real, made)
        ]
    )
    by_kind = np.column_stack([kinds[:, 0] + kinds[:, 2], kinds[:, 1]])
    shortcut = np.array([by_kind.max(0).sum(), by_kind.sum(1).max()]) / max(1, by_kind.sum())
    return {
        "kinds": kinds,
        "likeness": _histogram(likeness),
        "likeness_real": _histogram(among_real),
        "from_test": from_test,
        "test_share": test_share,
        "background": background,
        "shortcut": shortcut,
    }


# ---------------------------------------------------------------------------------------- everything, as small arrays


def leak_arrays(
    raw: RawImages, cohort: Cohort, *, data: str, thorough: bool = True
) -> dict[str, np.ndarray]:
    """All that the audit's figures are drawn from, without the images: histograms and counts, well under 1 MB.

    Args:
        thorough: measure at full size and the stability too; else at the search size alone, in a fraction of the time.
    """
    real = np.flatnonzero(cohort.kind == "real")
    images, patient = [raw.images[i] for i in real], cohort.patient_id[real]
    side = (
        recovery.full_side(images)
        if thorough and len(raw) <= FULL_SIZE_LIMIT
        else recovery.SEARCH_SIDE
    )
    arrays = {
        f"links_{name}": value
        for name, value in link_evidence(features(images, side), patient).items()
    }
    arrays |= {
        f"synthetic_{name}": value for name, value in synthetic_evidence(raw, cohort).items()
    }
    if thorough:
        rows = stability(images, patient)
        arrays |= {f"stability_{name}": np.array([row[name] for row in rows]) for name in rows[0]}
    shared = patients_on_both_sides(cohort)
    return arrays | {
        "sizes": sizes_by_class(patient, cohort.label[real]),
        "distance": distance_to_training(cohort).astype(np.int16),
        "shared": np.array([shared[name] for name in audit_figures.SHARED]),
        "data": np.array(data),
        "side": np.array(side),
    }


def write_arrays(arrays: dict[str, np.ndarray], path: Path | str) -> None:
    """Writes the arrays atomically, compressed; equal arrays give equal bytes."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def run_audit(
    folder: Path,
    raw: RawImages,
    cohort: Cohort,
    folds: Folds,
    *,
    data: str,
    profile: str,
    cohort_sha256: str,
    again: bool = False,
) -> dict[str, dict]:
    """Leaves in `folder` (`assets/Baselines`) the records of the controls under both protocols, and the arrays of
    the audit's figures, where they are missing, of another cohort, or `again`; and the data card. At profile `demo` one fold of `patient`
    stands for all, and stability is not measured.

    Returns:
        Protocol → record.
    """
    found, thorough = {}, profile != "demo"
    for protocol in PROTOCOLS:
        path = folder / f"{protocol}.json"
        record = records.read_record(path) if path.is_file() and not again else {}
        if (record.get("cohort_sha256"), record.get("profile")) != (cohort_sha256, profile):
            record, predictions = baseline_record(
                raw,
                cohort,
                folds,
                protocol,
                data=data,
                profile=profile,
                cohort_sha256=cohort_sha256,
                test_folds=range(5 if thorough else 1),
            )
            records.write_record(path, record, predictions)
            (folder / ARRAYS).unlink(missing_ok=True)
        found[protocol] = record
    if again or not (folder / ARRAYS).is_file():
        write_arrays(leak_arrays(raw, cohort, data=data, thorough=thorough), folder / ARRAYS)
    with atomic_path(folder / "data_card.md") as temporary:
        temporary.write_text(
            f"# Data card\n\ndata: {data}\n\n{data_card(cohort, folds)}\n", encoding="utf-8"
        )
    return found


def data_card(cohort: Cohort, folds: Folds | None = None) -> str:
    """The data in a page of Markdown: counts by protocol in people and slices, and what cannot be concluded."""

    def row(name: str, rows: np.ndarray) -> str:
        cells = []
        for k in range(len(CLASSES)):
            members = rows[cohort.label[rows] == k]
            patients = len(set(cohort.patient_id[members].tolist()) - {-1})
            cells.append(f"{patients} / {len(members):,}" if len(members) else "–")
        patients = len(set(cohort.patient_id[rows].tolist()) - {-1})
        return f"| {name} | " + " | ".join(cells) + f" | {patients} / {len(rows):,} |"

    lines = [
        "| people / images | " + " | ".join(CLASSES) + " | all |",
        "|---" * (len(CLASSES) + 2) + "|",
    ]
    for kind in ("real", "synthetic", "duplicate"):
        lines.append(row(f"all, {kind}", np.flatnonzero(cohort.kind == kind)))
    lines += [row(f"`slice`, {name}", rows) for name, rows in split_slices(cohort).items()]
    if folds is not None:
        lines += [
            row(f"`patient`, test fold {fold}", split_patients(cohort, folds, fold)["test"])
            for fold in sorted(set(folds.fold.tolist()))
        ]
    moderate = len(set(cohort.patient_id[(cohort.label == 3) & (cohort.patient_id >= 0)].tolist()))
    return "\n".join(
        [
            *lines,
            "",
            f"- **Moderate is {moderate} people.** No four-class number by person says anything about Moderate; "
            "beside it stand three classes (Mild and Moderate merged) and Non against the rest.",
            "- **Age is a confound.** In the source cohort part of the Non group is younger than any demented person; "
            "a classifier may see age.",
            "- **No names.** Patient ids are arbitrary integers recovered from pixels, linked to no other data set.",
            "- **Licence.** The images are distributed on Kaggle without a clear licence of their source; "
            "this repository holds none of them, only hashes, ids, scores and the few slices that figures show.",
            "- **Not to be concluded:** anything about other scanners, slice selections or populations, "
            "and nothing clinical.",
        ]
    )


# ---------------------------------------------------------------------------------------------- the tool


def split_control(raw: RawImages, cohort: Cohort) -> dict[str, tuple[float, float]]:
    """Accuracy and balanced accuracy of the nearest neighbour on 32×32 pixels: under the published split (where there
    is one), and with people kept apart (five groups of people, real images only)."""
    rows, result = as_rows(raw.images, 32), {}
    train, test = (np.flatnonzero(cohort.source_split == split) for split in ("train", "test"))
    if len(train) and len(test):
        result["published split"] = _rates(
            cohort.label[test], cohort.label[train[nearest_rows(rows[test], rows[train])]]
        )
    real = np.flatnonzero(cohort.kind == "real")
    fold = cohort.patient_id[real] % 5
    answers = np.empty(len(real), np.int64)
    for k in np.unique(fold):
        inside, others = real[fold == k], real[fold != k]
        answers[fold == k] = cohort.label[others[nearest_rows(rows[inside], rows[others])]]
    result["people kept apart"] = _rates(cohort.label[real], answers)
    return result


def _rates(labels: np.ndarray, answers: np.ndarray) -> tuple[float, float]:
    right = labels == answers
    return float(right.mean()), float(
        np.mean([right[labels == k].mean() for k in np.unique(labels)])
    )


def copies(raw: RawImages) -> tuple[int, int]:
    """Images whose pixels stand in an earlier one, and images of the test folder whose pixels stand in train."""
    pixel = [image.tobytes() for image in raw.images]
    train = {pixel[i] for i in range(len(raw)) if raw.source_split[i] == "train"}
    return len(raw) - len(set(pixel)), sum(
        pixel[i] in train for i in range(len(raw)) if raw.source_split[i] == "test"
    )


def report_page(raw: RawImages, source: str) -> tuple[str, bool]:
    """The audit as one self-contained HTML page, and whether people were found."""
    try:
        cohort, found = recovery.build_cohort(raw)
    except NoPatientsError as error:
        body = [
            f"<p class='verdict'>{html.escape(str(error))}</p>",
            "<p>So nothing can be said from the pixels about who stands on both "
            "sides of a split. That is no proof that nobody does.</p>",
            "<p>Exact copies: {:,}, of which {:,} test images repeat a training image.</p>".format(
                *copies(raw)
            ),
        ]
        if error.recovery is not None and len(error.recovery.links):
            body.append(
                _inline(audit_figures.links_figure(error.recovery.links, None, label=source))
            )
        return _page(source, raw, body), False
    return _page(source, raw, _findings(raw, cohort, found, source)), True


def _findings(raw: RawImages, cohort: Cohort, found: Recovery, source: str) -> list[str]:
    shared, control = patients_on_both_sides(cohort), split_control(raw, cohort)
    sizes = [
        len(members)
        for members in members_of(np.where(cohort.kind == "real", cohort.patient_id, -1))
    ]
    kinds = Counter(cohort.kind.tolist())
    facts = [
        (
            "groups of slices (people)",
            f"{len(sizes):,}, of {min(sizes)} to {max(sizes)} images (median {int(np.median(sizes))})",
        ),
        (
            "gap",
            f"two groups reach a correlation of {found.gap[0]:.3f}, a slice joins its own at {found.gap[1]:.3f}",
        ),
        ("images in a group", f"{kinds['real']:,}"),
        ("images in none (synthetic, or alone)", f"{kinds['synthetic']:,}"),
        (
            "exact copies",
            "{:,}, of which {:,} test images repeat a training image".format(*copies(raw)),
        ),
        ("groups in more than one class", f"{len(found.conflicts):,}"),
    ]
    verdict = "The folder has no train and test parts, so no split is judged; split it by the groups found, never by image."
    if shared["test_images"]:
        share = shared["test_images_of_training_people"] / shared["test_images"]
        verdict = (
            f"{share:.1%} of the test images that belong to a group have that group in train "
            f"({shared['both']} of {shared['test']} test groups)."
        )
        facts.append(
            (
                "nearest training slice of a test image's own group",
                _distances(distance_to_training(cohort)),
            )
        )
    facts += [
        (
            f"1-nearest neighbour on 32×32 pixels, {name}",
            f"{rate:.1%} accuracy, {balanced:.1%} balanced",
        )
        for name, (rate, balanced) in control.items()
    ]
    table = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in facts
    )
    body = [
        f"<p class='verdict'>{html.escape(verdict)}</p>",
        f"<table>{table}</table>",
        _inline(audit_figures.links_figure(found.links, found.search_gap, label=source)),
        _inline(audit_figures.stack_figure(*example_stacks(raw, cohort), label=source)),
    ]
    if found.conflicts:
        rows = "".join(
            f"<tr><td>group {who}</td><td>"
            + html.escape(", ".join(f"{raw.classes[k]}: {count}" for k, count in counts.items()))
            + "</td></tr>"
            for who, counts in list(found.conflicts.items())[:50]
        )
        body.append(f"<h2>Groups in more than one class</h2><table>{rows}</table>")
    return body


def _distances(distance: np.ndarray) -> str:
    known = distance[distance >= 0]
    return (
        f"next to it for {np.mean(known <= 1):.1%}, at most 3 slices away for {np.mean(known <= 3):.1%}"
        if len(known)
        else "none"
    )


def example_stacks(
    raw: RawImages, cohort: Cohort, columns: int = 16, seed: int = 0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """One person's slices in order, and as many real images drawn at random."""
    groups = members_of(np.where(cohort.kind == "real", cohort.patient_id, -1))
    rng = np.random.default_rng(seed)
    members = max(groups, key=lambda group: (min(len(group), 2 * columns), -group[0]))
    ordered = members[np.argsort(cohort.slice_index[members])][: 2 * columns]
    drawn = rng.choice(np.flatnonzero(cohort.kind == "real"), len(ordered), replace=False)
    return [raw.images[i] for i in ordered], [raw.images[i] for i in drawn]


def _inline(figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return (
        f"<img alt='' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"
    )


def _page(source: str, raw: RawImages, body: list[str]) -> str:
    splits = Counter(raw.source_split)
    counts = ", ".join(
        f"{count:,} {split or 'without a split'}" for split, count in sorted(splits.items())
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Leak audit</title><style>"
        "body{font:16px/1.5 system-ui,sans-serif;max-width:1000px;margin:2rem auto;padding:0 1rem;color:#222}"
        "img{max-width:100%;display:block;margin:1.5rem 0}table{border-collapse:collapse}"
        "th,td{text-align:left;padding:.3rem .8rem .3rem 0;border-bottom:1px solid #e6e6e6;"
        "font-weight:normal;vertical-align:top}"
        "th{color:#6b6b6b}.verdict{font-size:1.25rem;font-weight:bold}</style></head><body>"
        f"<h1>Leak audit of {html.escape(source)}</h1><p>{len(raw):,} images ({counts}) in "
        f"{len(raw.classes)} classes.</p>"
        + "\n".join(body)
        + "<p>Groups are recovered from pixels alone: images are linked by the correlation of a difference of two "
        "Gaussian blurs, and a group is what a gap in these links sets apart. A group is taken for one "
        "person.</p></body></html>\n"
    )


def main(
    raw: Path,
    /,
    out: Path | None = None,
    against: Path | None = None,
    other_name: str | None = None,
    id_pattern: str | None = None,
    ages: Path | None = None,
    id_column: str = "ID",
    age_column: str = "Age",
    age_from: float | None = None,
    age_to: float | None = None,
    scores: Path | None = None,
    records_root: Path = ROOT,
    skip_unreadable: bool = False,
) -> None:
    """Audits a folder or zip of class folders, or finds the patients that it shares with another set.

    Args:
        raw: class folders of any names, with or without train/ and test/ above them.
        out: the HTML page to write.
        against: another folder or zip of images; the audit is then of what the two sets share, as counts.
        other_name: what the page and the file of scores call the other set; its path's name by default.
        id_pattern: regular expression that finds a patient's id in the other set's file names, by its first
            group where it has one; without it each image is a patient of its own.
        ages: CSV of the other set's patients. The patients found in a range of ages are then the age-matched
            part.
        id_column: the column of `ages` that holds the ids.
        age_column: the column of `ages` that holds ages in years.
        age_from: the least age of the part.
        age_to: the greatest age of the part.
        scores: JSON file for the scores of committed predictions on the part, beside those on everybody.
        records_root: the folder whose assets/ hold the records to score.
        skip_unreadable: go on without images of this set that cannot be read.
    """
    images = recovery.read_raw(raw, skip_unreadable=skip_unreadable, any_classes=True)
    if against is None:
        _audit_one(
            images,
            raw,
            out,
            {
                "ages": ages,
                "scores": scores,
                "id_pattern": id_pattern,
                "age_from": age_from,
                "age_to": age_to,
            },
        )
        return
    if ages is None and (age_from, age_to) != (None, None):
        raise UserError("A range of ages needs a table of ages: name it with --ages.")
    table = None if ages is None else shared_patients.read_ages(ages, id_column, age_column)
    other = shared_patients.read_other(against, id_pattern)
    _audit_two(
        images,
        raw.name,
        other,
        other_name or against.name,
        table,
        age_from=age_from,
        age_to=age_to,
        out=out,
        scores=scores,
        records_root=records_root,
    )


def _audit_one(
    images: RawImages, raw: Path, out: Path | None, needs_other: dict[str, object]
) -> None:
    """The audit of one set; `needs_other` are options that mean nothing without another."""
    given = [
        f"--{name.replace('_', '-')}" for name, value in needs_other.items() if value is not None
    ]
    if given:
        raise UserError(
            f"{' and '.join(given)} need another set of images: name it with --against."
        )
    if out is None:
        raise UserError("Name the page to write with --out.")
    page, found = report_page(images, raw.name)
    _write_page(page, out)
    if not found:
        print(
            f"No people can be told apart in {raw}: its images show no gap between groups of slices.",
            file=sys.stderr,
        )
        sys.exit(NO_PATIENTS)


def _audit_two(
    images: RawImages,
    source: str,
    other: shared_patients.OtherSet,
    other_name: str,
    ages: dict[str, float] | None,
    *,
    age_from: float | None,
    age_to: float | None,
    out: Path | None,
    scores: Path | None,
    records_root: Path,
) -> None:
    """What two sets share, printed, and written where a page or a file of scores is asked for."""
    images = shared_patients.in_model_order(images)
    try:
        cohort = recovery.cohort_for(images)
        comparison, part = shared_patients.compare(
            images, cohort, other, other_name, ages, age_from=age_from, age_to=age_to
        )
    except (NoPatientsError, shared_patients.NoGapError) as error:
        print(error, file=sys.stderr)
        sys.exit(NO_PATIENTS)
    for name, value in shared_patients.facts(comparison):
        print(f"{name}: {value}")
    print(shared_patients.explanation(comparison))
    rows = {}
    if scores is not None:
        identity = shared_patients.cohort_identity(cohort)
        entries = records.read_entries(records_root).values()
        rows = shared_patients.score_rows(entries, part, identity)
        shared_patients.write_scores(scores, comparison, rows, identity)
        print(f"written to {scores}")
    if out is not None:
        _write_page(_page(source, images, shared_patients.page_body(comparison, rows)), out)


def _write_page(page: str, out: Path) -> None:
    with atomic_path(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    import tyro

    try:
        tyro.cli(main)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
