"""How much memory the data take while they are prepared and trained on, and as float tensors.

Measured as the peak of a process's resident memory, which the kernel keeps (`VmHWM`), in a process
that does nothing else: everything counts, whichever library holds it. What does not grow with the
number of images (libraries, weights, one batch) cancels in the difference of a large and a small
cohort.
"""

import ctypes
import functools
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
from utils import data, prediction, training
from utils.cohort.raw import RawImages, read_raw
from utils.cohort.table import Cohort
from utils.training import trainer, validation

FOLDERS = ("Non_Demented", "Very_Mild_Demented", "Mild_Demented", "Moderate_Demented")
SLICES = 32
#: Bytes of an image in the original project: float32, three channels, 224 pixels a side.
THEIRS = 4 * 3 * 224 * 224


def peak_of(work: Callable[[], object]) -> int:
    """Bytes by which this process's resident memory grew at the highest moment of `work`."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not be filled again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now
    before = resident_memory("VmRSS")
    work()
    return resident_memory("VmHWM") - before


def return_what_is_freed() -> None:
    """Has every block of at least 1 MiB returned to the system when it is freed.

    By default glibc raises this limit with use, to at most 32 MiB: then sets that were freed stay
    in the heap or not by chance, and blur the peak.
    """
    m_mmap_threshold = -3
    assert ctypes.CDLL("libc.so.6").mallopt(m_mmap_threshold, 1 << 20) == 1


def resident_memory(name: str) -> int:
    """Bytes of a line of /proc/self/status: `VmRSS`, now, or `VmHWM`, at the peak."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{name}:")
    )
    return 1024 * int(line.split()[1])


def write_raw(folder: Path, patients: int) -> Path:
    """A raw folder of so many patients, `SLICES` images of 128 px each, named by patient and slice.

    Every fifth patient is in its test folder.
    """
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
    """From raw files to the tensors of both protocols, as `experiment.prepare_workspace` does, but
    with patients and slices read from the files' names."""
    raw = read_raw(raw_folder)
    names = np.array([[int(word) for word in Path(path).stem.split("_")] for path in raw.paths])
    files = np.array(raw.file_sha256)
    cohort = Cohort(
        files,
        files,
        np.array(raw.source_split),
        raw.label,
        np.full(len(raw), "real"),
        np.full(len(raw), ""),
        names[:, 0],
        names[:, 1],
    )
    data.prepare(raw, cohort, data.assign_folds(*data.patients_of(cohort)), folder)


def train(folder: Path, checkpoint: Path) -> None:
    """One epoch with validation, the `slice` protocol; all three sets are held, as by
    `experiment.train`. The stride saves steps, not memory."""
    sets = data.load_sets(folder, "slice", 0)
    config = small("Resnet", epochs=1, batch_size=32, augmentation=0.5, slice_stride=4)
    training.fit(sets["train"], sets["validation"], config, checkpoint, DEVICE, retrain=True)


def hold_theirs() -> None:
    """Has this process hold images as floats, as the original project does; a test forbids it."""
    write, load = data.write_images, data.load_set

    def theirs(images: torch.Tensor) -> torch.Tensor:
        return F.interpolate(images.float().div_(255), size=(224, 224)).repeat(1, 3, 1, 1)

    def load_theirs(*arguments) -> data.ImageSet:
        part = load(*arguments)
        return replace(part, stack=theirs(part.images), rows=torch.arange(len(part)))

    def write_theirs(raw: RawImages, path: Path) -> str:
        held = theirs(data.stack_images(raw))
        digest = write(raw, path)  # the file keeps its form: it is what `load_theirs` reads
        assert len(held) == len(raw)
        return digest

    data.write_images, data.load_set = write_theirs, load_theirs
    for module in (trainer, validation, prediction):
        module.pixels = lambda images, device="cpu": images[:, :1].contiguous()


def measure(raw_folders: list[Path], folder: Path, counterpart: bool = False) -> None:
    """Writes `peaks.json`: [{images, prepare, train}], in bytes, for cohorts of growing size.

    Each stage is first done once with the first cohort, unmeasured: what a first call allocates is
    not for the data.

    Args:
        counterpart: hold floats, as the original project does.
    """
    killable.use_tiny_network()
    return_what_is_freed()
    if counterpart:
        hold_theirs()
    found = [{"images": sum(1 for _ in raw_folder.rglob("*.jpg"))} for raw_folder in raw_folders]
    works = {
        "prepare": prepare,
        "train": lambda raw_folder, sets: train(sets, sets / "unit.safetensors"),
    }
    for stage, work in works.items():
        for number, raw_folder in [(0, raw_folders[0]), *enumerate(raw_folders)]:
            arguments = raw_folder, folder / raw_folder.name
            found[number][stage] = peak_of(functools.partial(work, *arguments))
    (folder / "peaks.json").write_text(json.dumps(found))


def share_of_theirs(found: list[dict], stage: str) -> float:
    """By how much one more image raises the peak, relative to its bytes in the original project."""
    first, last = found
    return (last[stage] - first[stage]) / (last["images"] - first["images"]) / THEIRS
