"""README says what the records say, links to what exists, and names the repository as
pyproject.toml does."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from utils import report
from utils.backbones import load_model
from utils.evaluation.records import read_records, without_rehearsals
from utils.evaluation.rows import table_rows
from utils.utils_funcs import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
GENERATED = README.split(report.BEGIN)[1].split(report.END)[0].strip()
RESULTS = (ROOT / report.RESULTS_PAGE).read_text(encoding="utf-8")
PROSE = README.split(report.BEGIN)[0] + README.split(report.END)[1]


def test_both_pages_equal_the_records() -> None:
    records, remedy = read_records(ROOT), "run `python -m utils.report readme`"
    assert report.summary_markdown(records, ROOT) == GENERATED, remedy
    assert report.results_page(records, ROOT) == RESULTS, remedy


def test_the_first_page_is_short_and_leads_to_a_start_soon() -> None:
    assert README.count("\n") <= 220
    assert len(README) <= 16_000
    assert README.split("\n").index("## Try it") < 70


def test_findings_are_a_few_lines_each_with_a_number_an_interval_and_its_row() -> None:
    found = re.findall(r"(?m)^- \*\*.*$", GENERATED)
    assert 5 <= len(found) <= 7
    for line in found:
        assert re.search(r"-?\d+\.\d+ \[[-+]?\d+\.\d+, [-+]?\d+\.\d+\]", line), line
        assert f"]({report.RESULTS_PAGE}#" in line


def test_the_first_table_is_small() -> None:
    table = [line for line in GENERATED.split("\n") if line.startswith("| ")]
    assert 2 <= len(table) - 1 <= 10
    assert {line.count("|") - 1 for line in table} <= {*range(2, 7)}


def test_patients_and_slices_are_never_rows_of_one_headline_table() -> None:
    before, _, after = RESULTS.split("<details>")[0].partition("**Whole scans**")
    after, _, apart = after.partition("**One fold alone**")
    rows = table_rows(without_rehearsals(read_records(ROOT)))
    assert all(
        f"| {row.name} |" in apart and f"| {row.name} |" not in before + after
        for row in rows
        if not report.is_whole(row)
    )
    names = {row.name: row.counts_patients for row in rows if report.is_whole(row)}
    assert any(names.values())
    for name, counts_patients in names.items():
        assert (f"| {name} |" in before, f"| {name} |" in after) == (
            not counts_patients,
            counts_patients,
        ), name


def test_a_link_to_a_row_leads_to_that_row() -> None:
    rows = {row.number: row.name for row in table_rows(without_rehearsals(read_records(ROOT)))}
    links = re.findall(rf"\]\({report.RESULTS_PAGE}#row-(\d+)\)", GENERATED)
    assert links
    for number in links:
        assert f'<a id="row-{number}"></a>{number} | {rows[int(number)]} |' in RESULTS


@pytest.mark.parametrize("path", ["README.md", report.RESULTS_PAGE])
def test_every_relative_link_and_figure_exists(path: str) -> None:
    page = re.sub(r"(?s)```.*?```", "", (ROOT / path).read_text(encoding="utf-8"))
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)", page)
    links += re.findall(r'(?:src|href)="(?!https?://|#)([^"]+)"', page)
    assert links
    folder = (ROOT / path).parent
    assert [link for link in links if not (folder / link).exists()] == []


def test_the_examples_run(monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    examples = re.findall(r"(?s)```python\n(.*?)```", PROSE)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("model", ["Efficientnet", "Efficientnet_atk"])
def test_the_committed_models_are_those_of_the_records(model: str) -> None:
    """Of the slices shown, each file gives the probabilities that its run gave, to what half
    precision leaves."""
    network = load_model(ROOT / "checkpoints" / model / "patient" / "fold0_seed0_fp16.safetensors")
    run = next(run for run in read_records(ROOT)[model, "patient"].runs if run.fold == 0)
    assert network.name == model and network.init == run.init and run.profile != "demo"
    with np.load(ROOT / "assets" / model / "patient_explained.npz") as slices:
        images, expected = (
            torch.tensor(slices["images"])[:, None] / 255,
            torch.tensor(slices["probabilities"]),
        )
    with torch.no_grad():
        assert (network(images).softmax(1) - expected).abs().max() < 0.02


def anchors_of(page: str) -> set[str]:
    titles = re.findall(r"(?m)^#+ (.+)$", page)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles} | {
        *re.findall(r'<a id="([^"]+)">', page)
    }


def test_every_anchor_exists() -> None:
    pages = {"": README, report.RESULTS_PAGE: RESULTS}
    found = re.findall(r"\]\(([^)#]*)#([^)]+)\)", README)
    assert found
    assert [
        (page, anchor)
        for page, anchor in found
        if not page.startswith("http") and anchor not in anchors_of(pages[page])
    ] == []


def test_the_headings_of_the_description_are_there() -> None:
    for title in (
        "Project overview",
        "Structure",
        "Installation",
        "Data",
        "Model",
        "Results",
        "Usage",
        "Future work",
        "Sources and references",
        "Citation",
        "License",
    ):
        assert f"\n## {title}\n" in README


def test_badges_and_citation_follow_the_address() -> None:
    address = report.repository_address(ROOT)
    badges = re.findall(
        r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/([\w./-]+\.ipynb)", README
    )
    assert badges and {owner for owner, _ in badges} == {address}
    assert [path for _, path in badges if not (ROOT / path).is_file()] == []
    assert f'repository-code: "https://github.com/{address}"' in (ROOT / "CITATION.cff").read_text(
        encoding="utf-8"
    )
    assert (
        f"git clone https://github.com/{address}.git" in README
        and f"https://github.com/{address}}}" in README
    )


def test_every_notebook_is_linked_and_opens_in_colab() -> None:
    notebooks = [
        path.relative_to(ROOT).as_posix()
        for folder in ("models", "dataset")
        for path in (ROOT / folder).glob("*.ipynb")
    ]
    assert [path for path in notebooks if f"]({path})" not in README] == []
    badge = f"colab.research.google.com/github/{report.repository_address(ROOT)}/blob/main/"
    for path in notebooks:
        assert badge + path in (ROOT / path).read_text(encoding="utf-8")


def test_every_figure_of_a_record_exists() -> None:
    missing = [
        name
        for model, _ in read_records(ROOT)
        if (ROOT / "assets" / model / "robustness.png").exists()
        for name in ("confusion_matrix", "loss_curve", "accuracy_curve")
        if not (ROOT / "assets" / model / f"{name}.png").is_file()
    ]
    assert missing == []


def test_prose_bears_no_score() -> None:
    """Percentages outside the generated part would be results that no record bears."""
    allowed = {
        "50 %",
        "95 %",
    }  # the constant answer's accuracy, which the class counts give; the level of the intervals
    assert set(re.findall(r"\d+(?:\.\d+)? ?%", PROSE)) <= allowed


@pytest.mark.parametrize(
    "command",
    [
        "python reproduce.py",
        "python reproduce.py --test",
        "pip install -r env/requirements.txt",
        "pip install --no-deps torchattacks==3.5.1",
        "python -m utils.cohort",
        "python -m utils.report",
    ],
)
def test_readme_gives_the_commands(command: str) -> None:
    assert command in PROSE
