"""The workspace: where data, checkpoints and results of a profile and a cohort are."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils import data, phantom, within
from utils.backbones import read_metadata
from utils.cohort.raw import find_raw, read_raw
from utils.cohort.table import (
    COMMITTED_COHORT,
    build_cohort,
    cohort_identity,
    known_cohort,
    write_cohort,
)
from utils.config import Profile, RunConfig
from utils.evaluation import records
from utils.manifest.table import MANIFESTS, files_of, read_manifest, sidecar
from utils.training.settings import TRAIN_AGAIN
from utils.utils_funcs import (
    MODELS,
    ROOT,
    files_below,
    read_json,
    result_root,
    runs_folder,
    set_up_process,
    short_name,
    write_json,
)

#: Version of the files that `prepare_workspace` writes; others are made anew.
PREPARED_FORMAT = 3


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
        return sets_folder(self.root)

    def checkpoint(self, config: RunConfig) -> Path:
        """The file of a run's trained weights."""
        folder = self.root / "checkpoints" / config.model / config.protocol
        return folder / f"{config.run_name}.safetensors"

    def state(self, config: RunConfig) -> Path:
        """The folder of everything that lets a run continue after it was stopped."""
        return self.checkpoint(config).with_suffix("")

    def weights(self, config: RunConfig) -> Path | None:
        """The run's checkpoint, or else the fp16 copy of it that git keeps; None where neither is
        on this machine.

        Raises:
            UserError: it was trained on another cohort.
        """
        checkpoint = self.checkpoint(config)
        path = next((kept for kept in (checkpoint, half_of(checkpoint)) if kept.is_file()), None)
        if path is not None:
            found = read_metadata(path).get("cohort_sha256")
            data.check_cohort(found, self.cohort_sha256, path, TRAIN_AGAIN)
        return path

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
    """Finds the data, prepares the tensors of both protocols where they are missing or any file has
    changed since, and prints what it found. Without any data it draws the phantom cohort, and
    everything that it touches says `data: phantom`. The process is set up for computing
    (`set_up_process`).

    Results of the published data set go where `result_root` says, those of any other cohort to
    `runs/<profile>-<first 8 digits of its identity>/`.

    Args:
        raw: folder or zip of class folders (None: see `utils.cohort.find_raw`).
        again: prepare the tensors even if they are there.
        records: where there are no images and the repository holds records of this profile, go
            without images and show these records.
    """
    set_up_process()
    found = find_raw(raw or None)
    committed = data.file_sha256(COMMITTED_COHORT)
    if found is None and records and holds_records(profile):
        print(
            f"data: real · profile: {profile} · no images here, so what the committed records hold "
            "is shown"
        )
        return Workspace(ROOT, "real", profile, None, committed)
    kind: Literal["real", "phantom"] = "real" if found else "phantom"
    folder = found or _phantom_folder(result_root(profile, kind))
    source = files_sha256(folder)
    prepared = None if again else find_prepared(profile, kind, source)
    if prepared is None:
        prepared = prepare_workspace(profile, kind, folder, source)
    root = root_of(profile, kind, prepared["cohort_sha256"])
    place = "the repository" if root == ROOT else root.name
    known = (
        ""
        if prepared["cohort_sha256"] == committed
        else (f"cohort {short_name(prepared['cohort_sha256'])} · ")
    )
    print(
        f"data: {kind} · profile: {profile} · {known if kind == 'real' else ''}"
        f"{prepared['images']:,} images, {prepared['patients']} patients · results under {place}"
    )
    return Workspace(root, kind, profile, folder, prepared["cohort_sha256"])


def root_of(profile: str, kind: str, cohort_sha256: str) -> Path:
    """The folder of the results of a profile on a cohort."""
    published = kind == "phantom" or cohort_sha256 == data.file_sha256(COMMITTED_COHORT)
    return result_root(profile, kind if published else short_name(cohort_sha256))


