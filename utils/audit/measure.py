"""The evidence of the leak audit: patients, split, synthetic images; its arrays on disk."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.audit.figures import ARRAYS, SHARED, THRESHOLDS
from utils.cohort import Cohort, RawImages
from utils.cohort.linking import (
    find_gap,
    groups_above,
    groups_of,
    join_parts,
    middle,
    strongest_forest,
    strongest_tree,
    tree_within,
)
from utils.cohort.order import members_of
from utils.cohort.similarity import (
    SEARCH_SIDE,
    background,
    features,
    full_side,
    nearest,
)
from utils.controls import baseline_record, nearest_rows, shrunk
from utils.data import Folds, split_patients, split_slices
from utils.evaluation.records import Record, read_record, write_record
from utils.images import chosen, computed
from utils.utils_funcs import CLASSES, PROTOCOLS, atomic_path, progress

#: Above so many images correlations are measured at the search size only, to stay within memory.
FULL_SIZE_LIMIT = 12_000

#: Edges of the histograms' 200 bins of correlations.
EDGES = np.linspace(0, 1, 201)


# -- patients from pixels --------------------------------------------------------------------------


def link_evidence(vectors: np.ndarray, patient: np.ndarray) -> dict[str, np.ndarray]:
    """How far patients lie apart.

    Args:
        vectors: `float32` (N, D), unit rows of real images.
        patient: (N,) ids from 0.

    Returns:
        `own`, `other`: (200,) histograms over `EDGES` of each image's best correlation with its own
        patient and with any other; `groups`: (T,) how many groups links at or above each of
        `THRESHOLDS` leave; `gap`: (2,) strongest link between two patients and weakest link that
        joins a slice to its patient, on these vectors.
    """
    own, within = np.empty(len(vectors)), []
    for members in members_of(patient):
        matrix = vectors[members] @ vectors[members].T
        within.append(tree_within(matrix))
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
    """The strongest tree that joins all patients.

    Parts of the tree are joined in passes over all pairs of images, until one part is left.

    Args:
        vectors: `float32` (N, D), unit rows of images.
        patient: (N,) ids from 0.

    Returns:
        Correlations (P - 1,) of the tree's links; and the best correlation (N,) of each image with
        an image of another patient, -2 where there is no other patient.
    """
    n_patients = patient.max() + 1
    part, links = np.asarray(patient), np.empty((0, 3))
    best_with_others = np.full(len(vectors), -2, np.float32)
    while part.max() > 0:
        found, best = join_parts(vectors, part)
        if not len(links):
            best_with_others = best
        found[:, :2] = patient[found[:, :2].astype(np.int64)]
        links = strongest_forest(np.vstack([links, found]), n_patients)
        part = groups_of(links, n_patients)[patient]
    return links[:, 2], best_with_others


def _histogram(correlations: np.ndarray) -> np.ndarray:
    return np.histogram(np.clip(correlations, 0, 1), EDGES)[0].astype(np.int32)


def sizes_by_class(patient: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Class and number of images (P, 2) of each patient, by patient id."""
    return np.array(
        [[np.bincount(label[members]).argmax(), len(members)] for members in members_of(patient)]
    )


# -- stability -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regrouped:
    """Patients found again, from other features.

    Attributes:
        patients: how many; 0 where there is no gap.
        same: whether they are the known ones.
        gap: correlations below and above it; NaN where there is none.
    """

    patients: int
    same: bool
    gap: tuple[float, float]


def regroup(vectors: np.ndarray, patient: np.ndarray) -> Regrouped:
    """Groups images (N) again, from features, and compares the groups with known patients (N,)."""
    tree = strongest_tree(vectors, rounds=1)
    gap = find_gap(tree, len(vectors))
    if gap is None:
        return Regrouped(0, False, (float("nan"), float("nan")))
    group = groups_above(tree, len(vectors), middle(gap))
    n_groups = int(group.max()) + 1
    pairs = set(zip(group.tolist(), patient.tolist(), strict=True))
    return Regrouped(n_groups, len(pairs) == n_groups == len(np.unique(patient)), gap)


def stability(
    images: Sequence[np.ndarray], patient: np.ndarray, seed: int = 0
) -> dict[str, Regrouped]:
    """Does the recovery depend on how it is done? The same images under other blur widths, sizes,
    compression and noise.

    Args:
        images: `uint8` (H, W), N real ones.
        patient: (N,) their patients.

    Returns:
        Name of the variant → the patients found, at the recovery's search size unless the variant
        says otherwise.
    """
    found = {"as published": regroup(features(images), patient)}
    for narrow, wide in ((0.7, 4), (1, 3), (1.5, 6), (2, 8)):
        vectors = features(images, narrow=narrow, wide=wide)
        found[f"blur widths {narrow:g} and {wide:g}"] = regroup(vectors, patient)
    for side in (64, 128):
        found[f"features of {side} px"] = regroup(features(images, side), patient)
    for name, change in progress(list(_changes(seed).items()), "stability"):
        found[name] = regroup(features(computed(images, change)), patient)
    return found


