"""The command line: tables, figures, README, recomputation of records."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from utils.config import PROFILES
from utils.evaluation.records import (
    read_records,
    summarize,
    write_record,
)
from utils.report.address import write_address
from utils.report.files import draw_figures
from utils.report.page import write_readme
from utils.report.tables import results_text
from utils.report.within import read_within, within_markdown
from utils.utils_funcs import (
    ROOT,
    UserError,
    atomic_path,
    result_root,
)


def publish(run: Path | str, destination: Path | str = ROOT) -> list[Path]:
    """Copies the records, figures and executed notebooks of a run on real data to the committed
    places, then redraws what compares models and rewrites README. Everything is checked before
    anything is copied.

    Returns:
        the paths that were written.

    Raises:
        UserError: nothing to publish, phantom data, or a committed record of a higher profile would
            be replaced.
    """
    run, destination = Path(run), Path(destination)
    records, committed = read_records(run), read_records(destination)
    if not records:
        raise UserError(
            f"{run} holds no records; make them with `python reproduce.py` and ALZHEIMER_RAW set "
            "to the real images."
        )
    rank = list(PROFILES).index
    for record in records.values():
        _ = record.predictions  # refuses a record whose predictions are missing or damaged
    for key, record in records.items():
        if record.data != "real":
            raise UserError(
                f"{record.path} is of {record.data} data; only results on real data are published."
            )
        if key in committed and rank(committed[key].profile) > rank(record.profile):
            raise UserError(
                f"{committed[key].path} is of profile {committed[key].profile}, which a run of "
                f"profile {record.profile} must not replace; publish a run of that profile or a "
                "higher one."
            )
    files = [
        path
        for model in dict.fromkeys(model for model, _ in records)
        for path in sorted((run / "assets" / model).iterdir())
        if path.suffix in (".json", ".npz", ".png", ".gif")
    ]
    files += [*sorted(run.glob("models/*.ipynb")), *sorted(run.glob("dataset/*.ipynb"))]
    for path in files:
        with atomic_path(destination / path.relative_to(run)) as temporary:
            shutil.copyfile(path, temporary)
    return (
        [destination / path.relative_to(run) for path in files]
        + draw_figures(destination)
        + [write_readme(destination)]
    )


def recompute(root: Path | str = ROOT) -> list[Path]:
    """Scores every record under `root` again from its predictions and rewrites it; returns the
    paths. What was run stays as it was: only scores and intervals follow the code."""
    paths = []
    for record in read_records(root).values():
        if record.path:
            summary = summarize(record.predictions, record.metas)
            write_record(record.path, summary, record.predictions)
            paths.append(record.path)
    return paths


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; `arguments` in place of those that Python was started with."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command",
        choices=("figures", "readme", "table", "within", "recompute", "address", "publish"),
    )
    parser.add_argument(
        "--root", type=Path, help="tree that holds assets/ (for publish: the run to publish)"
    )
    options = parser.parse_args(arguments)
    root = options.root or (result_root("demo", "real") if options.command == "publish" else ROOT)
    if not root.is_dir():
        sys.exit(f"error: {root} is not a folder: give --root the tree that holds assets/.")
    try:
        if options.command == "table":
            print(results_text([*read_records(root).values()]))
            return
        if options.command == "within":
            print(within_markdown(read_within(root)))
            return
        written = {
            "figures": draw_figures,
            "recompute": recompute,
            "readme": lambda tree: [write_readme(tree)],
            "address": write_address,
            "publish": publish,
        }[options.command](root)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(*written, sep="\n") if written else print("Nothing to write.")
