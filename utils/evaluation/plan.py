"""Which attacks a suite runs, in which order, on which images, and their names in files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Self

from utils.class_groups import BINARY, THREE, Groups
from utils.config import RunConfig, parse_eps

if TYPE_CHECKING:  # PyTorch is not needed to read the names in a file
    from utils.attacks.base import Precision


class View(NamedTuple):
    """How the four logits are grouped when an attack searches and when its success is decided.

    `groups` of classes (None: the four classes themselves), `suffix` of the attack's name in files.
    """

    groups: Groups | None
    suffix: str


VIEWS: dict[str, View] = {
    "four": View(None, ""),
    "three": View(THREE, "_merged"),
    "binary": View(BINARY, "_binary"),
}

#: Suffix of an attack whose images are also rounded to 8 bits.
ROUNDED = "_8bit"


@dataclass(frozen=True)
class AttackName:
    """What an attack is called in predictions and records, e.g. `pgd20`, `pgd20_merged`,
    `pgd10_binary`, `pgd20_8bit`: the attack, the view that it attacks, and whether its images are
    rounded to 8 bits."""

    attack: str
    view: str = "four"
    rounded: bool = False

    def __str__(self) -> str:
        return self.attack + VIEWS[self.view].suffix + ROUNDED * self.rounded

    @classmethod
    def parse(cls, name: str) -> Self:
        """The attack that a name in predictions and records stands for."""
        attack = name.removesuffix(ROUNDED)
        for view, (_, suffix) in VIEWS.items():
            if suffix and attack.endswith(suffix):
                return cls(attack.removesuffix(suffix), view, attack != name)
        return cls(attack, "four", attack != name)

    @property
    def without_steps(self) -> str:
        """The attack without the number of steps that PGD's name ends with: `pgd` of `pgd20`."""
        return re.sub(r"(pgd)\d+$", r"\1", self.attack)


@dataclass(frozen=True)
class Stage:
    """One attack of a suite.

    Attributes:
        attack: name in `utils.attacks.ATTACKS`.
        name: `AttackName` of its column in the predictions.
        scope: `all` images; `standing` for those that are still robust in this view and norm;
            `sample` for the robust images of the fixed stratified sample.
        eps: at `every` eps of the sweep, at the `headline` one alone, or an eps as it is written
            (`0.5` of an L2 attack).
        source: name of the model that transfer images are made on.
        mask: name of the region that the attack is confined to.
        precision: arithmetic of the search (None: that of the whole suite).
    """

    attack: str
    name: str
    view: str = "four"
    scope: str = "all"
    eps: str = "every"
    budget: dict = field(default_factory=dict)
    source: str | None = None
    mask: str | None = None
    precision: Precision | None = None


def headline_of(config: RunConfig) -> str:
    """The eps of the expensive attacks: `config.headline_eps`, or the largest of a sweep that does
    not hold it."""
    if config.headline_eps in config.eps:
        return config.headline_eps
    return max(config.eps, key=parse_eps)


def suite_plan(
    config: RunConfig, sources: Sequence[str] = (), masks: Sequence[str] = ()
) -> list[Stage]:
    """The L-infinity attacks of `config.suite`, cheap ones first.

    `quick`, at every eps: noise, FGSM, and PGD on all three views.

    `standard` adds, in the views of four and of three classes, APGD-T on the robust images at every
    eps, and at the headline eps PGD towards each other class on the robust images and Square on
    those of the fixed sample; also at the headline eps transfer from each of `sources`, the
    clinically worst targets, and Kryptonite in the brain and in each of `masks`.

    `full` adds the other named gradient attacks, and HopSkipJump and official AutoAttack on the
    robust images of the fixed sample.
    """
    plan = _quick_plan(config)
    if config.suite != "quick":
        plan += _standard_additions(config, sources, masks)
    if config.suite == "full":
        plan += _full_additions()
    return plan


