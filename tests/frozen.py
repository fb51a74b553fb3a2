"""What a refactoring must not change, as hashes: trained weights and adversarial images.

    python -m tests.frozen             JSON of name -> SHA-256, computed with this checkout's code
    python -m tests.frozen --record    the starting commit's hashes, kept for this machine

Six short trainings (every backbone, clean and adversarial) and a few of other settings on a phantom
cohort, and every registered attack on a small fixed network. Both depend on the processor and on
PyTorch, so `frozen.json` keeps them by `machine_key()`. What is called here is what is promised to
stay where it is: this same file runs in a checkout of the starting commit (`hashes_of_start`).
PyTorch is imported inside the functions, so that a test can ask for the key without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import warnings
from inspect import signature
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path(__file__).with_suffix(".json")
#: The last commit before the refactoring: its code decides what is right.
START = "6f802851c4f3964bcd16cd15c8dde40e7236668f"
#: One thread, the CPU, no network and no progress bars: the same hashes however it is started.
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "ALZHEIMER_QUIET": "1",
    "PYTHONUTF8": "1",
}
#: Side of the phantom's slices, and what each backbone sees: smaller and larger, by the resize.
SIDE = 36
INPUT_SIZE = {"Dinov2": 28, "Efficientnet": 40, "Resnet": 32}
MODELS = tuple(f"{backbone}{regime}" for backbone in INPUT_SIZE for regime in ("", "_atk"))
#: Further trainings, through other branches of the loop: name -> model, settings.
VARIANTS = {
    "trades": ("Efficientnet_atk", {"method": "trades", "ema_decay": 0.5}),
    "fast": ("Efficientnet_atk", {"method": "fast", "clean_weight": 0.5, "eps_ramp": 0.0}),
    "ordinal": ("Efficientnet", {"loss": "ordinal", "optimizer": "sgd", "schedule": "constant"}),
    "last block": (
        "Dinov2",
        {"fine_tune": "last_block", "layer_decay": 0.7, "class_weights": False},
    ),
}
#: eps by norm, such that an attack misclassifies some of the images and not all.
EPS = {"linf": 3 / 255, "l2": 0.25, "l0": 0.3}
#: eps of attacks that would misclassify none at that of their norm.
EPS_OF_ATTACK = {
    **dict.fromkeys(("square", "hopskipjump", "transfer"), 9 / 255),
    "autoattack": 4 / 255,  # misclassifies all, before the 5,000 queries of its Square attack
}
#: Budgets of the attacks that take one; the others have none, or the same always.
BUDGETS = {
    **dict.fromkeys(
        ("ifgsm", "bim", "ifgsm_targeted", "mifgsm", "transfer", "kryptonite"), {"steps": 4}
    ),
    **dict.fromkeys(("pgd", "pgd_targeted", "pgd_clinical", "pgd_l2"), {"steps": 4, "restarts": 2}),
    **dict.fromkeys(("fab_t", "apgd_ce", "apgd_t"), {"steps": 5}),
    **dict.fromkeys(("one_pixel", "few_pixel"), {"generations": 5, "population": 12}),
    "deepfool": {"steps": 20},
    "square": {"queries": 100},
    "hopskipjump": {"steps": 2, "evaluations": 50},
}


# -- the record ------------------------------------------------------------------------------------


def machine_key() -> str:
    """What rounding depends on: the processor and its generation, PyTorch, and the one thread."""
    about = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            about[name.strip()] = value.strip()
    processor = about.get("model name") or platform.processor() or platform.machine()
    # A virtual machine's name for its processor may be as short as that of a whole line of them.
    numbers = "/".join(about[name] for name in ("cpu family", "model") if name in about)
    version = importlib.metadata.version("torch")
    return " | ".join(filter(None, (processor, numbers, f"torch {version}", "1 thread")))


def recorded_hashes() -> dict[str, str] | None:
    """The hashes kept for this machine, None where there are none of this starting commit."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    return record["hashes"].get(machine_key()) if record["start"] == START else None


def hashes_of(checkout: Path) -> dict[str, str]:
    """What `python -m tests.frozen` prints in a checkout."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("WORLD_SIZE", "PYTHONPATH")
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.frozen"],
        cwd=checkout,
        env=environment | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"python -m tests.frozen failed in {checkout}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def hashes_of_start() -> dict[str, str] | None:
    """The starting commit's hashes on this machine; None where git or that commit is missing."""
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", START, "utils"]
    try:
        archive = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    with tempfile.TemporaryDirectory(prefix="frozen-") as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        tests = Path(folder) / "tests"
        tests.mkdir()
        (tests / "__init__.py").touch()
        shutil.copy(__file__, tests / "frozen.py")
        return hashes_of(Path(folder))


def record() -> None:
    """Keeps the starting commit's hashes by this machine's key, never those of the present code."""
    hashes = hashes_of_start()
    if hashes is None:
        sys.exit(
            f"Commit {START[:7]} is not in this clone's history: `git fetch --unshallow` brings it."
        )
    kept = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    known = kept.get("hashes", {}) if kept.get("start") == START else {}
    known[machine_key()] = hashes
    text = json.dumps({"start": START, "hashes": known}, indent=1)
    RECORD.write_text(text + "\n", encoding="utf-8")


# -- what is hashed --------------------------------------------------------------------------------


