"""All measures of the maps of one model, as its record keeps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from utils.explain.anatomy import anatomy_masks, anatomy_shares
from utils.explain.cells import grid_side
from utils.explain.faithfulness import CONTROL, faithfulness
from utils.explain.maps import explain
from utils.explain.randomization import SANITY_LIMIT, randomization_check
from utils.explain.similarity import map_similarity
from utils.explain.stability import explanation_attack
from utils.metrics.clustered import score_robust, share_by_class
from utils.prediction import predict


def explanation_measures(
    model: nn.Module,
    images: Tensor,
    *,
    methods: Sequence[str] = ("gradcam", "layercam"),
    adversarial: Mapping[str, Tensor] | None = None,
    sample: Sequence[int] | None = None,
    attack_eps: float = 4 / 255,
    batch_size: int = 64,
    seed: int = 0,
    fresh: Callable[[], nn.Module] | None = None,
    curve_steps: int = 16,
    map_steps: int = 40,
    draws: int = 3,
) -> dict[str, np.ndarray]:
    """Every number about these explanations, slice by slice, so that folds can be pooled before
    intervals are computed.

    Args:
        images: float32 (N, 1, H, W) in [0, 1].
        adversarial: eps as text → the attacked `images`. Both maps explain the clean prediction.
        sample: indices of the images for the expensive measures (faithfulness, randomization, the
            explanation attack); None takes all.
        attack_eps: L-infinity radius of the explanation attack.
        fresh, draws: as in `randomization_check`.
        curve_steps, map_steps: of the deletion and insertion curves, and of the explanation attack.

    Returns:
        `<method>:<topic>:<name>` → float64 (N,), NaN outside the sample and for a share of an empty
        map.
    """
    every = torch.arange(len(images))
    rows = every if sample is None else torch.as_tensor(sample, dtype=torch.int64)
    adversarial = adversarial or {}
    targets = predict(model, images, batch_size=batch_size).argmax(1)
    masks, cells = anatomy_masks(images), grid_side(model, images[:1])
    measures: dict[str, np.ndarray] = {}

    def keep(topic: str, values: Mapping[str, np.ndarray]) -> None:
        measures.update({f"{topic}:{name}": found for name, found in values.items()})

    def keep_sample(topic: str, values: Mapping[str, np.ndarray]) -> None:
        for name, found in values.items():
            column = measures[f"{topic}:{name}"] = np.full(len(images), np.nan)
            column[rows.numpy()] = found

    for eps, attacked in adversarial.items():
        kept = predict(model, attacked, batch_size=batch_size).argmax(1) == targets
        keep("prediction:kept", {eps: kept.numpy().astype(np.float64)})
    moved = explanation_attack(
        model, images[rows], attack_eps, steps=map_steps, batch_size=batch_size, seed=seed
    )
    for method in methods:
        maps = explain(model, images, targets, method=method, batch_size=batch_size)
        keep(f"{method}:anatomy", anatomy_shares(maps, masks))
        for eps, attacked in adversarial.items():
            there = explain(model, attacked, targets, method=method, batch_size=batch_size)
            keep(f"{method}:attack {eps}", map_similarity(maps, there))
        there = explain(model, moved, targets[rows], method=method, batch_size=batch_size)
        keep_sample(f"{method}:explanation attack", map_similarity(maps[rows], there))
        # A similarity means nothing without the eps that it was measured at.
        keep_sample(f"{method}:explanation attack", {"eps": np.full(len(rows), attack_eps)})
        faithful = faithfulness(
            model, images[rows], maps[rows], targets[rows], cells, batch_size, seed, curve_steps
        )
        keep_sample(f"{method}:faithfulness", faithful)
        changed = randomization_check(
            model,
            images[rows],
            method=method,
            draws=draws,
            batch_size=batch_size,
            seed=seed,
            fresh=fresh,
        )
        numbered = {
            f"{place:02d} {name}": found for place, (name, found) in enumerate(changed.items())
        }
        keep_sample(f"{method}:randomisation", numbered)
    return measures


def explanation_record(
    measures: Mapping[str, np.ndarray], labels: np.ndarray, patients: np.ndarray
) -> dict:
    """The `explanation` part of a record: means of the measures with 95% intervals.

    Args:
        measures: of `explanation_measures`, folds concatenated.
        labels, patients: (N,), class number and patient of each slice.

    Returns:
        method → topic → name → {"value", "ci", "n_slices", "n_people"}; a mean of nothing is null.
        A share of anatomy also has `by_class`, four such blocks, and `beyond_area`, share minus
        area. Faithfulness has `beyond_random`, how much better the map is than the random map of
        the same slice: above 0 is good, for deletion too. `randomisation` has `stages`, and
        `passed`, whether the first stage takes the mean correlation below `SANITY_LIMIT`.
    """
    record: dict[str, dict] = {}
    for key, values in measures.items():
        method, topic, name = key.split(":")
        block = _mean(values, labels, patients)
        if topic == "anatomy" and not name.endswith("_area"):
            known = ~np.isnan(values)
            block["by_class"] = share_by_class(values[known], labels[known], patients[known])
        # Differences are taken slice by slice: comparing two intervals would hide a small but
        # constant one.
        if topic == "anatomy" and (area := measures.get(f"{key}_area")) is not None:
            block["beyond_area"] = _mean(values - area, labels, patients)
        if topic == "faithfulness" and (control := measures.get(f"{key}{CONTROL}")) is not None:
            better = control - values if name == "deletion" else values - control
            block["beyond_random"] = _mean(better, labels, patients)
        record.setdefault(method, {}).setdefault(topic, {})[name] = block
    for topics in record.values():
        if stages := topics.get("randomisation"):
            first = stages[min(stages)]["value"]
            topics["randomisation"] = {
                "stages": stages,
                "passed": first is not None and first < SANITY_LIMIT,
            }
    return record


def _mean(values: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> dict:
    """Mean of the values that are not NaN, with its patient-clustered interval."""
    known = ~np.isnan(values)
    sizes = {"n_slices": int(known.sum()), "n_people": len(np.unique(patients[known]))}
    if not known.any():
        return {"value": None, "ci": None, **sizes}
    # A share of robust images is the mean of a flag; `score_robust` averages numbers alike.
    scores = score_robust(values[known], values[known], labels[known], patients[known])
    return {"value": scores["accuracy"]["value"], "ci": scores["accuracy"]["ci"], **sizes}