def _quick_plan(config: RunConfig) -> list[Stage]:
    steps = config.pgd_steps
    # With two classes there is one direction to go, and every image is pushed to the end: half the
    # steps are enough.
    half = max(steps // 2, min(steps, 5))
    margin = {"steps": steps, "loss": "margin"}
    push = {"steps": half, "loss": "margin", "push": True}
    return [
        Stage("noise", "noise"),
        Stage("fgsm", "fgsm"),
        _in_view("pgd", f"pgd{steps}", "four", "all", "every", margin),
        _in_view("pgd", f"pgd{steps}", "three", "standing", "every", margin),
        _in_view("pgd", f"pgd{half}", "binary", "all", "every", push),
    ]


def firmness_plan(config: RunConfig) -> list[Stage]:
    """Noise, FGSM, and on the images that are robust so far PGD and APGD-T over four and over three
    classes, at every eps: what decides how far right answers hold, and nothing else."""
    margin = {"steps": config.pgd_steps, "loss": "margin"}
    pgd, auto = f"pgd{config.pgd_steps}", {"steps": config.pgd_steps}
    return [
        Stage("noise", "noise"),
        Stage("fgsm", "fgsm"),
        _in_view("pgd", pgd, "four", "standing", "every", margin),
        _in_view("pgd", pgd, "three", "standing", "every", margin),
        _in_view("apgd_t", "apgd_t", "four", "standing", "every", auto),
        _in_view("apgd_t", "apgd_t", "three", "standing", "every", auto),
    ]


def _in_view(attack: str, name: str, view: str, scope: str, eps: str, budget: dict) -> Stage:
    return Stage(attack, str(AttackName(name, view)), view, scope, eps, budget)


def _standard_additions(
    config: RunConfig, sources: Sequence[str], masks: Sequence[str]
) -> list[Stage]:
    steps, headline = {"steps": config.pgd_steps}, headline_of(config)
    plan = [
        Stage("transfer", f"transfer_{source}", eps="headline", budget=steps, source=source)
        for source in sources
    ]
    plan += [
        _in_view("apgd_t", "apgd_t", view, "standing", eps_text, {"steps": config.sweep_steps})
        for eps_text in config.eps
        if eps_text != headline
        for view in ("four", "three")
    ]
    plan += [
        _in_view(attack, attack, view, scope, "headline", budget)
        for attack, scope, budget in (
            ("pgd_targeted", "standing", steps),
            ("apgd_t", "standing", {"steps": 100}),
            ("square", "sample", {"queries": 1000}),
        )
        for view in ("four", "three")
    ]
    # These rarely lower the robust accuracy. They are run for a result of their own, so on every
    # image.
    plan += [
        Stage("pgd_clinical", "pgd_clinical", eps="headline", budget=steps),
        Stage("kryptonite", "kryptonite", eps="headline", budget=steps),
    ]
    plan += [
        Stage("kryptonite", f"kryptonite_{mask}", eps="headline", budget=steps, mask=mask)
        for mask in masks
    ]
    return plan


def _full_additions() -> list[Stage]:
    decisions = {"steps": 5, "evaluations": 200}
    return [
        Stage("fgsm_targeted", "fgsm_targeted", eps="headline"),
        Stage("ifgsm", "ifgsm", eps="headline"),
        Stage("mifgsm", "mifgsm", eps="headline"),
        Stage("hopskipjump", "hopskipjump", scope="sample", eps="headline", budget=decisions),
        Stage("autoattack", "autoattack", scope="sample", eps="headline"),
    ]


def float32_stages(config: RunConfig) -> list[Stage]:
    """What is added to a suite that searches in bfloat16, after all else at the headline eps:
    APGD-T in float32 on the robust images of the fixed sample, so that robust accuracy counts what
    rounding hid, and a check reports it."""
    if config.suite == "quick":
        return []
    return [
        Stage(
            "apgd_t",
            str(AttackName("apgd_t_float32", view)),
            view,
            "sample",
            "headline",
            {"steps": 100},
            precision="fp32",
        )
        for view in ("four", "three")
    ]


def other_norms_plan(config: RunConfig) -> list[Stage]:
    """Attacks of other norms, reported separately: Euclidean ones at 0.5 and 1 (a pixel is 1 at
    most), and one and five pixels of any value, on the fixed sample."""
    plan = [
        Stage(attack, attack, scope="sample", eps=eps, budget={"steps": steps})
        for eps in ("0.5", "1")
        for attack, steps in (("pgd_l2", config.pgd_steps), ("deepfool", 30))
    ]
    evolution = {"generations": config.pgd_steps // 2, "population": 20}
    return plan + [
        Stage("one_pixel", "one_pixel", scope="sample", eps="1", budget=evolution),
        Stage("few_pixel", "few_pixel", scope="sample", eps="1", budget={"pixels": 5, **evolution}),
    ]


def decides_robust_accuracy(stage: Stage) -> bool:
    """Whether a stage is repeated with more steps until it misclassifies no further image: PGD and
    APGD-T against every image, in the views of four and of three classes."""
    return (
        stage.attack in ("pgd", "apgd_t")
        and stage.view in ("four", "three")
        and stage.scope != "sample"
        and stage.mask is None
        and "steps" in stage.budget
    )


def is_rounded(stage: Stage, eps_text: str) -> bool:
    """Whether a stage's images are also rounded to 8 bits, in a column of their own: PGD on four
    classes, where eps is a whole number of gray levels."""
    levels = parse_eps(eps_text) * 255
    whole = levels > 0.5 and abs(levels - round(levels)) < 1e-6
    return stage.attack == "pgd" and stage.view == "four" and whole