def digest(tensors: dict) -> str:
    """SHA-256 over the names, types, shapes and bytes of tensors, in the order of their names."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def phantom_set(name: str, patients: tuple[int, ...], slices: int, seed: int):
    """An `ImageSet` of a drawn cohort: slices of patients, no synthetic ones and no duplicates."""
    import numpy as np
    import torch

    from utils.data import ImageSet
    from utils.phantom import draw_cohort

    # In the starting commit's code, which this may run with, they are `people` and `person`.
    counts = next(key for key in ("patients", "people") if key in signature(draw_cohort).parameters)
    options = {"slices": slices, "size": SIDE, "synthetic": 0, "duplicates": 0, "seed": seed}
    drawn = draw_cohort(**{counts: patients}, **options)
    hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in drawn.images]
    # Sets name their pixels and their cohort since weights are matched by them.
    known = signature(ImageSet).parameters
    named = {"pixels": hashes, "cohort_sha256": "c0ffee00" * 8}
    images = torch.from_numpy(np.stack(drawn.images))[:, None]
    # They are rows of shared images since these are stored once.
    return ImageSet(
        images,
        *([torch.arange(len(images))] if "rows" in known else []),
        torch.from_numpy(drawn.label),
        torch.from_numpy(getattr(drawn, "patient" if counts == "patients" else "person")),
        torch.from_numpy(drawn.slice_index),
        hashes,
        name,
        **{key: value for key, value in named.items() if key in known},
    )


def hash_trainings(folder: Path) -> dict[str, str]:
    """Weights and history of each short training: three steps from random weights, in float32."""
    import torch

    from utils.config import make_config
    from utils.training import fit

    train = phantom_set("train", (2, 1, 1, 1), 3, seed=1)
    validation = phantom_set("validation", (1, 1, 1, 1), 2, seed=2)
    hashes = {}
    for name, (model, changes) in ({model: (model, {}) for model in MODELS} | VARIANTS).items():
        settings = {
            "input_size": INPUT_SIZE[model.removesuffix("_atk")],
            "epochs": 1,
            "batch_size": 5,
            "warmup_epochs": 0.5,
            "train_steps": 2,
            "pretrained": False,
            "precision": "fp32",
            **changes,
        }
        config = make_config("demo", model, **settings)
        checkpoint = folder / name.replace(" ", "_") / "fold0_seed0.safetensors"
        done = fit(train, validation, config, checkpoint, torch.device("cpu"))
        history = [
            {key: value for key, value in entry.items() if key != "seconds"}
            for entry in done.history
        ]
        hashes[f"weights: {name}"] = digest(done.load().state_dict())
        text = json.dumps(history, sort_keys=True)
        hashes[f"history: {name}"] = hashlib.sha256(text.encode()).hexdigest()
    return hashes


def fixed_network(seed: int, images):
    """A small convolutional network of random weights, whose logits have mean 0 over `images`
    (N, 1, H, W): so it answers different classes, by margins that an attack can overcome."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * (SIDE // 2) ** 2, 4),
    ).eval()
    with torch.no_grad():
        network[-1].bias -= network(images).mean(0)
    return network


def hash_attacks() -> dict[str, str]:
    """Adversarial images of every registered attack, and of the options that several have."""
    import torch

    from utils.attacks import ATTACKS

    slices = phantom_set("attacked", (1, 1, 1, 1), 1, seed=5)
    images = slices.images.float() / 255
    model, source = fixed_network(6, images), fixed_network(4, images)
    with torch.no_grad():
        labels = model(images).argmax(1)  # every image is classified correctly
    targets = (labels + 1 + torch.arange(4) % 3) % 4
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 8:28, 8:28] = 1
    options = {name: (name, {}) for name in sorted(ATTACKS)}
    options |= {
        "pgd, targets": ("pgd", {"targets": targets}),
        "pgd, push, mask": ("pgd", {"push": True, "mask": mask}),
        "pgd, margin": ("pgd", {"loss": "margin"}),
        "pgd, bf16": ("pgd", {"precision": "bf16"}),
        "pgd_targeted, targets": ("pgd_targeted", {"targets": targets}),
        "ifgsm_targeted, targets": ("ifgsm_targeted", {"targets": targets}),
        "deepfool, targets": ("deepfool", {"targets": targets}),
        "few_pixel, targets": ("few_pixel", {"targets": targets}),
        "hopskipjump, targets": ("hopskipjump", {"targets": targets}),
    }
    hashes = {}
    for title, (name, option) in options.items():
        budget = BUDGETS.get(name, {}) | option | ({"source": source} if name == "transfer" else {})
        attack = ATTACKS[name]
        eps = EPS_OF_ATTACK.get(name, EPS[attack.norm])
        adversarial = attack(model, images, labels, eps, seed=7, **budget)
        hashes[f"attack: {title}"] = digest({"adversarial": adversarial})
    return hashes


def compute() -> dict[str, str]:
    """All hashes. It changes PyTorch's settings, so `hashes_of` calls it in another process."""
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="frozen-") as folder:
        return hash_trainings(Path(folder)) | hash_attacks()


def main() -> None:
    os.environ.update(ENVIRONMENT)
    if sys.argv[1:] == ["--record"]:
        record()
        return
    with contextlib.redirect_stdout(sys.stderr):  # packages of attacks print what they do
        hashes = compute()
    print(json.dumps(hashes, indent=1))


if __name__ == "__main__":
    main()
