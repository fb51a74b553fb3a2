"""Images linked by correlation, and the gap that separates patients.

Links are rows (i, j, correlation) of an array (M, 3). A threshold on the correlation cuts them into
groups of images. In a set that shows several slices of each of several patients there is a range of
thresholds, the gap, in which no link lies: links above it join slices of one patient, links below
it join two patients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import DisjointSet
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from utils.cohort.order import LONGEST_STACK
from utils.cohort.similarity import nearest

#: Two similar images may be two copies; a patient has at least three.
LEAST_SLICES = 3

#: Nearest neighbors of each image from which links are made.
NEIGHBORS = 4

#: Pairs of similar images of different patients that are measured again at full size.
RIVALS = 500

#: A gap counts when it is this many times as wide as the next widest step between neighboring
#: links, and …
GAP_RATIO = 1.5

#: … at least so wide in Fisher's z, in which the error of a correlation is the same at every
#: height.
GAP_LEAST = 0.1


# -- links and groups ------------------------------------------------------------------------------


def strongest_forest(links: np.ndarray, n: int) -> np.ndarray:
    """Those of the links (M, 3) that form the strongest forest on n images, strongest first.

    Of links with equal correlation the earlier one is taken first (Kruskal 1956).
    """
    links = links[np.argsort(-links[:, 2], kind="stable")]
    groups = DisjointSet(range(n))
    return links[[groups.merge(i, j) for i, j in _ends(links).tolist()]]


def strongest_tree(vectors: np.ndarray, *, rounds: int = 2) -> np.ndarray:
    """The tree of strongest links between all images, (M, 3), strongest first.

    Nearest neighbors give the links inside a patient. Then the strongest link of each part to
    another part is added (Borůvka 1926).

    Args:
        vectors: `float32` (N, D), unit rows.
        rounds: how often parts are joined, at most; each round is a pass over all pairs. One round
            already holds the strongest link of each patient to any other, further ones matter only
            far below the gap.
    """
    n = len(vectors)
    value, index = nearest(vectors, k=min(NEIGHBORS, max(1, n - 1)))
    rows = np.repeat(np.arange(n), value.shape[1])
    links = np.column_stack([rows, index.ravel(), value.ravel()])[index.ravel() >= 0]
    links = strongest_forest(links, n)
    for _ in range(rounds):
        part = groups_of(links, n)
        if part.max(initial=0) == 0:
            break
        links = strongest_forest(np.vstack([links, join_parts(vectors, part)[0]]), n)
    return links


def tree_within(matrix: np.ndarray) -> np.ndarray:
    """Correlations (M - 1,), strongest first, of the strongest tree that joins M images.

    Args:
        matrix: (M, M) correlations of all pairs.
    """
    first, second = np.triu_indices(len(matrix), 1)
    links = np.column_stack([first, second, matrix[first, second]])
    return strongest_forest(links, len(matrix))[:, 2]


def join_parts(vectors: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How parts of a set are linked.

    Args:
        vectors: `float32` (N, D), unit rows; `part` (N,) the part that each belongs to.

    Returns:
        The strongest link (P, 3) of each part to another part, by part; and the best correlation
        (N,) of each image with an image of another part.
    """
    value, index = nearest(vectors, group=part, description=f"joining {part.max() + 1} parts")
    order = np.lexsort((-value[:, 0], part))
    best = order[np.unique(part[order], return_index=True)[1]]
    return np.column_stack([best, index[best, 0], value[best, 0]]), value[:, 0]


def groups_of(links: np.ndarray, n: int) -> np.ndarray:
    """The group (N,) of each image: images that links connect, numbered by first appearance."""
    first, second = _ends(links).T
    graph = csr_array((np.ones(len(links)), (first, second)), shape=(n, n))
    return connected_components(graph, directed=False)[1]


def groups_above(links: np.ndarray, n: int, threshold: float) -> np.ndarray:
    """`groups_of` the links whose correlation is at or above a threshold."""
    return groups_of(links[links[:, 2] >= threshold], n)


