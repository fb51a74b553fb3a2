"""How much memory the data take while they are prepared and trained on, and how much they would as float tensors.

Measured as the peak of a process's resident memory, which the kernel keeps (`VmHWM`), in a process of its own: everything
counts, whichever library holds it. What does not grow with the number of images (libraries, weights, one batch) goes out by
taking the difference of a large and a small cohort.
"""

import ctypes
import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from tests import killable
from tests.test_training import DEVICE, small
from utils import data, training
from utils.cohort import Cohort, read_raw

FOLDERS = ("Non_Demented", "Very_Mild_Demented", "Mild_Demented", "Moderate_Demented")
SLICES = 32
#: Bytes of an image as the seeds' authors held it: float32, three channels, 224 pixels a side.
THEIRS = 4 * 3 * 224 * 224


def peak_of(work: Callable[[], object]) -> int:
    """Bytes by which this process's resident memory grew at the highest moment of `work`."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not be filled again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _return_what_is_freed() -> None:
    """Every block of at least 1 MiB is mapped by itself and goes back when freed. By default glibc raises this limit as it
    goes, to at most 32 MiB: then sets that were freed stay in the heap or don't, as it happens, and blur the peak."""
    m_mmap_threshold = -3
    assert ctypes.CDLL("libc.so.6").mallopt(m_mmap_threshold, 1 << 20) == 1


def _resident(name: str) -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{name}:")
    )
    return 1024 * int(line.split()[1])


def write_raw(folder: Path, patients: int) -> Path:
    """A raw folder of so many people, `SLICES` images of 128 px each, named by person and slice; every fifth person is tested."""
    image = np.random.default_rng(patients).integers(0, 60, (128, 128)).astype(np.uint8)
    for patient in range(patients):
        where = folder / ("test" if patient % 5 == 4 else "train") / FOLDERS[patient % 4]
        where.mkdir(parents=True, exist_ok=True)
        for number in range(SLICES):
            Image.fromarray(np.roll(image, (patient, number), (0, 1))).save(
                where / f"{patient:03d}_{number:02d}.jpg"
            )
    return folder


def prepare(raw_folder: Path, folder: Path) -> None:
    """From raw files to the tensors of both protocols, as `experiment._prepare`, but that the names tell who is who."""
    raw = read_raw(raw_folder)
    who = np.array([[int(word) for word in Path(path).stem.split("_")] for path in raw.paths])
    files = np.array(raw.file_sha256)
    cohort = Cohort(
        files,
        files,
        np.array(raw.source_split),
        raw.label,
        np.full(len(raw), "real"),
        np.full(len(raw), ""),
        who[:, 0],
        who[:, 1],
    )
    data.prepare(raw, cohort, data.assign_folds(*data.patients_of(cohort)), folder)


def train(folder: Path, checkpoint: Path) -> None:
    """One epoch with validation, the `slice` protocol; all three sets are held, as by `experiment.train`. The stride spares
    steps, not memory."""
    sets = data.load_sets(folder, "slice", 0)
    config = small("Resnet", epochs=1, batch_size=32, augmentation=0.5, slice_stride=4)
    training.fit(sets["train"], sets["validation"], config, checkpoint, DEVICE, retrain=True)


def hold_theirs() -> None:
    """Turns this process into one that the condition forbids: what is stacked and what is loaded is in the authors' form."""
    stack, load, save = data.stack_images, data.load_set, data.save_set

    def theirs(images: torch.Tensor) -> torch.Tensor:
        return F.interpolate(images.float().div_(255), size=(224, 224)).repeat(1, 3, 1, 1)

    def load_theirs(*arguments) -> data.ImageSet:
        part = load(*arguments)
        return replace(part, images=theirs(part.images))

    data.stack_images, data.load_set = lambda *arguments: theirs(stack(*arguments)), load_theirs
    # The files keep their own form: they are what `load_theirs` reads.
    data.save_set = lambda part, path: save(
        replace(part, images=part.images[:, :1, :128, :128].mul(255).byte()), path
    )
    training.pixels = lambda images, device="cpu": images[:, :1].contiguous()


def measure(raw_folders: list[Path], folder: Path, counterpart: bool = False) -> None:
    """Writes `peaks.json`, a list of {images, prepare, train} in bytes for cohorts of growing size; the `twin` holds floats.
    Each stage is done once beforehand with the first cohort, unmeasured: what is laid out at the first call is no data."""
    killable.use_tiny_network()
    _return_what_is_freed()
    if counterpart:
        hold_theirs()
    found = [{"images": sum(1 for _ in raw_folder.rglob("*.jpg"))} for raw_folder in raw_folders]
    for stage in ("prepare", "train"):
        for number, raw_folder in [(0, raw_folders[0]), *enumerate(raw_folders)]:
            sets = folder / raw_folder.name
            work = (
                (lambda: prepare(raw_folder, sets))
                if stage == "prepare"
                else (lambda: train(sets, sets / "unit.safetensors"))
            )
            found[number][stage] = peak_of(work)
    (folder / "peaks.json").write_text(json.dumps(found))


def share_of_theirs(found: list[dict], stage: str) -> float:
    """By how much an image more raises the peak, as a share of what the seeds' authors held for it."""
    first, last = found
    return (last[stage] - first[stage]) / (last["images"] - first["images"]) / THEIRS
