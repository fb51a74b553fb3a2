"""Raw folder or archive → one row per image: who it shows, which slice it is, real or synthetic, duplicate of what.

    python -m utils.cohort RAW --out cohort.csv

How people come out of pixels: neighbouring slices of one head are nearly the same image, slices of two heads are not.
Each image becomes a normalised difference of two Gaussian blurs, images are linked by correlation, and the tree of
strongest links falls apart into people where its links thin out: between the strongest link of two people and the
weakest link that a slice needs to join its own person lies an empty gap. The threshold is the middle of that gap; where
there is no gap the set holds no people that can be told apart, and the recovery refuses.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import stat
import sys
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache as cached
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from utils.utils_funcs import CLASSES, ROOT, UserError, atomic_path, progress

KAGGLE_DATASET = "lukechugh/best-alzheimer-mri-dataset-99-accuracy"
#: Who is on each image of the published set, as this repository holds it.
COMMITTED_COHORT = ROOT / "dataset" / "cohort.csv"
#: Seconds that Kaggle gets to answer before the phantom cohort takes its place.
DOWNLOAD_TIMEOUT = 5
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".gif", ".webp"))
#: What Pillow and the archive raise on damaged bytes.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    RuntimeError,
    Image.DecompressionBombError,
    zipfile.BadZipFile,
    zlib.error,
)
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
CLASS_NAMES = {
    "nondemented": 0,
    "noimpairment": 0,
    "verymilddemented": 1,
    "verymildimpairment": 1,
    "milddemented": 2,
    "mildimpairment": 2,
    "moderatedemented": 3,
    "moderateimpairment": 3,
}

#: Widths of the two Gaussian blurs, in 1/128 of the image's side: what lies between them is folds, neither noise nor
#: the brightness of the scan.
NARROW, WIDE = 1.0, 6.0
#: Side in pixels at which pairs are searched; links that matter are measured again at full size.
SEARCH_SIDE = 32
#: Side in pixels of the full-size features, at most.
FULL_SIDE = 128
BLOCK = 2048
NEIGHBOURS = 4
#: Pairs of look-alikes of different people that are measured again at full size.
RIVALS = 500
#: Two images alike may be two copies; a person begins with three.
LEAST_SLICES = 3
#: No scanner makes longer stacks; whatever is longer is no stack, and its order not worth polishing.
LONGEST_STACK = 600
#: A gap counts when it is this much wider than the next widest step between neighbouring links, and …
GAP_RATIO = 1.5
#: … at least so wide in Fisher's z, in which the error of a correlation is the same at every height.
GAP_LEAST = 0.1
COLUMNS = (
    "file_sha256",
    "pixel_sha256",
    "source_split",
    "label",
    "kind",
    "duplicate_of",
    "patient_id",
    "slice_index",
)


class NoPatientsError(UserError):
    """The images show no people that can be told apart. `recovery` holds what was measured."""

    def __init__(self, message: str, recovery: "Recovery | None" = None) -> None:
        super().__init__(message)
        self.recovery = recovery


@dataclass(frozen=True)
class RawImages:
    """One entry per image file, in sorted path order.

    `images` are `uint8` (H, W) at native size; `source_split` is `train`, `test` or empty; `label` indexes `classes`.
    """

    paths: list[str]
    images: list[np.ndarray]
    file_sha256: list[str]
    source_split: list[str]
    label: np.ndarray
    classes: tuple[str, ...] = CLASSES

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Cohort:
    """The columns of `cohort.csv`, one entry per image file. Empty `patient_id` and `slice_index` are -1."""

    file_sha256: np.ndarray
    pixel_sha256: np.ndarray
    source_split: np.ndarray
    label: np.ndarray
    kind: np.ndarray
    duplicate_of: np.ndarray
    patient_id: np.ndarray
    slice_index: np.ndarray

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class Recovery:
    """What the pixels said.

    Attributes:
        threshold: correlation at and above which two images show one person.
        gap: strongest link between two people, and weakest link that joins a slice to its own; at full size.
        search_gap: the same two at `SEARCH_SIDE`.
        links: correlations, at `SEARCH_SIDE` and strongest first, of the tree that joins the candidates: so many of
            them lie above a threshold as joins happen there.
        candidates: distinct images whose background spoke for them.
        admitted: images that joined a person in spite of their background.
        conflicts: people whose images carry several labels: patient id → images per label.
        mislabelled_copies: pairs of rows with equal pixels and different labels.
    """

    threshold: float
    gap: tuple[float, float]
    search_gap: tuple[float, float]
    links: np.ndarray
    candidates: int
    admitted: int
    conflicts: dict[int, dict[int, int]] = field(default_factory=dict)
    mislabelled_copies: list[tuple[int, int]] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------- reading


def find_raw(explicit: Path | str | None = None) -> Path | None:
    """The raw data: an explicit path, `ALZHEIMER_RAW`, `dataset/raw_dataset/`, a Kaggle download; None where there is
    nothing (the caller then takes the phantom cohort and says so). `ALZHEIMER_OFFLINE=1` forbids the download.

    Raises:
        StudyError: a path that was named and does not exist.
    """
    for source, named in (
        ("the path given", explicit),
        ("ALZHEIMER_RAW", os.environ.get("ALZHEIMER_RAW")),
    ):
        if named:
            if not Path(named).exists():
                raise UserError(
                    f"There is nothing at {named} ({source}): name the folder or zip of the raw images."
                )
            return Path(named)
    local = ROOT / "dataset" / "raw_dataset"
    if local.is_dir() and any(path.suffix.lower() in IMAGE_SUFFIXES for path in local.rglob("*")):
        return local
    return None if os.environ.get("ALZHEIMER_OFFLINE") == "1" else _download()


def _download() -> Path | None:
    """The set from Kaggle, or None. Asked with a short time-out first: the client itself waits for minutes."""
    import urllib.request

    try:
        request = urllib.request.Request(
            "https://www.kaggle.com", method="HEAD", headers={"User-Agent": "Mozilla/5.0"}
        )
        urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT).close()
        import kagglehub

        return Path(kagglehub.dataset_download(KAGGLE_DATASET))
    except Exception as error:  # noqa: BLE001  whatever Kaggle's client raises means the same: no data from there
        print(f"No download from Kaggle ({type(error).__name__}).", file=sys.stderr)
        return None


def read_raw(
    path: Path | str, *, skip_unreadable: bool = False, any_classes: bool = False
) -> RawImages:
    """Reads class folders, with or without `train/` and `test/` above them, from a folder or a zip.

    RGB, 16-bit and odd-sized images are taken as `convert("L")` gives them (16-bit scaled to 8).

    Args:
        skip_unreadable: go on without the images that cannot be read, naming them on standard error.
        any_classes: take any folder names as classes, in sorted order, instead of the four.

    Raises:
        StudyError: no such path, neither folder nor zip, no image in it, a damaged archive or one with entries outside
            its folder, an unknown class folder, a class without images, an unreadable image.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is nothing at {path}: name the folder or zip of the raw images.")
    if path.is_dir():
        return _read_entries(path, _folder_entries(path), skip_unreadable, any_classes)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_entries(path, _zip_entries(archive, path), skip_unreadable, any_classes)
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path} is no complete zip archive ({error}): download it again."
        ) from error


