"""Every setting of a run in one frozen dataclass, and its profiles `demo`, `cpu` and `paper`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from utils.utils_funcs import MODELS, UserError

Profile = Literal["demo", "cpu", "paper"]
Protocol = Literal["slice", "patient", "within", "within_permuted"]


@dataclass(frozen=True)
class RunConfig:
    """Settings of one run (one model, protocol, fold and seed).

    `--help` of every command shows the lines below."""

    model: str = "Resnet"
    """One of Dinov2, Dinov2_atk, Efficientnet, Efficientnet_atk, Resnet, Resnet_atk."""
    protocol: Protocol = "patient"
    """`slice` is the published split (patients on both sides); `patient` keeps patients apart;
    `within` tests one model on patients of both kinds, and `within_permuted` does so with labels
    permuted among patients (`utils.within`)."""
    fold: int = 0
    """Test fold, 0-4; always 0 under `slice`."""
    seed: int = 0
    """Seeds weights, batches, augmentation and attacks."""
    profile: Profile = "demo"
    """Budgets: `demo` minutes on a laptop, `cpu` hours on two cores, `paper` one GPU or several."""

    # data
    max_train: int | None = None
    """Train on only so many slices, spread over classes and patients (None: all)."""
    max_test: int | None = None
    """Validate and test on only so many slices, spread in the same way (None: all)."""
    slice_stride: int = 1
    """An epoch draws one in so many slices of a patient; neighbors are nearly the same image."""
    input_size: int | None = None
    """Side in pixels that the backbone sees (None: native). Attacks always act on native pixels."""

    # training
    epochs: int = 12
    batch_size: int = 32
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 3e-4
    weight_decay: float = 0.05
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = 1.0
    """Linear warm-up of the learning rate."""
    augmentation: float = 0.5
    """Strength in [0, 1] of flips, shifts, rotations and brightness; 0 turns them off."""
    loss: Literal["ce", "ordinal"] = "ce"
    """Cross-entropy against the class, or against soft labels by the distance between ratings."""
    label_smoothing: float = 0.0
    class_weights: bool = True
    """Weight the loss by inverse class frequency of the training set."""
    gradient_clip: float = 1.0
    patience: int = 0
    """Stop after so many epochs without a better validation score (0: run all epochs).

    The best epoch is kept anyway."""
    kept_epoch: Literal["best", "last"] = "best"
    """Which epoch's weights are the model: the best on validation patients, or the last one."""
    ema_decay: float = 0.0
    """Exponential moving average of the weights, per step (0: off)."""
    pretrained: bool = True
    """Ask for pretrained weights; the record says what was really loaded."""
    fine_tune: Literal["full", "last_block", "head"] = "full"
    layer_decay: float = 1.0
    """Factor on the learning rate from one block of DINOv2 to the block below it (1: none)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of training; `auto` times both on this machine and takes bf16 where it is faster
    and agrees with fp32."""

    # adversarial training (`_atk` models only)
    method: Literal["pgd", "trades", "fast"] = "pgd"
    """PGD-AT (Madry et al. 2018), TRADES (Zhang et al. 2019), or fast single-step training (Wong et
    al. 2020)."""
    train_eps: float = 4 / 255
    train_steps: int = 2
    clean_weight: float = 0.0
    """w in loss = w·clean + (1 − w)·adversarial; TRADES does not use it."""
    trades_beta: float = 6.0
    """beta in the loss of TRADES = clean + beta·KL(clean, adversarial)."""
    eps_ramp: float = 0.5
    """Curriculum: eps grows linearly from 0 to `train_eps` over this share of the epochs."""
    warm_start: bool = False
    """Start from the trained weights of the clean counterpart (same protocol, fold and seed)."""

    # search
    trials: int = 0
    """Optuna trials before the final training (0: use the settings above or a saved best)."""
    search_epochs: int = 3

    # attack
    eps: tuple[str, ...] = ("0.5/255", "1/255", "2/255", "4/255", "8/255", "0.005")
    """L-infinity budgets of the sweep, written as a reader writes them."""
    headline_eps: str = "4/255"
    pgd_steps: int = 20
    sweep_steps: int = 100
    """Auto-PGD steps at each eps of the sweep; the headline eps always gets 100."""
    max_steps: int = 400
    """PGD and Auto-PGD are repeated with twice the steps, up to so many, until a round
    misclassifies no further image; at least one such round is run."""
    attack_stride: int = 1
    """Attack one in so many test slices of each patient; clean scores are of every test slice."""
    attack_batch: int = 64
    attack_as_trained: bool = False
    """Attacks search in the arithmetic that the model was trained in, so in bfloat16 where that was
    faster; whether an image is misclassified is always decided in float32."""
    suite: Literal["quick", "standard", "full"] = "standard"
    """`quick`: noise, FGSM, PGD. `standard`: also targeted PGD, transfer, and APGD-T and Square on
    the images robust so far. `full`: also other norms, attacks that see only decisions, and
    AutoAttack on a stratified sample."""
    sample: int = 128
    """Slices in the stratified sample for the most expensive attacks."""
    explained: int | None = None
    """Slices of the sample whose explanations are measured, whose smallest perturbations are
    searched, and from whose features the patient is predicted (None: all of them)."""

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise UserError(f"Unknown model {self.model!r}: expected one of {', '.join(MODELS)}.")
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise UserError(
                    f"{option(name)} is {value!r}: expected one of {', '.join(allowed)}."
                )
        for name, (low, high, what) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # a NaN lies nowhere
                raise UserError(f"{option(name)} is {value!r}: expected {what}.")
        if self.protocol == "slice" and self.fold != 0:
            raise UserError(
                f"--fold is {self.fold}, and the published split has no folds: leave it out, or "
                "choose --protocol patient."
            )
        if not self.eps:
            raise UserError("--eps names no budget: write one or more, such as 4/255 8/255.")
        for text in (*self.eps, self.headline_eps):
            parse_eps(text)

    @property
    def adversarial(self) -> bool:
        """Whether the model is trained adversarially."""
        return self.model.endswith("_atk")

    @property
    def regime(self) -> str:
        """`clean`, or `atk` for adversarial training."""
        return "atk" if self.adversarial else "clean"

    @property
    def backbone(self) -> str:
        """The model's name without its regime."""
        return self.model.removesuffix("_atk")

    def for_explanations(self) -> RunConfig:
        """The same settings with the sample cut to `explained` slices."""
        return dataclasses.replace(self, sample=min(self.sample, self.explained or self.sample))

    @property
    def run_name(self) -> str:
        """The run's name in paths, `fold<k>_seed<s>`."""
        return f"fold{self.fold}_seed{self.seed}"