def find_prepared(profile: str, kind: str, source: str) -> dict | None:
    """What `prepared.json` says of the tensors that were made from the files `source`; None where
    there are none, or they were made by an older version of this project."""
    roots = [result_root(profile, kind)]
    if kind == "real":
        roots += sorted(runs_folder().glob(f"{profile}-{'[0-9a-f]' * 8}"))
    for root in roots:
        path = sets_folder(root) / "prepared.json"
        prepared = read_json(path) if path.is_file() else {}
        wanted = {"format": PREPARED_FORMAT, "source": source}
        fits = all(prepared.get(name) == value for name, value in wanted.items())
        fits = fits and data.is_complete(sets_folder(root))
        if fits and root_of(profile, kind, prepared["cohort_sha256"]) == root:
            return prepared
    return None


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


def files_sha256(source: Path) -> str:
    """SHA-256 of the relative path, size and time of change of every file of a folder, of one file,
    or of a manifest and every file that it names: cheap, and different once an image is moved,
    replaced or edited."""
    base = source if source.is_dir() else source.parent
    paths = set(files_below(source)) if source.is_dir() else {source}
    if source.suffix.lower() in MANIFESTS and source.is_file():
        paths |= files_of(read_manifest(source)) | ({sidecar(source)} & set(base.iterdir()))
    digest = hashlib.sha256()
    for path in sorted(paths):
        name, status = os.path.relpath(path, base), path.stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def prepare_workspace(profile: str, kind: str, folder: Path, source: str) -> dict:
    """Recovers the cohort from the images and writes the tensors of both protocols where results of
    this cohort go; returns what `prepared.json` then says of them."""
    raw = read_raw(folder)
    cohort = known_cohort(raw, known_tables(profile, kind)) or build_cohort(raw)[0]
    identity = cohort_identity(cohort)
    sets = sets_folder(root_of(profile, kind, identity))
    # The tensors are complete only with it, and a killed preparation must not leave the old one.
    (sets / "prepared.json").unlink(missing_ok=True)
    write_cohort(cohort, sets / "cohort.csv")
    data.prepare(raw, cohort, data.folds_for(cohort, sets / "folds.csv"), sets)
    prepared = {
        "format": PREPARED_FORMAT,
        "source": source,
        "images": len(cohort.label),
        "patients": len(data.patients_of(cohort)[0]),
        "cohort_sha256": identity,
    }
    write_json(sets / "prepared.json", prepared)
    return prepared


def known_tables(profile: str, kind: str) -> list[Path]:
    """Where this machine may have a table of the cohort already."""
    folders = [result_root(profile, kind), *sorted(runs_folder().glob(f"*-{'[0-9a-f]' * 8}"))]
    return [COMMITTED_COHORT, *(sets_folder(folder) / "cohort.csv" for folder in folders)]


def load_sets(workspace: Workspace, config: RunConfig) -> dict[str, data.ImageSet]:
    """Training, validation and test set of a run."""
    if config.protocol in ("within", "within_permuted"):
        return within.load_sets(
            workspace.sets,
            config.fold,
            permuted=config.protocol == "within_permuted",
            cohort_sha256=workspace.cohort_sha256,
            max_train=config.max_train,
            max_test=config.max_test,
        )
    return data.load_sets(
        workspace.sets,
        config.protocol,
        config.fold,
        cohort_sha256=workspace.cohort_sha256,
        max_train=config.max_train,
        max_test=config.max_test,
    )


def sets_folder(root: Path) -> Path:
    """Where the prepared tensors of the results under `root` are."""
    return root / "dataset" / "dataset_variables"


def half_of(checkpoint: Path) -> Path:
    """Where a checkpoint's fp16 copy is, the one kind of weights that git keeps."""
    return checkpoint.with_name(f"{checkpoint.stem}_fp16.safetensors")


def results_root(profile: Profile, raw: str | Path | None = None) -> Path:
    """Where a profile's records are: those of this machine's data, or of the phantom; where there
    are no images, the repository itself if it holds some of this profile."""
    phantom = result_root(profile, "phantom")
    if find_raw(raw or None) is None and records.read_records(phantom):
        return phantom  # a run of one's own goes before the committed ones
    return open_workspace(profile, raw, records=True).root


# --- Several processes of one training (torchrun) -----------------------------------------------


def process_count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_leader() -> bool:
    """Whether this process is the one that attacks, explains and writes the record."""
    return not int(os.environ.get("RANK", 0))