def _changes(seed: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Name → how an image is changed. Noise is drawn from one generator, in this order."""
    rng = np.random.default_rng(seed)

    def smaller(side: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda image: shrunk(image, side)

    def compressed(quality: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda image: recompressed(image, quality)

    def noisy(sigma: float) -> Callable[[np.ndarray], np.ndarray]:
        return lambda image: np.clip(
            image + np.rint(rng.normal(0, sigma, image.shape)), 0, 255
        ).astype(np.uint8)

    return (
        {f"images of {side} px": smaller(side) for side in (64, 32)}
        | {f"JPEG quality {quality}": compressed(quality) for quality in (90, 75, 60)}
        | {f"noise of {sigma} grey levels": noisy(sigma) for sigma in (2, 4, 8)}
    )


def recompressed(image: np.ndarray, quality: int) -> np.ndarray:
    """The image after another JPEG compression."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


# -- the split -------------------------------------------------------------------------------------


def patients_on_both_sides(cohort: Cohort) -> dict[str, int]:
    """How many patients the published train folder, the test folder, and both hold; how many test
    images belong to patients; and how many of these to patients of the train folder."""
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
    """For each published test slice, how many slices away (N,) the nearest training slice of its
    patient is: 1 for a direct neighbor, -1 where the patient has none."""
    known = cohort.patient_id >= 0
    train = known & (cohort.source_split == "train")
    test = np.flatnonzero(known & (cohort.source_split == "test"))
    distances = np.full(len(test), -1)
    for row, i in enumerate(test):
        trained = cohort.slice_index[train & (cohort.patient_id == cohort.patient_id[i])]
        if len(trained):
            distances[row] = np.abs(trained - cohort.slice_index[i]).min()
    return distances


# -- synthetic images ------------------------------------------------------------------------------


def synthetic_evidence(raw: RawImages, cohort: Cohort) -> dict[str, np.ndarray]:
    """What the synthetic images are and where they come from.

    Returns:
        `kinds`: (4, 3) images by class and kind (real, synthetic, duplicate) outside of the
        published test folder.
        `likeness`: (200,) histogram over `EDGES` of each synthetic image's correlation with the
        nearest real image; `likeness_real`: the same of real images with the nearest other one.
        `from_test`: (4, 2) by class, synthetic images, and those whose nearest real image is a test
        slice; `test_share`: (4,) the share of test slices among a class's real images.
        `background`: (2, 2) least and greatest corner level of real and of synthetic images.
        `shortcut`: (2,) accuracy outside of the test folder of answering the most frequent class of
        the image's kind (real or synthetic), and of the most frequent class overall.
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
    by_kind = np.column_stack([kinds[:, 0] + kinds[:, 2], kinds[:, 1]])
    shortcut = np.array([by_kind.max(0).sum(), by_kind.sum(1).max()]) / max(1, by_kind.sum())
    real = np.flatnonzero(cohort.kind == "real")
    synthetic = np.flatnonzero(cohort.kind == "synthetic")
    levels = background(raw.images)
    ranges = [
        [levels[rows].min(), levels[rows].max()] if len(rows) else [np.nan] * 2
        for rows in (real, synthetic)
    ]
    return {
        "kinds": kinds,
        "background": np.array(ranges),
        "shortcut": shortcut,
        **_likeness(raw, cohort, real, synthetic),
    }


def _likeness(
    raw: RawImages, cohort: Cohort, real: np.ndarray, synthetic: np.ndarray
) -> dict[str, np.ndarray]:
    """What the nearest real images of the rows `synthetic` are: see `synthetic_evidence`."""
    side = 64 if len(cohort) <= FULL_SIZE_LIMIT else SEARCH_SIDE
    of_real = features(chosen(raw.images, real), side)
    of_synthetic = features(chosen(raw.images, synthetic), side)
    tested = cohort.source_split[real] == "test"
    from_test, likeness = np.zeros((len(CLASSES), 2), np.int32), np.zeros(len(synthetic))
    if len(synthetic):
        closest = nearest_rows(of_synthetic, of_real)
        likeness = (of_synthetic * of_real[closest]).sum(1)
        for k in range(len(CLASSES)):
            of_class = cohort.label[synthetic] == k
            from_test[k] = of_class.sum(), (of_class & tested[closest]).sum()
    test_share = []
    for k in range(len(CLASSES)):
        of_class = cohort.label[real] == k
        test_share.append(tested[of_class].mean() if of_class.any() else 0)
    return {
        "likeness": _histogram(likeness),
        "likeness_real": _histogram(nearest(of_real)[0][:, 0]),
        "from_test": from_test,
        "test_share": np.array(test_share),
    }


# -- arrays and records ----------------------------------------------------------------------------


def leak_arrays(
    raw: RawImages, cohort: Cohort, *, data: str, thorough: bool = True
) -> dict[str, np.ndarray]:
    """All that the audit's figures are drawn from: histograms and counts, well under 1 MB.

    Args:
        data: `real` or `phantom`.
        thorough: measure at full size and the stability too; else at the search size alone, in a
            fraction of the time.
    """
    real = np.flatnonzero(cohort.kind == "real")
    images, patient = chosen(raw.images, real), cohort.patient_id[real]
    full_size = thorough and len(raw) <= FULL_SIZE_LIMIT
    side = full_side(images) if full_size else SEARCH_SIDE
    links = link_evidence(features(images, side), patient)
    arrays = {f"links_{name}": value for name, value in links.items()}
    for name, value in synthetic_evidence(raw, cohort).items():
        arrays[f"synthetic_{name}"] = value
    if thorough:
        found = stability(images, patient)
        arrays |= {
            "stability_variant": np.array(list(found)),
            "stability_people": np.array([row.patients for row in found.values()]),
            "stability_same": np.array([row.same for row in found.values()]),
            "stability_low": np.array([row.gap[0] for row in found.values()]),
            "stability_high": np.array([row.gap[1] for row in found.values()]),
        }
    shared = patients_on_both_sides(cohort)
    return arrays | {
        "sizes": sizes_by_class(patient, cohort.label[real]),
        "distance": distance_to_training(cohort).astype(np.int16),
        "shared": np.array([shared[name] for name in SHARED]),
        "data": np.array(data),
        "side": np.array(side),
    }


def write_arrays(arrays: dict[str, np.ndarray], path: Path | str) -> None:
    """Writes the arrays atomically, compressed; equal arrays give equal bytes."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # names are not its options


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
) -> dict[str, Record]:
    """Leaves the audit in a folder: records of the controls, arrays of the figures, the data card.

    Records and arrays are measured where they are missing or of another cohort or profile. At
    profile `demo` one fold of `patient` represents all, and stability is not measured.

    Args:
        folder: `assets/Baselines`.
        data, profile, cohort_sha256: as the records keep them.
        again: measure in any case.

    Returns:
        Protocol → record of the controls.
    """
    found: dict[str, Record] = {}
    thorough = profile != "demo"
    for protocol in PROTOCOLS:
        path = folder / f"{protocol}.json"
        record = read_record(path) if path.is_file() and not again else None
        if not record or (record.cohort_sha256, record.profile) != (cohort_sha256, profile):
            record, predictions = baseline_record(
                raw,
                cohort,
                folds,
                protocol,
                data=data,
                profile=profile,
                cohort_sha256=cohort_sha256,
                test_folds=range(5 if thorough else 1),
                thorough=thorough,
            )
            write_record(path, record, predictions)
            (folder / ARRAYS).unlink(missing_ok=True)
        found[protocol] = record
    if again or not (folder / ARRAYS).is_file():
        write_arrays(leak_arrays(raw, cohort, data=data, thorough=thorough), folder / ARRAYS)
    with atomic_path(folder / "data_card.md") as temporary:
        temporary.write_text(
            f"# Data card\n\ndata: {data}\n\n{data_card(cohort, folds)}\n", encoding="utf-8"
        )
    return found