def _folder_entries(folder: Path) -> list[tuple[str, Callable[[], bytes]]]:
    files = (
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
    )
    return [(file.relative_to(folder).as_posix(), file.read_bytes) for file in files]


def _zip_entries(archive: zipfile.ZipFile, path: Path) -> list[tuple[str, Callable[[], bytes]]]:
    entries = []
    for info in archive.infolist():
        name = info.filename.replace("\\", "/")
        if (
            name.startswith("/")
            or re.match(r"[A-Za-z]:", name)
            or ".." in name.split("/")
            or stat.S_ISLNK(info.external_attr >> 16)
        ):
            raise UserError(
                f"{path} holds an entry that points outside its folder ({info.filename}): "
                "do not trust this archive, get it from its source."
            )
        if not info.is_dir() and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
            entries.append((name, lambda info=info: archive.read(info)))
    return entries


def _read_entries(
    source: Path,
    entries: list[tuple[str, Callable[[], bytes]]],
    skip_unreadable: bool,
    any_classes: bool,
) -> RawImages:
    entries = [
        (name, read)
        for name, read in entries
        if not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    ]
    if not entries:
        raise UserError(
            f"{source} holds no image: expected class folders such as train/Non_Demented/*.jpg."
        )
    names = _without_outer_folders([name for name, _ in entries])
    order = sorted(range(len(names)), key=names.__getitem__)
    labels, classes = _labels_of(source, names, any_classes)
    paths, images, hashes, splits, label, unreadable = [], [], [], [], [], []
    for i in progress(order, "reading images"):
        try:
            data = entries[i][1]()
            image = decode(data)
        except UNREADABLE as error:
            unreadable.append((names[i], error))
            continue
        paths.append(names[i])
        images.append(image)
        hashes.append(hashlib.sha256(data).hexdigest())
        splits.append(
            next(
                (
                    SPLITS[part.lower()]
                    for part in names[i].split("/")[-3:-2]
                    if part.lower() in SPLITS
                ),
                "",
            )
        )
        label.append(labels[i])
    _report_unreadable(unreadable, skip_unreadable)
    missing = [name for k, name in enumerate(classes) if k not in set(label)]
    if missing:
        raise UserError(
            f"{source} holds no readable image of the class {' and '.join(missing)}: "
            "expected all of " + ", ".join(classes) + "; is it unpacked completely?"
        )
    return RawImages(paths, images, hashes, splits, np.array(label, np.int64), classes)


