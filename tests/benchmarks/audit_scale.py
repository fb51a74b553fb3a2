"""How time and memory of the people's recovery grow with the number of images.

    python tests/benchmarks/audit_scale.py [--raw RAW] [--multiples 1 3 10 30] [--whole 10] [--out
    audit_scale.txt]

The cohort's feature arrays (`cohort.features` at the search size, synthetic images included) stand
for a larger set again and again: every copy shuffles the features in its own way, which keeps all
correlations inside a copy and makes other people of it. Each size runs in a process of its own; its
peak memory counts everything, the interpreter too. Without RAW the phantom cohort takes the real
one's place. `--whole N` also measures the whole command, from N times as many drawn JPEG files to
`cohort.csv`, and compares the people it finds with the true ones."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import cohort as c  # noqa: E402


def make_features(raw: str | None, path: Path) -> None:
    if raw is None:
        from utils.phantom import write_phantom

        raw = str(
            write_phantom(
                path.parent / "phantom",
                patients=(100, 70, 28, 2),
                size=64,
                synthetic=4937,
                duplicates=182,
            )
        )
    images = c.read_raw(raw).images
    kept = c.first_of_each(
        np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images])
    )[0]
    images = [images[i] for i in kept]
    np.savez(path, vectors=c.features(images), levels=c.background(images))


def draw(raw: Path, multiple: int) -> None:
    """A drawn cohort `multiple` times the size of the real one."""
    from utils.phantom import write_phantom

    write_phantom(
        raw,
        patients=tuple(multiple * count for count in (100, 70, 28, 2)),
        size=128,
        synthetic=4937 * multiple,
        duplicates=182 * multiple,
        seed=1,
    )


def measure(path: Path, multiple: int) -> dict:
    with np.load(path) as file:
        vectors, levels = file["vectors"], file["levels"]
    rng = np.random.default_rng(0)
    many = np.empty((multiple * len(vectors), vectors.shape[1]), np.float32)
    for k in range(multiple):
        many[k * len(vectors) : (k + 1) * len(vectors)] = vectors[
            :, rng.permutation(vectors.shape[1])
        ]
    del vectors
    start, cpu = time.monotonic(), time.process_time()
    patients = c.find_patients(many, np.tile(levels, multiple))
    seconds, cpu = time.monotonic() - start, time.process_time() - cpu
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return {
        "images": len(many),
        "people": int(patients.patient.max()) + 1,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30,
    }


def whole(multiple: int) -> str:
    """Time and peak memory of `python -m utils.cohort` on a drawn cohort N times the size of the
    real one."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        # In a process of its own, like all that is large here: a child inherits its parent's peak
        # memory.
        subprocess.run(
            [sys.executable, __file__, "--draw", str(raw), "--whole", str(multiple)], check=True
        )
        out, start = Path(folder) / "cohort.csv", time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "utils.cohort", str(raw), "--out", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).resolve().parents[2],
        )
        _, status, usage = os.wait4(process.pid, 0)  # of this child alone
        seconds = time.monotonic() - start
        if status:
            raise SystemExit(
                f"python -m utils.cohort ended with {os.waitstatus_to_exitcode(status)}"
            )
        truth = {row["path"]: row for row in _rows(raw / "people.csv")}
        found = _rows(out)
        groups: dict[str, set[str]] = {}
        for path, row in zip(sorted(truth), found, strict=True):
            if truth[path]["kind"] == "real":
                groups.setdefault(truth[path]["person"], set()).add(row["patient_id"])
        whole_patients = [
            next(iter(ids)) for ids in groups.values() if len(ids) == 1 and "" not in ids
        ]
    gib = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
    return (
        f"the whole command, from {len(found):,} drawn JPEG files of 128 px to cohort.csv: "
        f"{seconds:,.0f} s, peak {gib:.2f} GiB; {len(set(whole_patients)):,} of {len(groups):,} "
        f"patients exact, {len({row['patient_id'] for row in found} - {''}) - len(groups)} found "
        "beyond them"
    )


def _rows(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict], extrapolated: list[int], base: int) -> str:
    # Processor seconds: other work on the machine does not lengthen them.
    size, seconds, memory = (
        np.array([row[name] for row in rows]) for name in ("images", "cpu_seconds", "gib")
    )
    lines = [
        "times |  images | people |  seconds | processor seconds | peak GiB |",
        "-----:|--------:|-------:|---------:|------------------:|---------:|---------",
    ]
    for row in rows:
        lines.append(
            f"{row['images'] // base:5d} | {row['images']:7,d} | {row['people']:6,d} | "
            f"{row['seconds']:8.1f} | {row['cpu_seconds']:17.1f} | {row['gib']:8.2f} | measured"
        )
    if len(rows) > 1:
        exponent, scale = np.polyfit(np.log(size), np.log(seconds), 1)
        slope, start = np.polyfit(size, memory, 1)
        for multiple in extrapolated:
            n = multiple * base
            # Beyond the measured sizes the quadratic part rules: the last row is carried on with
            # exponent 2.
            lines.append(
                f"{multiple:5d} | {n:7,d} |      – |        – | "
                f"{seconds[-1] * (n / size[-1]) ** 2:17.0f} | {start + slope * n:8.2f} | "
                "extrapolated (time with exponent 2 from the last row, memory on the fitted line)"
            )
        lines += [
            "",
            f"processor time grows with the {exponent:.2f}th power of the number of images "
            "(all pairs are compared: 2 in the limit); "
            f"memory grows by {slope * 2**20:.1f} KiB an image, linearly",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--raw", default=os.environ.get("ALZHEIMER_RAW"))
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 3, 10])
    parser.add_argument("--extrapolate", type=int, nargs="*", default=[30])
    parser.add_argument("--whole", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--features", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["ALZHEIMER_QUIET"] = "1"
    if options.features:
        make_features(options.raw, options.features)
        return
    if options.draw:
        draw(options.draw, options.whole)
        return
    if options.one:
        print(json.dumps(measure(options.one, options.multiples[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npz"
        subprocess.run(
            [
                sys.executable,
                __file__,
                "--features",
                str(path),
                *(["--raw", options.raw] if options.raw else []),
            ],
            check=True,
        )
        rows = []
        for multiple in options.multiples:
            command = [sys.executable, __file__, "--one", str(path), "--multiples", str(multiple)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout))
            print(rows[-1], file=sys.stderr, flush=True)
    threads = os.environ.get("OMP_NUM_THREADS", "as many")
    text = (
        f"{os.cpu_count()} cores, threads: {threads}; the search for patients alone, features "
        "given\n\n" + table(rows, options.extrapolate, rows[0]["images"] // options.multiples[0])
    )
    if options.whole:
        text += f"\n\n{whole(options.whole)}"
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
