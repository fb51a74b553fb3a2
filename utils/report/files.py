"""Draws every figure that a record allows and writes it to its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from utils.audit import figures
from utils.drawing import save_figure
from utils.evaluation.records import (
    Records,
    read_record,
    read_records,
    without_rehearsals,
)
from utils.evaluation.rows import TableRow, provenance, table_rows
from utils.evaluation.schema import Record
from utils.report import model_figures, result_figures, scans_and_ensembles
from utils.report.example import example_figure, example_path, read_example
from utils.report.tables import is_whole
from utils.utils_funcs import (
    MODELS,
    PROTOCOLS,
    atomic_path,
)


def draw_model_figures(root: Path | str, model: str) -> dict[Path, Figure]:
    """Writes and returns the figures of one model, path → figure; both protocols are panels of
    each."""
    records = {
        protocol: record
        for (name, protocol), record in read_records(root).items()
        if name == model and record.clean
    }
    records = without_rehearsals(records)
    drawn = {}
    for name, draw in model_figures.MODEL_FIGURES.items():
        if model_figures.has_content(name, records):
            figure = draw(model, records)
            drawn[save_figure(figure, Path(root) / "assets" / model / f"{name}.png")] = figure
    return drawn


def draw_result_figures(root: Path | str) -> dict[Path, Figure]:
    """Writes and returns the figures that compare models, path → figure."""
    records, rows = compared(without_rehearsals(read_records(root)))
    drawn = {}
    for name, draw in result_figures.RESULT_FIGURES.items():
        if name in drawable(records, rows):
            figure = draw(rows, list(records.values()))
            drawn[save_figure(figure, Path(root) / "assets" / "results" / f"{name}.png")] = figure
    return drawn


def draw_example(root: Path | str) -> dict[Path, Figure]:
    """Writes and returns README's first picture, path → figure; empty where no example is kept or
    no network was trained."""
    rows = compared(without_rehearsals(read_records(root)))[1]
    if not example_path(root).is_file() or not any(row.trained for row in rows):
        return {}
    figure = example_figure(read_example(example_path(root)), rows)
    path = example_path(root).with_suffix(".png")
    return {save_figure(figure, path, dpi=110): figure}


def compared(records: Records) -> tuple[Records, list[TableRow]]:
    """What the figures that compare models show: no rows that count patients, which have figures of
    their own (`scans_and_ensembles`), and no rows that lack folds among those of all patients."""
    rows = [
        row
        for row in table_rows(records)
        if not row.counts_patients and (is_whole(row) or not row.trained)
    ]
    kept = {row.model for row in rows}
    return {key: record for key, record in records.items() if record.model in kept}, rows


def explained_path(record: Path | str) -> Path:
    """`<protocol>_explained.npz` in the folder of `<protocol>.json`: a few slices, and a model's
    maps of them."""
    return Path(record).with_name(f"{Path(record).stem}_explained.npz")


def draw_explanations(root: Path | str) -> dict[Path, Figure]:
    """Writes and returns, for each protocol, Grad-CAM of every model on the same few slices, path →
    figure."""
    import torch  # which nothing else here needs

    from utils import grad_cam

    records, drawn = without_rehearsals(read_records(root)), {}
    for protocol in PROTOCOLS:
        explained: dict[str, dict[str, np.ndarray]] = {}
        of_protocol = []
        for record in records.values():
            if record.protocol != protocol or not record.path:
                continue
            if (path := explained_path(record.path)).is_file():
                of_protocol.append(record)
                with np.load(path, allow_pickle=False) as file:
                    explained[record.model] = {key: file[key] for key in file.files}
        if not explained:
            continue
        first = next(iter(explained.values()))
        same = {
            name: arrays
            for name, arrays in explained.items()
            if arrays["files"].tolist() == first["files"].tolist()
        }
        rows = {
            name: (
                torch.from_numpy(arrays["images"][:, None] / 255),
                torch.from_numpy(arrays["maps"] / 255),
                arrays["probabilities"],
            )
            for name, arrays in same.items()
        }
        figure = grad_cam.comparison_figure(
            rows,
            first["labels"].tolist(),
            title=f"Grad-CAM, the same slices for all models · {protocol} · "
            + provenance(of_protocol),
        )
        path = Path(root) / "assets" / "results" / f"explanations_{protocol}.png"
        drawn[save_figure(figure, path, dpi=100, colors=192)] = figure
    return drawn


def drawable(records: Records, rows: list[TableRow]) -> list[str]:
    """The study figures that these records have something for."""
    if not any(row.trained for row in rows):
        return ["headline"] if rows else []
    transfer = any(
        result_figures.transfer_cells([*records.values()], protocol) for protocol in PROTOCOLS
    )
    has = {"transfer": transfer, "confusion_matrices": any(model in MODELS for model, _ in records)}
    return [name for name in result_figures.RESULT_FIGURES if has.get(name, True)]


def draw_audit_figures(root: Path | str) -> dict[str, Figure]:
    """Writes and returns the figures of the leak audit, name → figure, from its small arrays and
    records under `root`."""
    folder = Path(root) / "assets" / "Baselines"
    found: dict[str, Record] = {
        protocol: read_record(folder / f"{protocol}.json")
        for protocol in PROTOCOLS
        if (folder / f"{protocol}.json").is_file()
    }
    drawn = figures.audit_figures(figures.read_arrays(folder), found)
    for name, figure in drawn.items():
        save_figure(figure, folder / f"{name}.png")
    return drawn


def draw_figures(root: Path | str) -> list[Path]:
    """Redraws every figure that follows from the records under `root`; returns the paths."""
    models = dict.fromkeys(model for model, _ in read_records(root))
    paths = [path for model in models for path in draw_model_figures(root, model)] + list(
        draw_result_figures(root)
    )
    paths += list(draw_example(root))
    paths += list(draw_explanations(root))
    paths += list(scans_and_ensembles.draw_figures(root))
    folder = Path(root) / "assets" / "Baselines"
    if (folder / figures.ARRAYS).is_file():
        paths += [folder / f"{name}.png" for name in draw_audit_figures(root)]
    return paths


def write_text(path: Path, text: str) -> None:
    """Writes a text atomically, in UTF-8 and with the line ends that it has."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))
