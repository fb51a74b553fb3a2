"""How is it told? Records → tables, figures, README; nothing here needs data, weights or a GPU.

Values are in `claims`, `notes` and `tables`, prose in `templates/`, and what joins them in `page`.
"""

from utils.report.address import repository_address, write_address
from utils.report.command import publish, recompute
from utils.report.files import (
    draw_audit_figures,
    draw_explanations,
    draw_figures,
    draw_model_figures,
    draw_result_figures,
    explained_path,
)
from utils.report.model_card import model_card, write_model_card
from utils.report.notebook import (
    checks_markdown,
    folded,
    maps_markdown,
    model_findings_markdown,
    model_scores_markdown,
    sweep_markdown,
    text_as_markdown,
)
from utils.report.original import original_markdown
from utils.report.page import (
    BEGIN,
    END,
    RESULTS_PAGE,
    findings_markdown,
    results_markdown,
    results_page,
    summary_markdown,
    write_readme,
)
from utils.report.tables import (
    ages,
    attacks_text,
    bfloat16_searches,
    checks_text,
    failed_checks,
    is_whole,
    machines,
    results_text,
    runs_text,
    scores_markdown,
)
from utils.report.within import WITHIN, read_within, within_markdown

__all__ = [
    "WITHIN",
    "read_within",
    "within_markdown",
    "text_as_markdown",
    "sweep_markdown",
    "model_scores_markdown",
    "model_findings_markdown",
    "maps_markdown",
    "folded",
    "checks_markdown",
    "BEGIN",
    "END",
    "RESULTS_PAGE",
    "ages",
    "attacks_text",
    "bfloat16_searches",
    "checks_text",
    "draw_audit_figures",
    "draw_explanations",
    "draw_figures",
    "draw_model_figures",
    "draw_result_figures",
    "explained_path",
    "failed_checks",
    "findings_markdown",
    "is_whole",
    "machines",
    "model_card",
    "original_markdown",
    "publish",
    "recompute",
    "repository_address",
    "results_markdown",
    "results_page",
    "results_text",
    "runs_text",
    "scores_markdown",
    "summary_markdown",
    "write_address",
    "write_model_card",
    "write_readme",
]