def decode(data: bytes) -> np.ndarray:
    """Image file → `uint8` (H, W). `convert("L")` would clip 16-bit grey at 255; it is scaled instead."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I;16"):
            return (np.asarray(image) >> 8).astype(np.uint8)
        if image.mode in ("I", "F"):
            pixels = np.asarray(image, np.float64)
            return np.clip(pixels / (257 if pixels.max() > 255 else 1), 0, 255).astype(np.uint8)
        return np.asarray(image.convert("L"))


def _report_unreadable(unreadable: list[tuple[str, Exception]], skip: bool) -> None:
    for name, error in unreadable:
        if not skip:
            others = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
            raise UserError(
                f"{name}{others} cannot be read as an image ({error}): replace it, or go on without it "
                "with --skip-unreadable (skip_unreadable=True)."
            )
        print(f"Left out {name}: {error}", file=sys.stderr)


def _without_outer_folders(names: Sequence[str]) -> list[str]:
    """Drops the folders that every path shares above its class and split folder, so that a wrapped archive, its
    unpacked folder and the folder inside give the same paths."""
    parents = []
    for name in names:
        folders = name.split("/")[:-1]
        keep = 2 if len(folders) >= 2 and folders[-2].lower() in SPLITS else 1
        parents.append(folders[: len(folders) - keep])
    shared = os.path.commonprefix(parents)
    return ["/".join(name.split("/")[len(shared) :]) for name in names]


def _labels_of(
    source: Path, names: Sequence[str], any_classes: bool
) -> tuple[list[int], tuple[str, ...]]:
    folders = [(name.split("/")[-2] if "/" in name else "") for name in names]
    if any_classes:
        classes = tuple(sorted(set(folders)))
        return [classes.index(folder) for folder in folders], classes
    labels = [CLASS_NAMES.get(re.sub(r"[^a-z]", "", folder.lower())) for folder in folders]
    for name, label in zip(names, labels):
        if label is None:
            where = (
                f"the unknown class folder {name.split('/')[-2]!r}"
                if "/" in name
                else "no class folder"
            )
            raise UserError(
                f"{source} holds {name} in {where}: expected Non, Very Mild, Mild and Moderate Demented "
                "(or No … Impairment), in any case, with spaces, underscores or nothing between."
            )
    return labels, CLASSES


# ---------------------------------------------------------------------------------------------------- features


@cached
def _two_blurs(side: int, target: int, narrow: float, wide: float) -> np.ndarray:
    return np.stack([_blur_and_shrink(side, target, width) for width in (narrow, wide)])


def _blur_and_shrink(side: int, target: int, width: float) -> np.ndarray:
    """Matrix (target, side): Gaussian blur of `width`/128 of the side, then area average on `target` pixels."""
    position = np.arange(side)
    sigma = width * side / 128
    distance = (position[:, None] - position) / sigma
    # Cut at 5 widths: beyond, single precision holds denormal numbers, which multiply ten times as slowly.
    blur = np.where(np.abs(distance) < 5, np.exp(-(distance**2) / 2), 0)
    edges = np.linspace(0, side, target + 1)
    overlap = np.minimum(edges[1:, None], position + 1) - np.maximum(edges[:-1, None], position)
    matrix = np.clip(overlap, 0, None) @ (blur / blur.sum(1, keepdims=True))
    return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)


def features(
    images: Sequence[np.ndarray],
    side: int = SEARCH_SIDE,
    *,
    narrow: float = NARROW,
    wide: float = WIDE,
) -> np.ndarray:
    """Difference of two Gaussian blurs on a common grid, of zero mean and unit length: `float32` (N, side²), so that
    the product of two rows is their correlation. Widths are in 1/128 of an image's side; images may differ in size."""
    result = np.empty((len(images), side * side), np.float32)
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    images = [_tame(image) for image in images]
    for i, image in enumerate(images):
        by_shape[image.shape].append(i)
    for (height, width), members in by_shape.items():
        rows_op = _two_blurs(height, side, narrow, wide)
        columns_op = _two_blurs(width, side, narrow, wide).reshape(2 * side, width)
        for start in range(0, len(members), 64):
            rows = members[start : start + 64]
            stack = np.stack([images[i] for i in rows]).astype(np.float32)
            across = (stack.reshape(-1, width) @ columns_op.T).reshape(len(rows), height, 2, side)
            sharp, soft = (
                np.ascontiguousarray(across[:, :, k].transpose(0, 2, 1)).reshape(-1, height)
                @ rows_op[k].T
                for k in (0, 1)
            )
            band = (sharp - soft).reshape(len(rows), -1)
            band -= band.mean(1, keepdims=True)
            # A blank image has no direction: its correlation with everything is 0.
            result[rows] = band / np.maximum(np.linalg.norm(band, axis=1, keepdims=True), 1e-6)
    return result