# -- the data card ---------------------------------------------------------------------------------

LIMITS = """\
- **Moderate is {moderate} patients.** No four-class number by patient says anything about \
Moderate; next to it are three classes (Mild and Moderate merged) and Non against the rest.
- **Age is a confound.** In the source cohort part of the Non group is younger than any demented \
patient; a classifier may see age.
- **No names.** Patient ids are arbitrary integers recovered from pixels, linked to no other data \
set.
- **Licence.** The images are distributed on Kaggle without a clear licence of their source; this \
repository holds none of them, only hashes, ids, scores and the few slices that figures show.
- **Not to be concluded:** anything about other scanners, slice selections or populations, and \
nothing clinical."""


def data_card(cohort: Cohort, folds: Folds | None = None) -> str:
    """The data in a page of Markdown: patients and slices by protocol, and what cannot be concluded
    from them."""
    rows = {
        f"all, {kind}": np.flatnonzero(cohort.kind == kind)
        for kind in ("real", "synthetic", "duplicate")
    }
    rows |= {f"`slice`, {name}": part for name, part in split_slices(cohort).items()}
    if folds is not None:
        for fold in sorted(set(folds.fold.tolist())):
            rows[f"`patient`, test fold {fold}"] = split_patients(cohort, folds, fold)["test"]
    lines = [
        "| patients / images | " + " | ".join(CLASSES) + " | all |",
        "|---" * (len(CLASSES) + 2) + "|",
    ]
    for name, part in rows.items():
        of_classes = [part[cohort.label[part] == k] for k in range(len(CLASSES))]
        cells = [_counts(cohort, images) if len(images) else "–" for images in of_classes]
        lines.append(f"| {name} | {' | '.join(cells)} | {_counts(cohort, part)} |")
    moderate = len(_patients_among(cohort, np.flatnonzero(cohort.label == 3)))
    return "\n".join([*lines, "", LIMITS.format(moderate=moderate)])


def _counts(cohort: Cohort, rows: np.ndarray) -> str:
    """How many patients and how many images the rows show."""
    return f"{len(_patients_among(cohort, rows))} / {len(rows):,}"


def _patients_among(cohort: Cohort, rows: np.ndarray) -> set[int]:
    return set(cohort.patient_id[rows].tolist()) - {-1}