def option(name: str) -> str:
    """A setting as it is written on the command line."""
    return "--" + name.replace("_", "-")


#: Settings with a few allowed values, as their types name them.
CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(kind)
    for name, kind in get_type_hints(RunConfig).items()
    if get_origin(kind) is Literal
}
_INFINITE = float("inf")
#: Setting → smallest and largest allowed value, and what to say where it lies outside; None, where
#: a setting may be None, is allowed too.
RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(
        (
            "max_train",
            "max_test",
            "slice_stride",
            "input_size",
            "epochs",
            "batch_size",
            "train_steps",
            "search_epochs",
            "pgd_steps",
            "sweep_steps",
            "max_steps",
            "attack_stride",
            "attack_batch",
            "sample",
            "explained",
        ),
        (1, 10**9, "a whole number from 1 on"),
    ),
    **dict.fromkeys(("seed", "patience", "trials"), (0, 10**9, "a whole number from 0 on")),
    "fold": (0, 4, "a fold from 0 to 4"),
    "lr": (1e-12, 1e3, "a positive number"),
    "gradient_clip": (1e-12, _INFINITE, "a positive number"),
    **dict.fromkeys(
        ("weight_decay", "warmup_epochs", "trades_beta"), (0, 1e9, "a number from 0 on")
    ),
    **dict.fromkeys(
        ("augmentation", "train_eps", "clean_weight", "eps_ramp"), (0, 1, "a number from 0 to 1")
    ),
    **dict.fromkeys(
        ("label_smoothing", "ema_decay"), (0, 1 - 1e-9, "a number from 0 to less than 1")
    ),
    "layer_decay": (1e-12, 1, "a number from 0, which is not allowed itself, to 1"),
}


def parse_eps(text: str) -> float:
    """`"4/255"` or `"0.005"` → eps in units of the [0, 1] pixel range."""
    numerator, _, denominator = text.partition("/")
    try:
        value = float(numerator) / (float(denominator) if denominator else 1.0)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{text!r} is no eps: write it as 4/255 or 0.005.") from error
    if not 0 <= value <= 1:
        raise UserError(
            f"eps {text!r} lies outside [0, 1], the range of pixel values; did you forget /255?"
        )
    return value


