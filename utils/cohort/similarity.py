"""How alike two images are: band-passed features, correlations, nearest neighbors."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

from utils.images import chosen
from utils.utils_funcs import progress

#: Widths of the two Gaussian blurs, in 1/128 of the image's side: what lies between them is folds,
#: neither noise nor the brightness of the scan.
NARROW, WIDE = 1.0, 6.0

#: Side in pixels at which pairs are searched; links that matter are measured again at full size.
SEARCH_SIDE = 32

#: Side in pixels of the full-size features, at most.
FULL_SIDE = 128

#: Pixels a side of the images that features are computed from, at most: larger images say nothing
#: more to features of `FULL_SIDE`, and are expensive.
LARGEST_SIDE = 256

#: Rows and columns of the blocks in which all pairs are compared.
BLOCK = 2048


# -- features --------------------------------------------------------------------------------------


def features(
    images: Sequence[np.ndarray],
    side: int = SEARCH_SIDE,
    *,
    narrow: float = NARROW,
    wide: float = WIDE,
) -> np.ndarray:
    """Images as unit vectors, so that the product of two is the correlation of two images.

    Each image is reduced to the difference of two Gaussian blurs on a common grid, of zero mean.

    Args:
        images: `uint8` (H, W), which may differ in size.
        narrow, wide: widths of the blurs, in 1/128 of an image's side.

    Returns:
        `float32` (N, side²); zeros for a blank image.
    """
    result = np.empty((len(images), side * side), np.float32)
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = defaultdict(list)

    def compute(batch: list[tuple[int, np.ndarray]]) -> None:
        rows, stack = zip(*batch, strict=True)
        result[list(rows)] = _features_of_stack(np.stack(stack), side, narrow, wide)

    for row, image in enumerate(images):
        small = _at_most(image, LARGEST_SIDE)
        batch = waiting[small.shape]
        batch.append((row, small))
        if len(batch) == 64:
            compute(waiting.pop(small.shape))
    for batch in waiting.values():
        compute(batch)
    return result


def _features_of_stack(stack: np.ndarray, side: int, narrow: float, wide: float) -> np.ndarray:
    """`features` of images of one size (N, H, W)."""
    count, height, width = stack.shape
    vertical = _two_blurs(height, side, narrow, wide)
    horizontal = _two_blurs(width, side, narrow, wide).reshape(2 * side, width)
    across = stack.astype(np.float32).reshape(-1, width) @ horizontal.T
    across = across.reshape(count, height, 2, side)
    sharp, soft = (
        np.ascontiguousarray(across[:, :, k].transpose(0, 2, 1)).reshape(-1, height) @ vertical[k].T
        for k in (0, 1)
    )
    band = (sharp - soft).reshape(count, -1)
    band -= band.mean(1, keepdims=True)
    # A blank image has no direction: its correlation with everything is 0.
    return band / np.maximum(np.linalg.norm(band, axis=1, keepdims=True), 1e-6)


def _at_most(image: np.ndarray, side: int) -> np.ndarray:
    """The image (H, W), shrunk to at most `side` pixels in either direction."""
    if max(image.shape) <= side:
        return image
    size = tuple(min(side, length) for length in image.shape[::-1])
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


@functools.cache
def _two_blurs(side: int, target: int, narrow: float, wide: float) -> np.ndarray:
    return np.stack([_blur_and_shrink(side, target, width) for width in (narrow, wide)])


def _blur_and_shrink(side: int, target: int, width: float) -> np.ndarray:
    """Matrix (target, side): Gaussian blur of `width`/128 of the side, then area average on
    `target` pixels."""
    position = np.arange(side)
    sigma = width * side / 128
    distance = (position[:, None] - position) / sigma
    # Cut at 5 widths: beyond, single precision holds denormal numbers, which multiply ten times as
    # slowly.
    blur = np.where(np.abs(distance) < 5, np.exp(-(distance**2) / 2), 0)
    edges = np.linspace(0, side, target + 1)
    overlap = np.minimum(edges[1:, None], position + 1) - np.maximum(edges[:-1, None], position)
    matrix = np.clip(overlap, 0, None) @ (blur / blur.sum(1, keepdims=True))
    return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)


def full_side(images: Sequence[np.ndarray]) -> int:
    """Side in pixels of the full-size features: the images' own, at most `FULL_SIDE`."""
    return int(min(FULL_SIDE, np.median([min(image.shape) for image in images[:1000]])))


def correlations(images: Sequence[np.ndarray], members: np.ndarray) -> np.ndarray:
    """Full-size correlations (M, M) of some of the images, by their indices (M,)."""
    vectors = features(chosen(images, members), full_side(images))
    return vectors @ vectors.T


# -- background ------------------------------------------------------------------------------------


def background(images: Sequence[np.ndarray]) -> np.ndarray:
    """Mean gray level (N,) of the four corners, each 1/16 of the side wide: exactly 0 where a head
    was cut out of its surroundings and left so."""
    levels = np.empty(len(images))
    for i, image in enumerate(images):
        h, w = max(1, image.shape[0] // 16), max(1, image.shape[1] // 16)
        corners = (image[:h, :w], image[:h, -w:], image[-h:, :w], image[-h:, -w:])
        levels[i] = np.mean([corner.mean() for corner in corners])
    return levels


def usual_background(levels: np.ndarray) -> np.ndarray:
    """Which images, bool (N,), have the most frequent background level of the set or a darker one.

    Noise that was added to every image widens the peak of the levels. Its width is read from the
    dark side, because what generators leave is brighter; the peak reaches up to the first empty
    interval that is wider.
    """
    bins = np.floor(levels * 50).astype(np.int64)
    peak = np.bincount(bins).argmax() / 50
    width = max(0.02, peak - levels.min())
    above = np.sort(levels[levels >= peak])
    empty = np.flatnonzero(np.diff(above) > width)
    return levels <= (above[empty[0]] if len(empty) else above[-1])


# -- nearest neighbors -----------------------------------------------------------------------------


def nearest(
    vectors: np.ndarray,
    *,
    k: int = 1,
    group: np.ndarray | None = None,
    of: np.ndarray | None = None,
    description: str = "comparing images",
) -> tuple[np.ndarray, np.ndarray]:
    """The k most correlated others of every row.

    Pairs are compared block by block: memory grows with the number of rows, not with its square.

    Args:
        vectors: `float32` (N, D), unit rows.
        group: (N,) integers; pairs of one group are left out. None leaves out only an image with
            itself.
        of: (M,) rows to answer for, in this order; None answers for all.

    Returns:
        Correlations (M, k), strongest first, -2 where there are fewer others; and indices (M, k),
        -1 there.
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
    """Merges a block of scores (R, C) into the sorted best lists (R, k), in place.

    Args:
        offset: index of the block's first column.
    """
    k = value.shape[1]
    rows = np.flatnonzero(scores.max(1) > value[:, -1])  # most blocks improve few rows
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
    value[rows] = np.take_along_axis(both, order, 1)
    index[rows] = np.take_along_axis(both_index, order, 1)
