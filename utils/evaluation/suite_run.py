"""What one evaluation is given, and what its attacks have found so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from utils.attacks.base import ATTACKS, Norm, Precision, margin
from utils.config import RunConfig
from utils.evaluation.plan import VIEWS, Stage, headline_of
from utils.evaluation.predictions import (
    misclassified,
    model_digest,
    stratified_sample,
    wrong_where_not_finite,
)
from utils.prediction import device_of, predict
from utils.utils_funcs import CLASSES, UserError

NORMS: tuple[Norm, ...] = ("linf", "l2", "l0")

#: Where the outcome of a stage is kept: eps as written, name of the stage.
Key = tuple[str, str]


@dataclass
class Outcome:
    """What a stage has found so far at one eps, over all of its rounds.

    Attributes:
        logits, rounded: float32 (N, 4) of the attack's images, and of these rounded to 8 bits; NaN
            outside of the stage's declared set.
        chosen: which images the first round attacks, bool (N,).
        share_before: share of robust images before the stage.
        n_attacked: images attacked, summed over rounds.
        queries: images passed through the model.
        unchanged: right images that came back as they were.
        largest: largest perturbation, in the attack's norm.
        flags: warnings of the attack's own code.
        rounds: steps, restarts, images attacked and images newly misclassified, one entry a round.
    """

    logits: np.ndarray
    rounded: np.ndarray
    chosen: np.ndarray
    share_before: float
    n_attacked: int = 0
    seconds: float = 0.0
    queries: int = 0
    unchanged: int = 0
    largest: float = 0.0
    flags: set[str] = field(default_factory=set)
    rounds: list[dict] = field(default_factory=list)


class Progress:
    """Which images are misclassified so far, in each norm and view, and by which logits.

    Every attack adds to it. Clean errors are misclassified from the beginning. `views` are those in
    which images are judged.

    Attributes:
        misclassified: (norm, view) → bool (N,).
        logits: (norm, view) → float32 (N, 4) that first misclassified the image; its clean logits
            while it is robust.
    """

    def __init__(
        self, clean: np.ndarray, labels: np.ndarray, views: Sequence[str] = tuple(VIEWS)
    ) -> None:
        self.labels, self.views = labels, views
        states = [(norm, view) for norm in NORMS for view in views]
        self.misclassified = {
            (norm, view): misclassified(clean, labels, view) for norm, view in states
        }
        self.logits = {state: clean.copy() for state in states}

    def add(self, logits: np.ndarray, norm: Norm) -> None:
        """Counts the images that these logits (N, 4) misclassify, in every view of the norm."""
        for view in self.views:
            state = norm, view
            new = misclassified(logits, self.labels, view) & ~self.misclassified[state]
            self.logits[state][new] = logits[new]
            self.misclassified[state] |= new

    def robust(self, stage: Stage) -> np.ndarray:
        """Which images are robust so far in a stage's norm and view, bool (N,)."""
        return ~self.misclassified[ATTACKS[stage.attack].norm, stage.view]


class KeptImages:
    """The strongest four-class adversarial image of each image of the sample, so far.

    Attributes:
        images: float32 (S, 1, H, W); clean ones at first.
        logits: float32 (S, 4), theirs.
    """

    def __init__(self, sample: np.ndarray, pixels: Tensor, clean: np.ndarray) -> None:
        self.sample = sample
        self.images, self.logits = pixels[sample].clone(), clean[sample].copy()

    def take_stronger(
        self, rows: np.ndarray, images: np.ndarray, logits: np.ndarray, labels: np.ndarray
    ) -> None:
        """Takes the images whose four-class margin is lower than that of the kept ones.

        Args:
            rows: numbers of the images of one batch (B,).
            images: adversarial images of those rows that are in the sample.
            logits, labels: of all rows (B, 4) and (B,).
        """
        inside = np.isin(rows, self.sample)
        places = np.searchsorted(self.sample, rows[inside])
        truth, new = torch.as_tensor(labels[inside]), torch.as_tensor(logits[inside])
        kept = torch.as_tensor(self.logits[places])
        lower = (margin(new, truth) < margin(kept, truth)).numpy()
        self.images[places[lower]] = torch.as_tensor(images)[lower]
        self.logits[places[lower]] = logits[inside][lower]


