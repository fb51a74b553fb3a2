"""Memory and time of a large set on its way from files to tensors.

    python tests/benchmarks/large_set.py [--patients 2688] [--folder F] [--out large_set.txt]

Draws 86,000 JPEG files of 496 × 248 pixels (32 slices of each of 2,688 patients, phantom), the size
of the largest public set of Alzheimer slices, and runs three commands on them, each in a process of
its own whose peak memory is measured: `python -m utils.manifest`, `python -m utils.audit` and
`python -m utils.experiment prepare`. The pixels alone, decoded, are 10.6 GB."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from utils.phantom import draw_patient  # noqa: E402

FOLDERS = ("Non Demented", "Very mild Dementia", "Mild Dementia", "Moderate Dementia")
SLICES, SIZE = 32, (496, 248)


def draw(folder: Path, patient: int) -> None:
    """One patient's slices; of every ten patients five are Non, three Very mild, one each of the
    others."""
    label = (0, 0, 0, 0, 0, 1, 1, 1, 2, 3)[patient % 10]
    for place, image in enumerate(
        draw_patient(np.random.default_rng(patient), label, SLICES, (128,))
    ):
        pixels = Image.fromarray(image.clip(0, 255).astype(np.uint8)).resize(SIZE)
        pixels.save(folder / FOLDERS[label] / f"P_{patient:05d}_{place:03d}.jpg", quality=90)


def draw_all(folder: Path, patients: int) -> None:
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool() as pool:
        pool.starmap(draw, [(folder, patient) for patient in range(patients)], chunksize=8)


def measure(command: list[str], environment: dict[str, str]) -> str:
    """Runs a command; its seconds, peak memory and last line."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)  # of this child alone
        output.seek(0)
        lines = [line for line in output.read().splitlines() if line.strip()]
    if status:
        raise SystemExit("\n".join([f"{' '.join(command)} failed:", *lines[-5:]]))
    gib = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
    return f"{command[0]:<18} | {time.monotonic() - start:7,.0f} | {gib:8.2f} | {lines[-1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--patients", type=int, default=2688)
    parser.add_argument("--folder", type=Path, help="where to draw (default: a temporary folder)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        draw_all(folder / "raw", options.patients)
        environment = os.environ | {"ALZHEIMER_QUIET": "1", "ALZHEIMER_RUNS": str(folder / "runs")}
        manifest = str(folder / "manifest.csv")
        rows = [
            measure(command, environment)
            for command in (
                # As in that set, the files' names say whose they are.
                ["utils.manifest", str(folder / "raw"), "--out", manifest, "--patient", r"P_\d+"],
                ["utils.audit", manifest, "--out", str(folder / "audit.html")],
                ["utils.experiment", "prepare", "--raw", manifest],
            )
        ]
    text = "\n".join(
        [
            f"{options.patients * SLICES:,} drawn JPEG files of {SIZE[0]}×{SIZE[1]} px of "
            f"{options.patients:,} patients, {os.cpu_count()} cores",
            "",
            "command            | seconds | peak GiB | its last line",
            "-------------------|--------:|---------:|--------------",
            *rows,
        ]
    )
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