def exact_groups(
    vectors: np.ndarray, links: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Groups of images by *all* links at or above a threshold.

    Lists of nearest neighbors may be too short to hold a link between two groups. Missing links are
    therefore searched for among all pairs of different groups and added, until there are none.

    Args:
        vectors: `float32` (N, D), unit rows.
        links: (M, 3) those that are known.

    Returns:
        The group (N,) of each image; and at most `RIVALS` pairs of images (R, 2) of different
        groups, those that come nearest to a further link (-1 where an image has no such partner).
    """
    while True:
        group = groups_above(links, len(vectors), threshold)
        value, index = nearest(vectors, group=group, description="checking patients")
        missed = np.flatnonzero(value[:, 0] >= threshold)
        if not len(missed):
            closest = np.argsort(-value[:, 0])[:RIVALS]
            return group, np.column_stack([closest, index[closest, 0]])
        links = np.vstack([links, np.column_stack([missed, index[missed, 0], value[missed, 0]])])


def _ends(links: np.ndarray) -> np.ndarray:
    return links[:, :2].astype(np.int64)


# -- the gap ---------------------------------------------------------------------------------------


def find_gap(
    tree: np.ndarray, n: int, doubtful: np.ndarray | None = None
) -> tuple[float, float] | None:
    """The widest empty step, in Fisher's z, between neighboring links of a tree of images.

    A step counts only where cutting the tree there leaves patients: at least two groups of
    `LEAST_SLICES`, half of the images in such groups, and none that holds nearly all of them or
    more than `LONGEST_STACK` (then the step lies between scanners or kinds of images). The links
    above it must join images that share at least half of their variance.

    Args:
        tree: (M, 3) links without a cycle, strongest first.
        doubtful: bool (N,), images whose background suggests that they are synthetic. A link that
            joins one or two of them to a group says nothing about patients and is passed over.

    Returns:
        The correlations below and above the step; None where no step is clearly wider than others.
    """
    z = fisher_z(tree[:, 2])
    groups, sizes = DisjointSet(range(n)), _GroupSizes()
    # At the root of each group: how many of its images are not doubtful.
    trusted = np.ones(n, int) if doubtful is None else (~doubtful).astype(int)
    steps: list[float] = []
    edges: list[tuple[float, float]] = []
    above = None  # the last link that was not passed over
    for row, pair in enumerate(_ends(tree).tolist()):
        roots = [groups[image] for image in pair]
        counts = [groups.subset_size(root) for root in roots]
        passed_over = any(
            count < LEAST_SLICES and not trusted[root]
            for root, count in zip(roots, counts, strict=True)
        )
        if not passed_over:
            if above is not None and sizes.are_patients(n) and tree[above, 2] ** 2 >= 0.5:
                steps.append(z[above] - z[row])
                edges.append((float(tree[row, 2]), float(tree[above, 2])))
            above = row
        sizes.merge(*counts)
        groups.merge(*roots)
        trusted[groups[roots[0]]] = trusted[roots].sum()
    if not steps:
        return None
    widest = int(np.argmax(steps))
    next_widest = max((step for i, step in enumerate(steps) if i != widest), default=0.0)
    return edges[widest] if steps[widest] >= max(GAP_LEAST, GAP_RATIO * next_widest) else None


@dataclass
class _GroupSizes:
    """Counts that are kept while groups merge: groups of `LEAST_SLICES` images or more, the images
    in them, and the size of the largest group of all."""

    patients: int = 0
    covered: int = 0
    largest: int = 1

    def merge(self, first: int, second: int) -> None:
        """Two groups of so many images become one."""
        whole = first + second
        known = [size for size in (first, second) if size >= LEAST_SLICES]
        if whole >= LEAST_SLICES:
            self.patients += 1 - len(known)
            self.covered += whole - sum(known)
        self.largest = max(self.largest, whole)

    def are_patients(self, n: int) -> bool:
        """Whether groups of these sizes, of n images in all, can be patients."""
        return (
            self.patients >= 2
            and self.covered >= n / 2
            and self.largest < min(0.9 * n, LONGEST_STACK)
        )


def fisher_z(correlation: np.ndarray, limit: float = 0.9999) -> np.ndarray:
    """Fisher's z, in which the error of a correlation is the same at every height.

    Correlations beyond ±`limit` count as that.
    """
    return np.arctanh(np.clip(correlation, -limit, limit))


def middle(gap: tuple[float, float]) -> float:
    """The correlation in the middle of a gap, in Fisher's z: the threshold of a patient."""
    return float(np.tanh(np.mean(fisher_z(np.array(gap)))))
