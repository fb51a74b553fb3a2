"""The workspace: where data, checkpoints and results of a profile and a cohort are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils import data, phantom
from utils.cohort.raw import find_raw, read_raw
from utils.cohort.table import COMMITTED_COHORT, cohort_for, write_cohort
from utils.config import Profile, RunConfig
from utils.evaluation import records
from utils.utils_funcs import MODELS, ROOT, read_json, result_root, set_up_process, write_json


@dataclass(frozen=True)
class Workspace:
    """Which data are used, where their tensors are, and where results go."""

    root: Path
    data: Literal["real", "phantom"]
    profile: Profile
    raw: Path | None
    """None: there are no images here, and what the committed records hold is shown."""
    cohort_sha256: str

    @property
    def sets(self) -> Path:
        """The folder of the prepared tensors, with `cohort.csv` and `folds.csv`."""
        return self.root / "dataset" / "dataset_variables"

    def checkpoint(self, config: RunConfig) -> Path:
        """The file of a run's trained weights."""
        folder = self.root / "checkpoints" / config.model / config.protocol
        return folder / f"{config.run_name}.safetensors"

    def state(self, config: RunConfig) -> Path:
        """The folder of everything that lets a run continue after it was stopped."""
        return self.checkpoint(config).with_suffix("")

    def weights(self, config: RunConfig) -> Path | None:
        """The run's checkpoint, or else the fp16 copy of it that git keeps; None where neither is
        on this machine."""
        path = self.checkpoint(config)
        return next((kept for kept in (path, half_of(path)) if kept.is_file()), None)

    def record(self, model: str, protocol: str) -> Path:
        """The file of a model's record under a protocol."""
        return self.root / "assets" / model / f"{protocol}.json"

    def optuna(self, model: str) -> Path:
        """The folder of a model's searches."""
        return self.root / "checkpoints" / "optuna" / model


def open_workspace(
    profile: Profile = "demo",
    raw: str | Path | None = None,
    *,
    again: bool = False,
    records: bool = False,
) -> Workspace:
    """Finds the data, prepares the tensors of both protocols where they are missing or of other
    data, and prints what it found. Without any data it draws the phantom cohort, and everything
    that it touches says `data: phantom`. The process is set up for computing (`set_up_process`).

    Args:
        raw: folder or zip of class folders (None: see `utils.cohort.find_raw`).
        again: prepare the tensors even if they are there.
        records: where there are no images and the repository holds records of this profile, go
            without images and show these records.
    """
    set_up_process()
    found = find_raw(raw or None)
    if found is None and records and holds_records(profile):
        print(
            f"data: real · profile: {profile} · no images here, so what the committed records hold "
            "is shown"
        )
        return Workspace(ROOT, "real", profile, None, data.file_sha256(COMMITTED_COHORT))
    kind: Literal["real", "phantom"] = "real" if found else "phantom"
    root = result_root(profile, kind)
    folder = found or _phantom_folder(root)
    sets = root / "dataset" / "dataset_variables"
    source = _fingerprint(folder)
    prepared = read_json(sets / "prepared.json") if (sets / "prepared.json").is_file() else {}
    if again or prepared.get("source") != source:
        prepared = prepare_workspace(folder, sets, source)
    place = "the repository" if root == result_root("cpu", "real") else root.name
    print(
        f"data: {kind} · profile: {profile} · {prepared['images']:,} images, "
        f"{prepared['people']} patients · results under {place}"
    )
    return Workspace(root, kind, profile, folder, prepared["cohort_sha256"])


def holds_records(profile: str) -> bool:
    """Whether the repository holds a network's record of this profile."""
    return profile != "demo" and any(
        record.profile == profile and record.model in MODELS
        for record in records.read_records(ROOT).values()
    )


def _phantom_folder(root: Path) -> Path:
    folder = root / "dataset" / "raw_dataset"
    if not (folder / "people.csv").is_file():
        phantom.write_phantom(folder)
    return folder


def _fingerprint(folder: Path) -> list:
    """Cheap, and enough to notice other data: name, size and age of the archive, or the number of
    files of a folder."""
    status = folder.stat()
    inside = sum(1 for _ in folder.rglob("*")) if folder.is_dir() else status.st_size
    return [folder.name, inside, int(status.st_mtime)]


def prepare_workspace(folder: Path, sets: Path, source: list) -> dict:
    """Recovers the cohort from the images and writes the tensors of both protocols; returns what
    `prepared.json` then says of them."""
    raw = read_raw(folder)
    cohort = cohort_for(raw, cache=sets / "cohort.csv")
    folds = data.folds_for(cohort, sets / "folds.csv")
    write_cohort(cohort, sets / "cohort.csv")
    data.prepare(raw, cohort, folds, sets)
    prepared = {
        "source": source,
        "images": len(cohort.label),
        "people": len(data.patients_of(cohort)[0]),
        "cohort_sha256": data.file_sha256(sets / "cohort.csv"),
    }
    # Written last: its presence says that everything above is complete.
    write_json(sets / "prepared.json", prepared)
    return prepared


def load_sets(workspace: Workspace, config: RunConfig) -> dict[str, data.ImageSet]:
    """Training, validation and test set of a run."""
    return data.load_sets(
        workspace.sets,
        config.protocol,
        config.fold,
        max_train=config.max_train,
        max_test=config.max_test,
    )


def half_of(checkpoint: Path) -> Path:
    """Where a checkpoint's fp16 copy is, the one kind of weights that git keeps."""
    return checkpoint.with_name(f"{checkpoint.stem}_fp16.safetensors")


def results_root(profile: str, raw: str | Path | None = None) -> Path:
    """Where a profile's records are, without touching the data: those of this machine's data, or of
    the phantom; where there are none, the repository itself if it holds some of this profile."""
    root = result_root(profile, "real" if find_raw(raw or None) else "phantom")
    return root if records.read_records(root) or not holds_records(profile) else ROOT


# --- Several processes of one training (torchrun) -----------------------------------------------


def process_count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_leader() -> bool:
    """Whether this process is the one that attacks, explains and writes the record."""
    return not int(os.environ.get("RANK", 0))
