"""Does an attack on the diagnosis break the leak first? Whether a model's features still tell *who* it is, and in which
spatial frequencies the perturbations lie.

Under the published split a model may answer by recognising people. If that rests on fine texture and the disease on
coarse anatomy, an attack should take the person away before the diagnosis; both are measured here on the same images.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from utils.config import RunConfig, parse_eps
from utils.data import ImageSet, pixels
from utils.robustness import attack_images, headline_of, predict_logits, stratified_sample

#: Slices nearer than this along the body are no evidence of recognition: they are nearly the same image.
GAP = 4
#: Edges of the radial frequency bands, in cycles per image width; the last one holds the corners too.
BANDS = (0, 2, 4, 8, 16, 32, 64, np.inf)


def penultimate(model: nn.Module, images: Tensor, batch: int = 64) -> np.ndarray:
    """Features (N, D) of float images on the CPU, each of unit length."""
    device = next(model.parameters()).device
    with torch.no_grad():
        found = torch.cat([model.features(part.to(device)).float().cpu() for part in images.split(batch)])
    return nn.functional.normalize(found, dim=1).numpy()


def recognised(queries: np.ndarray, gallery: np.ndarray, centre: np.ndarray, query_people: np.ndarray, query_slices: np.ndarray,
               gallery_people: np.ndarray, gallery_slices: np.ndarray, gap: int = GAP) -> np.ndarray:
    """Whether the nearest gallery slice of each query, by cosine of centred features, is of the same person, bool (N,).

    A gallery slice of the query's own person that lies nearer than `gap` slices does not count.

    Args:
        queries, gallery: features (N, D) and (M, D); centre: (D,), subtracted from both.
    """
    def unit(values: np.ndarray) -> np.ndarray:
        values = values - centre
        return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)

    likeness = unit(queries) @ unit(gallery).T
    own = query_people[:, None] == gallery_people[None]
    near = own & (np.abs(query_slices[:, None] - gallery_slices[None]) < gap)
    return gallery_people[np.where(near, -np.inf, likeness).argmax(1)] == query_people


def band_shares(perturbations: np.ndarray) -> np.ndarray:
    """Share of each perturbation's energy in each band of `BANDS`, (N, 7), from (N, H, W); 0 for one that is zero."""
    height, width = perturbations.shape[1:]
    power = np.abs(np.fft.fft2(perturbations)) ** 2
    radius = np.hypot(height * np.fft.fftfreq(height)[:, None], width * np.fft.fftfreq(width)[None])
    band = np.digitize(radius, BANDS[1:])
    sums = np.stack([power[:, band == number].sum(1) for number in range(len(BANDS) - 1)], axis=1)
    return sums / np.maximum(sums.sum(1, keepdims=True), 1e-30)


def probe(model: nn.Module, test: ImageSet, gallery: ImageSet, config: RunConfig) -> dict:
    """Recognition (also where neighbouring slices count) and diagnosis on the fixed stratified sample of `test`, clean,
    under PGD on the diagnosis, and under noise of the same size, at every eps, as JSON.

    PGD goes on after success to the end of its steps, so that every image is attacked with the same budget.

    Args:
        gallery: clean images that the queries are compared with; images of nobody known are left out. Give `test` itself
            under `patient`, and the training set under `slice`, where the same people are in both.

    Returns:
        {"rows", "gap", "recognised" and "neighbour": name → flags with a gap of `GAP` and of one slice, "right": name → flags,
        "bands": edges, "shares": (rows, bands), "noise_shares": bands}; names are `clean`, an eps, and `noise` + an eps.
    """
    rows = stratified_sample(test.labels.numpy(), test.people.numpy(), config.sample)
    sample, known = test.pick(rows), gallery.pick(np.flatnonzero(gallery.people.numpy() >= 0))
    clean, labels = pixels(sample.images), sample.labels
    own_gallery = penultimate(model, pixels(known.images))
    apart, near, right = {}, {}, {}

    def look(name: str, images: Tensor) -> None:
        features = penultimate(model, images)
        for flags, gap in ((apart, GAP), (near, 1)):
            flags[name] = recognised(features, own_gallery, own_gallery.mean(0), sample.people.numpy(), sample.slices.numpy(),
                                     known.people.numpy(), known.slices.numpy(), gap).astype(int).tolist()
        right[name] = (predict_logits(model, images).argmax(1) == labels).int().tolist()

    look("clean", clean)
    shares = noise_shares = np.zeros((len(rows), len(BANDS) - 1))
    for eps in config.eps:
        given, options = (model, clean, labels.numpy()), dict(batch=config.attack_batch, seed=config.seed)
        made = attack_images(*given, "pgd", parse_eps(eps), steps=config.pgd_steps, loss="margin", push=True, **options)
        noise = attack_images(*given, "noise", parse_eps(eps), **options)
        look(eps, made)
        look(f"noise {eps}", noise)
        if eps == headline_of(config):
            shares, noise_shares = band_shares((made - clean)[:, 0].numpy()), band_shares((noise - clean)[:, 0].numpy())
    return {"rows": rows.tolist(), "gap": GAP, "recognised": apart, "neighbour": near, "right": right,
            "bands": [float(edge) for edge in BANDS[:-1]],
            "shares": shares.round(4).tolist(), "noise_shares": noise_shares.mean(0).round(4).tolist()}