#: What a profile changes: budgets and sizes, never code paths.
PROFILES: dict[str, dict] = {
    "demo": {
        "max_train": 16,
        "max_test": 8,
        "precision": "fp32",
        "input_size": 32,
        "epochs": 2,
        "batch_size": 8,
        "train_steps": 2,
        "trials": 2,
        "search_epochs": 1,
        "eps": ("4/255",),
        "pgd_steps": 3,
        "max_steps": 6,
        "suite": "quick",
        "sample": 4,
    },
    # Every patient is attacked, on two slices each: the number of patients decides how wide the
    # intervals are.
    "cpu": {
        "slice_stride": 4,
        "epochs": 12,
        "train_steps": 2,
        "trials": 0,
        "suite": "full",
        "attack_stride": 16,
        "sweep_steps": 20,
        "sample": 32,
        "attack_as_trained": True,
    },
    "paper": {
        "input_size": 224,
        "epochs": 40,
        "batch_size": 64,
        "train_steps": 10,
        "trials": 20,
        "search_epochs": 8,
        "suite": "full",
        "attack_batch": 256,
        "sample": 512,
        "pgd_steps": 50,
    },
}
#: What protocol `within` changes: it asks what remains of answers that were memorized, so it trains
#: to the end, without augmentation; all of its few test slices are attacked.
WITHIN = {"kept_epoch": "last", "augmentation": 0.0, "slice_stride": 1, "attack_stride": 1}
#: Its budgets above `demo`. An eps smaller than elsewhere separates models that nothing protects.
WITHIN_SIZES = {
    "input_size": 64,
    "epochs": 8,
    "suite": "quick",
    "eps": ("0.25/255", "0.5/255", "1/255", "2/255", "4/255", "8/255"),
    "max_steps": 80,
}
#: Learning rates of a model, or of a backbone, that differ from the default.
LEARNING_RATES = {"Dinov2": 1e-4, "Efficientnet": 1e-3, "Efficientnet_atk": 3e-4}
#: Settings of a model under `cpu`. In its few hundred steps PGD adversarial training of
#: EfficientNet-B0 is hardly better than one answer for all images, from random weights or from the
#: clean counterpart's; TRADES from the clean counterpart's weights is
#: (`assets/Efficientnet_atk/defaults.json`, by
#: `python tests/benchmarks/defaults.py --model Efficientnet_atk`).
CPU_RECIPES = {"Efficientnet_atk": {"method": "trades", "trades_beta": 2.0, "warm_start": True}}
#: Input size of a profile → that of DINOv2. Its patch is 14 pixels and it silently ignores the
#: remainder, so its sizes are multiples of 14.
VIT_INPUT = {32: 28, None: 126, 128: 126}


def make_config(profile: Profile = "demo", model: str = "Resnet", **overrides: object) -> RunConfig:
    """The profile's settings for this model, changed by `overrides`.

    Raises:
        UserError: an unknown profile, model or setting.
    """
    if profile not in PROFILES:
        raise UserError(f"Unknown profile {profile!r}: expected one of {', '.join(PROFILES)}.")
    settings = {**PROFILES[profile], "profile": profile, "model": model}
    backbone = model.removesuffix("_atk")
    if rate := LEARNING_RATES.get(model, LEARNING_RATES.get(backbone)):
        settings["lr"] = rate
    if profile == "cpu":
        settings |= CPU_RECIPES.get(model, {})
    if backbone == "Dinov2":
        settings["input_size"] = VIT_INPUT.get(
            settings.get("input_size"), settings.get("input_size")
        )
    if profile == "demo" and overrides.get("protocol") == "slice":
        settings["trials"] = 0  # one search shows how it goes
    if profile == "cpu" and overrides.get("protocol") == "slice":
        # One fold has to do what five do under `patient`: about one slice of each of the 200
        # patients is attacked, and the sample for the most expensive attacks is larger. The
        # literature's scores on this split come from memorizing the training folder, so that is
        # what is trained: every slice in an epoch, without augmentation. Adversarial training costs
        # three passes a step, so it draws every second slice.
        settings |= {
            "sample": 128,
            "explained": 64,
            "attack_stride": 8,
            "augmentation": 0.0,
            "epochs": 8,
            "slice_stride": 2 if model.endswith("_atk") else 1,
        }
    if str(overrides.get("protocol")).startswith("within"):
        settings |= WITHIN | ({} if profile == "demo" else WITHIN_SIZES)
    unknown = set(overrides) - {field.name for field in dataclasses.fields(RunConfig)}
    if unknown:
        raise UserError(
            f"Unknown setting {', '.join(sorted(unknown))}: see `python -m utils.experiment run "
            "--help`."
        )
    return RunConfig(**{**settings, **overrides})


def protocols_of(profile: str, model: str) -> tuple[Protocol, ...]:
    """Protocols that a notebook of a profile runs, the honest one first; a demo shows the other one
    for ResNet-34 alone."""
    both = profile != "demo" or model.startswith("Resnet")
    return ("patient", "slice") if both else ("patient",)


def folds_of(profile: str, protocol: str) -> tuple[int, ...]:
    """Test folds that a profile runs: five under `patient`; one under `slice`, and in `demo`."""
    return (0,) if protocol == "slice" or profile == "demo" else (0, 1, 2, 3, 4)