class SuiteRun:
    """One evaluation: the model and its images, and what the attacks have found so far.

    Attributes:
        pixels: float32 (N, 1, H, W) in [0, 1].
        clean: float32 (N, 4) logits of the clean images.
        digest, modes: state of the model before any attack.
        sample: numbers of the images in the fixed stratified sample (S,).
        nonfinite: answers so far that were NaN or infinite.
        logits: `Key` → float32 (N, 4), what `SuiteResult` returns.
        meta: `Key` → what the record says of it.
        attacked: `Key` → images that the first round attacked, bool (N,).
        first_round: `Key` → logits (N, 4) after the first round. Later rounds attack robust images
            alone, so that only first rounds can be compared between attacks and eps.
        last_round: what was repeated → `Key` → numbers of robust images before and after the last
            repetition (None: none was run).
    """

    def __init__(
        self,
        model: nn.Module,
        pixels: Tensor,
        labels: np.ndarray,
        patients: np.ndarray,
        config: RunConfig,
        *,
        sources: dict[str, nn.Module],
        masks: dict[str, Tensor],
        precision: Precision,
        time_limit: float | None,
        classes: Sequence[str] = CLASSES,
    ) -> None:
        if not (len(pixels) == len(labels) == len(patients)) or not len(pixels):
            raise UserError(
                f"The evaluation got {len(pixels)} images, {len(labels)} labels and "
                f"{len(patients)} patients: give one of each for every image, and at least one."
            )
        self.model, self.pixels, self.labels = model, pixels, labels
        self.classes = tuple(classes)
        self.config, self.headline = config, headline_of(config)
        self.sources, self.masks = sources, masks
        self.precision: Precision = precision
        self.time_limit, self.device = time_limit, device_of(model)
        self.digest = model_digest(model)
        self.modes = [module.training for module in model.modules()]
        self.nonfinite = 0
        clean = self.predict(pixels).numpy()
        if clean.shape != (len(labels), len(self.classes)):
            raise UserError(
                f"The model returned {clean.shape[1:]} for an image: expected {len(self.classes)} "
                "logits."
            )
        self.clean = self.finite(clean, labels)
        self.sample = stratified_sample(labels, patients, config.sample)
        self.progress = Progress(self.clean, labels, self.views)
        self.kept = KeptImages(self.sample, pixels, self.clean)
        self.logits: dict[Key, np.ndarray] = {}
        self.meta: dict[Key, dict] = {}
        self.attacked: dict[Key, np.ndarray] = {}
        self.first_round: dict[Key, np.ndarray] = {}
        self.last_round: dict[str, dict[Key, list[int] | None]] = {"steps": {}, "restarts": {}}

    @property
    def views(self) -> tuple[str, ...]:
        """The views of these classes: only the four of this project can be merged; `four` then
        stands for all classes, as they are."""
        return tuple(VIEWS) if self.classes == CLASSES else ("four",)

    def eps_of(self, stage: Stage, sweep: Sequence[str]) -> list[str]:
        """At which eps a stage runs, as written."""
        return {"every": list(sweep), "headline": [self.headline]}.get(stage.eps, [stage.eps])

    def precision_of(self, stage: Stage) -> Precision:
        """The arithmetic in which a stage searches."""
        return stage.precision or self.precision

    def keeps_images(self, stage: Stage, eps_text: str) -> bool:
        """Whether a stage's images may be kept: those of four classes, L-infinity and the headline
        eps."""
        linf = ATTACKS[stage.attack].norm == "linf"
        return linf and stage.view == "four" and eps_text == self.headline

    def predict(self, images: Tensor) -> Tensor:
        """Float32 logits (N, 4) on the CPU."""
        return predict(self.model, images, batch_size=self.config.attack_batch)

    def finite(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Logits in which an answer that is not finite is replaced by a wrong one, and counted."""
        self.nonfinite += int((~np.isfinite(logits).all(1)).sum())
        return wrong_where_not_finite(logits, labels)