def _tame(image: np.ndarray) -> np.ndarray:
    """At most 256 pixels a side: larger ones say nothing more to features of 128, and cost much."""
    if max(image.shape) <= 256:
        return image
    size = tuple(min(256, n) for n in image.shape[::-1])
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def background(images: Sequence[np.ndarray]) -> np.ndarray:
    """Mean grey level of the four corners, each 1/16 of the side wide: exactly 0 where a scan was cut out of its
    surroundings and left so."""
    levels = np.empty(len(images))
    for i, image in enumerate(images):
        h, w = max(1, image.shape[0] // 16), max(1, image.shape[1] // 16)
        levels[i] = np.mean(
            [
                image[:h, :w].mean(),
                image[:h, -w:].mean(),
                image[-h:, :w].mean(),
                image[-h:, -w:].mean(),
            ]
        )
    return levels


def usual_background(levels: np.ndarray) -> np.ndarray:
    """Which images have the set's most usual background, or a darker one.

    Noise that was added to every image widens the peak: its width is read from the dark side, because what generators
    leave behind is brighter, and the peak reaches up to the first level that stands farther off than that.
    """
    bins = np.floor(levels * 50).astype(np.int64)
    peak = np.bincount(bins).argmax() / 50
    width = max(0.02, peak - levels.min())
    above = np.sort(levels[levels >= peak])
    apart = np.flatnonzero(np.diff(above) > width)
    return levels <= (above[apart[0]] if len(apart) else above[-1])


# ---------------------------------------------------------------------------------------------------- links


def nearest(
    vectors: np.ndarray,
    *,
    k: int = 1,
    group: np.ndarray | None = None,
    of: np.ndarray | None = None,
    description: str = "comparing images",
) -> tuple[np.ndarray, np.ndarray]:
    """The k most correlated others of every row, block by block: memory grows with the rows, not with their square.

    Args:
        vectors: `float32` (N, D), unit rows.
        group: (N,) integers; pairs of one group are left out. None leaves out only an image with itself.
        of: ask for these rows alone; the answers then stand in their order.

    Returns:
        Correlations (N, k), strongest first, -2 where there are fewer others; and indices (N, k), -1 there.
    """
    n = len(vectors)
    group = np.arange(n) if group is None else np.asarray(group)
    asked = np.arange(n) if of is None else of
    value, index = np.full((len(asked), k), -2, np.float32), np.full((len(asked), k), -1, np.int64)
    # Without `of`, a block answers for its rows and its columns: half of the pairs are enough.
    pairs = [
        (a, b)
        for a in range(0, len(asked), BLOCK)
        for b in range(0 if of is not None else a, n, BLOCK)
    ]
    for a, b in progress(pairs, description):
        rows, columns = slice(a, a + BLOCK), slice(b, b + BLOCK)
        scores = vectors[asked[rows]] @ vectors[columns].T
        np.copyto(scores, -2, where=group[asked[rows]][:, None] == group[columns])
        _keep_best(value[rows], index[rows], scores, b)
        if of is None and a != b:
            _keep_best(value[columns], index[columns], scores.T, a)
    return value, index


def _keep_best(value: np.ndarray, index: np.ndarray, scores: np.ndarray, offset: int) -> None:
    """Merges a block of scores (R, C) into the sorted best lists (R, k) in place."""
    k = value.shape[1]
    rows = np.flatnonzero(scores.max(1) > value[:, -1])  # far blocks improve few rows
    if not len(rows):
        return
    block, span = np.ascontiguousarray(scores[rows]), np.arange(len(rows))
    new_value, new_index = np.empty((len(rows), k), np.float32), np.empty((len(rows), k), np.int64)
    for j in range(k):
        best = block.argmax(1)
        new_value[:, j], new_index[:, j] = block[span, best], best + offset
        block[span, best] = -2
    new_index[new_value <= -2] = -1
    both, both_index = np.hstack([value[rows], new_value]), np.hstack([index[rows], new_index])
    order = np.argsort(-both, 1, kind="stable")[:, :k]
    value[rows], index[rows] = (
        np.take_along_axis(both, order, 1),
        np.take_along_axis(both_index, order, 1),
    )


class _Forest:
    """Disjoint sets with sizes (Tarjan 1975)."""

    def __init__(self, n: int) -> None:
        self.parent, self.size = list(range(n)), [1] * n

    def root(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def join(self, i: int, j: int) -> tuple[int, int]:
        """Sizes of the two sets before the join; (0, 0) where they were one already."""
        i, j = self.root(i), self.root(j)
        if i == j:
            return 0, 0
        if self.size[i] < self.size[j]:
            i, j = j, i
        sizes = self.size[i], self.size[j]
        self.parent[j] = i
        self.size[i] += self.size[j]
        return sizes

    def groups(self) -> np.ndarray:
        """Group of each member, numbered by first appearance."""
        roots = np.array([self.root(i) for i in range(len(self.parent))])
        _, first, inverse = np.unique(roots, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[inverse]


def groups_above(links: np.ndarray, n: int, threshold: float) -> np.ndarray:
    """Connected components (N,) under the links (i, j, correlation) at or above a threshold, by first appearance."""
    forest = _Forest(n)
    for i, j in links[links[:, 2] >= threshold, :2].astype(np.int64):
        forest.join(int(i), int(j))
    return forest.groups()


def strongest_tree(vectors: np.ndarray, *, rounds: int = 2) -> np.ndarray:
    """The tree of strongest links: (M, 3) rows of (i, j, correlation), strongest first.

    Nearest neighbours give the links inside a person; then every part's strongest link to another part is added
    (Borůvka 1926) for at most so many rounds, each one pass over all pairs. Rounds only matter far below the gap: the
    first already holds the strongest link of each person to any other.
    """
    n = len(vectors)
    value, index = nearest(vectors, k=min(NEIGHBOURS, max(1, n - 1)))
    rows = np.repeat(np.arange(n), value.shape[1])
    links = np.column_stack([rows, index.ravel(), value.ravel()])[index.ravel() >= 0]
    links = kruskal(links, n)
    for _ in range(rounds):
        part = groups_above(links, n, -2)
        if part.max(initial=0) == 0:
            break
        links = kruskal(np.vstack([links, join_parts(vectors, part)[0]]), n)
    return links


def join_parts(vectors: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every part's strongest link to another part, (P, 3) rows of (i, j, correlation); and each image's best
    correlation (N,) with another part."""
    value, index = nearest(vectors, group=part, description=f"joining {part.max() + 1} parts")
    best = _strongest_of_each(part, value[:, 0])
    return np.column_stack([best, index[best, 0], value[best, 0]]), value[:, 0]


def _strongest_of_each(part: np.ndarray, value: np.ndarray) -> np.ndarray:
    order = np.lexsort((-value, part))
    return order[np.unique(part[order], return_index=True)[1]]


def kruskal(links: np.ndarray, n: int) -> np.ndarray:
    """Those of the links (M, 3) that make the strongest forest on n nodes, strongest first (Kruskal 1956)."""
    forest = _Forest(n)
    links = links[np.argsort(-links[:, 2], kind="stable")]
    kept = [
        row
        for row, (i, j) in enumerate(links[:, :2].astype(np.int64))
        if forest.join(int(i), int(j)) != (0, 0)
    ]
    return links[kept]


def find_gap(
    links: np.ndarray, n: int, doubtful: np.ndarray | None = None
) -> tuple[float, float] | None:
    """The widest empty step, in Fisher's z, between neighbouring links of a tree that leaves people: at least two
    groups of `LEAST_SLICES`, half of the images in such groups, no group that holds nearly all or more than
    `LONGEST_STACK` (then scanners or kinds of image lie apart, not people), and links that join only what shares half of its variance.

    Args:
        links: the tree's links (M, 3), strongest first.
        doubtful: (N,) images whose background speaks against them: where one or two of them hang on to a group, nothing
            is said about people, and the link does not count.

    Returns:
        The correlations below and above the step; None where no step stands out from the others.
    """
    doubtful = np.zeros(n, bool) if doubtful is None else doubtful
    forest, trusted, tally = _Forest(n), (~doubtful).astype(int).tolist(), _Tally()
    z = np.arctanh(np.clip(links[:, 2], -0.9999, 0.9999))
    steps, edges, above = [], [], None
    for row in range(len(links)):
        i, j = (forest.root(int(end)) for end in links[row, :2])
        hangs_on = any(forest.size[end] < LEAST_SLICES and not trusted[end] for end in (i, j))
        if not hangs_on:
            if above is not None and tally.shows_patients(n) and links[above, 2] ** 2 >= 0.5:
                steps.append(z[above] - z[row])
                edges.append((float(links[row, 2]), float(links[above, 2])))
            above = row
        tally.join(*forest.join(i, j))
        trusted[forest.root(i)] = trusted[i] + trusted[j]
    if not steps:
        return None
    widest = int(np.argmax(steps))
    next_widest = max((step for i, step in enumerate(steps) if i != widest), default=0.0)
    return edges[widest] if steps[widest] >= max(GAP_LEAST, GAP_RATIO * next_widest) else None


@dataclass
class _Tally:
    """Groups of at least `LEAST_SLICES`: how many, how many images they hold, and the largest of all."""

    patients: int = 0
    covered: int = 0
    largest: int = 1

    def join(self, one: int, two: int) -> None:
        whole, parts = one + two, [size for size in (one, two) if size >= LEAST_SLICES]
        if whole >= LEAST_SLICES:
            self.patients += 1 - len(parts)
            self.covered += whole - sum(parts)
        self.largest = max(self.largest, whole)

    def shows_patients(self, n: int) -> bool:
        return (
            self.patients >= 2
            and self.covered >= n / 2
            and self.largest < min(0.9 * n, LONGEST_STACK)
        )


def middle(gap: tuple[float, float]) -> float:
    """The threshold in the middle of a gap, in Fisher's z."""
    return float(np.tanh(np.mean(np.arctanh(np.clip(gap, -0.9999, 0.9999)))))


# ---------------------------------------------------------------------------------------------------- people


@dataclass(frozen=True)
class Patients:
    """Groups of distinct images: `person` (N,) numbered by first appearance, -1 for images that join nobody; `rivals`
    (R, 2) are the pairs of images that come nearest to joining two people."""

    patient: np.ndarray
    gap: tuple[float, float]
    links: np.ndarray
    candidates: int
    admitted: int
    rivals: np.ndarray


def find_patients(vectors: np.ndarray, levels: np.ndarray) -> Patients:
    """Groups images into people, synthetic ones left out.

    A real image is one that joins a person; the background is evidence that only decides where to look first.
    Generated images resemble the people that they were learned from closely enough to fill the gap between people, so
    the gap is sought among the images with the set's usual background, and, where that shows none, among all. Then
    each image that was set aside is asked again: it is real when it joins a person, or forms one with others, and
    *keeps the gap empty*. What a generator blends does not: some of its likes stand inside the gap.

    Args:
        vectors: `float32` (N, D) unit rows of distinct images.
        levels: (N,) grey level of the background.

    Raises:
        NoPeopleError: no gap.
    """
    usual = usual_background(levels)
    links, gap = np.empty((0, 3)), None
    for chosen in [usual, np.ones_like(usual)] if not usual.all() else [usual]:
        rows = np.flatnonzero(chosen)
        tree = strongest_tree(vectors[rows])
        gap, links = find_gap(tree, len(rows), ~usual[rows]), tree if len(tree) else links
        if gap is not None:
            break
    if gap is None:
        raise NoPatientsError(
            f"No gap separates people in these {len(vectors)} images: their links thin out evenly, so nobody can be "
            "told apart from the pixels; expected several neighbouring slices of each of several people.",
            Recovery(
                float("nan"),
                (float("nan"),) * 2,
                (float("nan"),) * 2,
                links[:, 2],
                int(usual.sum()),
                0,
            ),
        )
    group = np.full(len(vectors), -1)
    group[rows], rivals = _exact_groups(vectors[rows], tree, middle(gap))
    group = _drop_small(_without_side_branches(vectors, group, ~usual))
    patient = _by_first_appearance(_admit(vectors, group, gap))
    return Patients(
        patient, gap, tree[:, 2], len(rows), int(((patient >= 0) & ~usual).sum()), rows[rivals]
    )


def _exact_groups(
    vectors: np.ndarray, tree: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Components at the threshold, with every link that the neighbour lists were too short to hold; and the pairs of
    rows (R, 2) that come nearest to a further link."""
    while True:
        group = groups_above(tree, len(vectors), threshold)
        value, index = nearest(vectors, group=group, description="checking people")
        missed = np.flatnonzero(value[:, 0] >= threshold)
        if not len(missed):
            closest = np.argsort(-value[:, 0])[:RIVALS]
            return group, np.column_stack([closest, index[closest, 0]])
        tree = np.vstack([tree, np.column_stack([missed, index[missed, 0], value[missed, 0]])])


def _drop_small(group: np.ndarray) -> np.ndarray:
    """-1 for the members of groups with fewer than `LEAST_SLICES` images."""
    sizes = np.bincount(group[group >= 0], minlength=group.max(initial=-1) + 1)
    return np.where((group >= 0) & (sizes[group] >= LEAST_SLICES), group, -1)


def _by_first_appearance(group: np.ndarray) -> np.ndarray:
    """Renumbers groups 0, 1, … in the order in which they first appear; -1 stays."""
    names, first, inverse = np.unique(group, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(np.where(names < 0, -1, first))) - int((names < 0).any())
    return rank[inverse]


def _admit(vectors: np.ndarray, group: np.ndarray, gap: tuple[float, float]) -> np.ndarray:
    """Adds the ungrouped images that join people, or form some, without putting any image into the gap.

    They must join as firmly as the weakest slice that is known to be real. The ungrouped members of a part stay out
    where there are more of them than slices in any stack, where they would join two people to one, and where they are
    among themselves and most have a look-alike elsewhere *inside* the gap. Of the others those are taken that are
    slices of the stack.
    """
    outside = np.flatnonzero(group < 0)
    if not len(outside):
        return group
    low, threshold = gap
    n = len(vectors)
    chain = np.flatnonzero(group >= 0)
    chain = chain[np.argsort(group[chain], kind="stable")]
    same = group[chain[1:]] == group[chain[:-1]]
    links = [np.column_stack([chain[:-1][same], chain[1:][same], np.ones(same.sum())])]
    while True:
        part = groups_above(np.vstack(links), n, threshold)
        size = np.bincount(part[outside], minlength=n)
        asked = outside[
            size[part[outside]] <= LONGEST_STACK
        ]  # whoever is among more is out already
        value, index = nearest(
            vectors, k=NEIGHBOURS, group=part, of=asked, description="asking the other images"
        )
        rows, places = np.nonzero(value >= threshold)
        if not len(rows):
            break
        links.append(np.column_stack([asked[rows], index[rows, places], value[rows, places]]))
    suspects = np.bincount(
        part[asked[(value[:, 0] > low) & (value[:, 0] < threshold)]], minlength=n
    )
    # A part that would make two people one is a blend of both.
    known = np.unique(np.column_stack([part, group])[group >= 0], axis=0)[:, 0]
    patients = np.bincount(known, minlength=n)
    tainted = np.flatnonzero(
        (2 * suspects > size) & (patients == 0) | (size > LONGEST_STACK) | (patients > 1)
    )
    joined = np.where(np.isin(part, tainted), np.where(group >= 0, n + group, -1), part)
    return _drop_small(_without_side_branches(vectors, joined, group < 0))


def _without_side_branches(
    vectors: np.ndarray, group: np.ndarray, doubtful: np.ndarray
) -> np.ndarray:
    """Takes the doubtful images that are no slices of their group's stack out of it (-1).

    A slice stands between its neighbours: they are less alike than each is to it. What was made after a slice hangs
    off that slice, and between it and the next makes a detour. Several made after one slice stand between each other,
    so the trusted slices before and after them are asked as well.
    """
    group = group.copy()
    for name in np.unique(group[doubtful & (group >= 0)]):
        members = np.flatnonzero(group == name)
        while len(members) >= LEAST_SLICES:
            stack = members[order_stack(vectors[members] @ vectors[members].T)]
            before, middle_, after = vectors[stack[:-2]], vectors[stack[1:-1]], vectors[stack[2:]]
            # The length of the detour, in 1 - correlation. Beyond the last trusted slice nothing tells the next one from
            # a blend, so there a doubtful image stays out; in a stack of doubtful ones the neighbour judges the end.
            detour = 1 + ((before * after) - (before * middle_) - (middle_ * after)).sum(1)
            ends = detour if doubtful[members].all() else np.ones(2)
            detour = np.concatenate([ends[:1], detour, ends[-1:]])
            detour = np.where(
                doubtful[stack], np.maximum(detour, _beside(vectors[stack], ~doubtful[stack])), -1
            )
            if detour.max() <= 0:
                break
            worst = stack[detour.argmax()]
            group[worst] = -1
            members = members[members != worst]
    return group


def _beside(vectors: np.ndarray, trusted: np.ndarray) -> np.ndarray:
    """By how much more alike the trusted rows before and after each row of a stack are than the less like of them is to
    it, (N,): above 0 it does not stand between them. -1 where there are not both."""
    places = np.arange(len(vectors))
    before = np.maximum.accumulate(np.where(trusted, places, -1))
    after = np.minimum.accumulate(np.where(trusted, places, len(vectors))[::-1])[::-1]
    between = ~trusted & (before >= 0) & (after < len(vectors))
    result = np.full(len(vectors), -1.0)
    first, row, last = vectors[before[between]], vectors[between], vectors[after[between]]
    result[between] = (first * last).sum(1) - np.minimum((first * row).sum(1), (row * last).sum(1))
    return result


def measure_gap(
    images: Sequence[np.ndarray], patients: Patients, matrices: Sequence[np.ndarray]
) -> tuple[float, float]:
    """The gap at full size: strongest link among the rivals, weakest link that joins a slice to its own person.

    Args:
        matrices: each person's full-size correlations.

    Raises:
        NoPeopleError: what was empty at `SEARCH_SIDE` is not at full size.
    """
    weakest = float(min(tree_of(matrix).min() for matrix in matrices))
    pairs, strongest = patients.rivals[patients.rivals[:, 1] >= 0], -1.0
    for start in range(0, len(pairs), 256):
        chunk = pairs[start : start + 256]
        rows, place = np.unique(chunk, return_inverse=True)
        vectors = features([images[i] for i in rows], full_side(images))
        first, second = (
            vectors[place.reshape(chunk.shape)[:, 0]],
            vectors[place.reshape(chunk.shape)[:, 1]],
        )
        strongest = max(strongest, float((first * second).sum(1).max()))
    if strongest >= weakest:
        raise NoPatientsError(
            f"No gap separates people at full size: two groups reach a correlation of {strongest:.3f}, a slice "
            f"joins its own at {weakest:.3f}; expected several neighbouring slices of each person."
        )
    return strongest, weakest


def full_side(images: Sequence[np.ndarray]) -> int:
    """Side in pixels of the full-size features: the images' own, at most `FULL_SIDE`."""
    return int(min(FULL_SIDE, np.median([min(image.shape) for image in images[:1000]])))


def correlations(images: Sequence[np.ndarray], members: np.ndarray) -> np.ndarray:
    """Full-size correlations (M, M) of some images."""
    vectors = features([images[i] for i in members], full_side(images))
    return vectors @ vectors.T


def members_of(patient: np.ndarray) -> list[np.ndarray]:
    """Indices of each person's images, by person id."""
    order = np.argsort(patient, kind="stable")
    order = order[patient[order] >= 0]
    return np.split(order, np.flatnonzero(np.diff(patient[order])) + 1) if len(order) else []


def tree_of(matrix: np.ndarray) -> np.ndarray:
    """The links (M - 1,) of the strongest tree through all rows of a correlation matrix (Prim 1957)."""
    best, joined, links = matrix[0].copy(), np.zeros(len(matrix), bool), np.empty(len(matrix) - 1)
    joined[0] = True
    for step in range(len(links)):
        following = int(np.argmax(np.where(joined, -2, best)))
        links[step] = best[following]
        joined[following] = True
        best = np.maximum(best, matrix[following])
    return links


# ---------------------------------------------------------------------------------------------------- slice order


def order_stack(matrix: np.ndarray) -> np.ndarray:
    """Indices of a person's slices along the body axis, from either end, from their correlations (M, M).

    Spectral seriation (Atkins, Boman & Hendrickson 1998): the second eigenvector of the Laplacian of a similarity that
    fades with distance along a line runs monotonically along it. Raising the similarity to a power keeps it local.
    """
    if len(matrix) < 3:
        return np.arange(len(matrix))
    similarity = np.clip(matrix, 0, 1) ** 8
    degree = similarity.sum(1)
    laplacian = np.eye(len(matrix)) - similarity / np.sqrt(np.outer(degree, degree))
    _, vectors = np.linalg.eigh(laplacian)
    order = np.argsort(vectors[:, 1] / np.sqrt(degree), kind="stable")
    return _shorten(order, matrix) if len(order) <= LONGEST_STACK else order


def _shorten(order: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Reverses runs of slices while that makes neighbours more alike (2-opt, Croes 1958)."""
    distance, improved = 1 - matrix, True
    while improved:
        improved = False
        for a in range(len(order) - 1):
            for b in range(a + 1, len(order)):
                before = (distance[order[a - 1], order[a]] if a else 0) + (
                    distance[order[b], order[b + 1]] if b + 1 < len(order) else 0
                )
                after = (distance[order[a - 1], order[b]] if a else 0) + (
                    distance[order[a], order[b + 1]] if b + 1 < len(order) else 0
                )
                if after < before - 1e-9 and (a or b + 1 < len(order)):
                    order = np.concatenate([order[:a], order[a : b + 1][::-1], order[b + 1 :]])
                    improved = True
    return order


def head_area(images: Sequence[np.ndarray]) -> np.ndarray:
    """Share of each image that is brighter than a tenth of its brightest pixel: the cross-section of the head."""
    return np.array([(image > 0.1 * image.max()).mean() for image in images])


def align_ends(
    stacks: Sequence[np.ndarray], areas: Sequence[np.ndarray], bins: int = 16
) -> list[bool]:
    """Which stacks to turn round so that all run the same way, from the smaller cross-section of the head down.

    The cross-section alone mistakes people whose slices change little. So it makes the first guess, from which a
    consensus stack is drawn, and each slice then votes for the place in the consensus that it most resembles.

    Args:
        stacks: each person's `float32` (M, D) unit features, in order.
        areas: each person's (M,) head areas, in the same order.
    """
    turned = [len(area) > 1 and np.polyfit(np.arange(len(area)), area, 1)[0] < 0 for area in areas]
    for _ in range(10):
        total, trend = np.zeros((bins, stacks[0].shape[1])), 0.0
        for stack, area, turn in zip(stacks, areas, turned):
            place = np.arange(len(stack)) * bins // len(stack)
            np.add.at(total, place, stack[::-1] if turn else stack)
        total /= np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-9)
        votes = [(stack @ total.T).argmax(1) for stack in stacks]
        now = [
            bool(np.cov(np.arange(len(vote)), vote)[0, 1] < 0) if vote.std() else turn
            for vote, turn in zip(votes, turned)
        ]
        if now == turned:
            break
        turned = now
    for stack, area, turn in zip(stacks, areas, turned):
        trend += (
            np.polyfit(np.linspace(0, 1, len(area)), area[::-1] if turn else area, 1)[0]
            if len(area) > 1
            else 0.0
        )
    return [not turn for turn in turned] if trend < 0 else turned


def slice_indices(
    images: Sequence[np.ndarray], patient: np.ndarray, matrices: Sequence[np.ndarray]
) -> np.ndarray:
    """Position (N,) of each image in its person's stack, 0 the most superior; -1 for images of nobody. `matrices` are
    each person's correlations."""
    index = np.full(len(patient), -1)
    orders = [
        members[order_stack(matrix)] for members, matrix in zip(members_of(patient), matrices)
    ]
    stacks = [
        features([images[i] for i in order], SEARCH_SIDE, narrow=4.0, wide=24.0) for order in orders
    ]
    areas = [head_area([images[i] for i in order]) for order in orders]
    for order, turn in zip(orders, align_ends(stacks, areas)):
        index[order[::-1] if turn else order] = np.arange(len(order))
    return index


# ---------------------------------------------------------------------------------------------------- the cohort


def build_cohort(raw: RawImages) -> tuple[Cohort, Recovery]:
    """Recovers people, slices, synthetic images and duplicates from the pixels.

    A person whose images carry several labels stays one person, because a split must keep it together, and is listed in
    `Recovery.conflicts`.

    Raises:
        NoPeopleError: no gap between people.
    """
    pixel = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in raw.images])
    kept, copy_of = first_of_each(pixel)
    images = [raw.images[i] for i in kept]
    patients = find_patients(features(images), background(images))
    matrices = [
        correlations(images, members)
        for members in progress(members_of(patients.patient), "measuring people")
    ]
    gap = measure_gap(images, patients, matrices)
    patient, position = np.full(len(raw), -1), np.full(len(raw), -1)
    patient[kept], position[kept] = (
        patients.patient,
        slice_indices(images, patients.patient, matrices),
    )
    cohort = _assemble(raw, np.array(raw.file_sha256), pixel, patient[copy_of], position[copy_of])
    conflicts = {
        int(who): dict(sorted(Counter(raw.label[members].tolist()).items()))
        for who, members in enumerate(members_of(cohort.patient_id))
        if len(set(raw.label[members])) > 1
    }
    mislabelled = [
        (int(first), row) for row, first in enumerate(copy_of) if raw.label[row] != raw.label[first]
    ]
    return cohort, Recovery(
        middle(gap),
        gap,
        patients.gap,
        patients.links,
        patients.candidates,
        patients.admitted,
        conflicts,
        mislabelled,
    )


def first_of_each(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (K,) in which a key first appears, ascending, and for each row (N,) the row of its key's first."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return np.sort(first), first[inverse]


def _assemble(
    raw: RawImages,
    file_sha256: np.ndarray,
    pixel: np.ndarray,
    patient: np.ndarray,
    position: np.ndarray,
) -> Cohort:
    _, first = first_of_each(pixel)
    copy = first != np.arange(len(pixel))
    kind = np.where(copy, "duplicate", np.where(patient >= 0, "real", "synthetic"))
    return Cohort(
        file_sha256,
        pixel,
        np.array(raw.source_split),
        np.asarray(raw.label, np.int64),
        kind,
        np.where(copy, pixel[first], ""),
        patient.astype(np.int64),
        position.astype(np.int64),
    )


def write_cohort(cohort: Cohort, path: Path | str) -> None:
    """Writes `cohort.csv` atomically; equal cohorts give equal bytes."""
    blank = lambda values: ["" if value < 0 else value for value in values.tolist()]  # noqa: E731
    columns = [getattr(cohort, name) for name in COLUMNS[:6]] + [
        blank(cohort.patient_id),
        blank(cohort.slice_index),
    ]
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        rows.writerows(zip(*columns))


def read_cohort(path: Path | str) -> Cohort:
    """Reads what `write_cohort` wrote.

    Raises:
        StudyError: no such file, or other columns.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"There is no cohort at {path}: build it with `python -m utils.cohort RAW --out {path}`."
        )
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if not rows or tuple(rows[0]) != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
        raise UserError(
            f"{path} has not the columns {', '.join(COLUMNS)}: build it again with `python -m utils.cohort`."
        )
    columns = list(zip(*rows[1:])) or [()] * len(COLUMNS)
    number = lambda values: np.array([int(value) if value else -1 for value in values], np.int64)  # noqa: E731
    return Cohort(
        *(np.array(values, str) for values in columns[:3]),
        number(columns[3]),
        *(np.array(values, str) for values in columns[4:6]),
        number(columns[6]),
        number(columns[7]),
    )


def apply_cohort(raw: RawImages, known: Cohort) -> Cohort | None:
    """The known people and slices on these files, by their hashes, in this order; None where the files are others.

    Renamed folders change neither pixels nor people, but order, split and label are the raw data's own.
    """
    if sorted(raw.file_sha256) != sorted(known.file_sha256.tolist()):
        return None
    row = {name: i for i, name in enumerate(known.file_sha256.tolist())}
    rows = np.array([row[name] for name in raw.file_sha256])
    return _assemble(
        raw,
        known.file_sha256[rows],
        known.pixel_sha256[rows],
        known.patient_id[rows],
        known.slice_index[rows],
    )


def cohort_for(
    raw: RawImages,
    committed: Path | str = COMMITTED_COHORT,
    cache: Path | str | None = None,
) -> Cohort:
    """The cohort of these images: from the committed table where it lists exactly these files, from `cache` likewise,
    else built from the pixels (and kept in `cache`)."""
    for path in (committed, cache):
        if (
            path is not None
            and Path(path).is_file()
            and (cohort := apply_cohort(raw, read_cohort(path))) is not None
        ):
            return cohort
    cohort, _ = build_cohort(raw)
    if cache is not None:
        write_cohort(cohort, cache)
    return cohort


def describe(cohort: Cohort, recovery: Recovery) -> str:
    """A summary of a few lines: counts, people by class, threshold, gap, conflicts."""
    kinds = Counter(cohort.kind.tolist())
    groups = members_of(cohort.patient_id * (cohort.kind == "real") - (cohort.kind != "real"))
    sizes = Counter(len(members) for members in groups)
    by_class = Counter(int(cohort.label[members[0]]) for members in groups)
    lines = [
        f"{len(cohort)} files: {kinds['real']} real, {kinds['synthetic']} synthetic, {kinds['duplicate']} duplicates",
        f"{len(groups)} people ("
        + ", ".join(f"{name} {by_class[k]}" for k, name in enumerate(CLASSES))
        + ") of "
        + ", ".join(f"{size} slices × {count}" for size, count in sorted(sizes.items())),
        f"threshold {recovery.threshold:.3f} in the middle of a gap: two people reach {recovery.gap[0]:.3f}, a slice "
        f"joins its own at {recovery.gap[1]:.3f}",
    ]
    if recovery.admitted:
        lines.append(
            f"{recovery.admitted} images joined a person in spite of an unusual background"
        )
    lines.append(f"people in more than one class: {len(recovery.conflicts)}")
    for who, counts in recovery.conflicts.items():
        lines.append(
            f"  person {who}: " + ", ".join(f"{count} {CLASSES[k]}" for k, count in counts.items())
        )
    if recovery.mislabelled_copies:
        lines.append(
            f"copies filed under another class than their original: {len(recovery.mislabelled_copies)}"
        )
    return "\n".join(lines)


def main(raw: Path, /, out: Path, skip_unreadable: bool = False) -> None:
    """Recovers who each image shows from the pixels and writes one row per image file.

    Args:
        raw: folder or zip of class folders.
        out: the table to write.
        skip_unreadable: go on without images that cannot be read.
    """
    cohort, recovery = build_cohort(read_raw(raw, skip_unreadable=skip_unreadable))
    write_cohort(cohort, out)
    print(describe(cohort, recovery))
    print(f"written to {out}")


if __name__ == "__main__":
    import tyro

    try:
        tyro.cli(main)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
