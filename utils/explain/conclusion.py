"""What may and what may not be concluded from the maps, as one sentence a question."""

from __future__ import annotations

from collections.abc import Mapping

from utils.explain.randomization import SANITY_LIMIT
from utils.explain.tables import (
    FAITHFUL,
    NOTHING,
    REGIONS,
    attacks_on_prediction,
    eps_text,
    methods_of,
    shown,
)

#: Two maps are alike from this top-20% IoU on (0.11 is chance): below it, most of what a reader
#: would point at has moved.
ALIKE = 0.5
#: With fewer patients than this an interval is itself uncertain, and a verdict is called a hint.
FEW_PATIENTS = 20
#: A wider interval of a share of the map says little about where the map lies.
WIDE = 0.2
#: A smaller difference between a share and the region's area is no preference, however certain.
NOTABLE = 0.01

#: Where a sentence is listed → title of the list and what it says when it is empty.
HEADINGS = {
    "may": ("What may be concluded", "- nothing"),
    "may not": ("What may not be concluded", "- no limit was found by these measures"),
    "undecided": ("Undecided by these numbers", "- nothing"),
}

#: (key of `HEADINGS`, the sentence).
Verdict = tuple[str, str]


def explanation_conclusion(numbers: Mapping[str, dict]) -> str:
    """The numbers of `explanation_record` as sentences under three headings, in Markdown.

    Every sentence follows from one number and its 95% interval, and cites both. Where the interval
    holds both answers, or the number is missing, it is listed as undecided. With fewer than
    `FEW_PATIENTS` patients it is called a hint.
    """
    methods = methods_of(numbers)
    if not methods:
        return NOTHING
    lines: dict[str, list[str]] = {heading: [] for heading in HEADINGS}
    for method, topics in methods.items():
        for heading, sentence in _verdicts(topics):
            lines[heading].append(f"- {method}: {sentence}")
    lists = []
    for heading, (title, empty) in HEADINGS.items():
        lists.append("\n".join([title, *(lines[heading] or [empty])]))
    return "\n\n".join(lists)


def _verdicts(topics: dict) -> list[Verdict]:
    """Every sentence about the maps of one method."""
    checks = [
        _about_faithfulness(topics.get("faithfulness", {})),
        _about_randomization(topics.get("randomisation", {})),
    ]
    trusted = all(heading == "may" for heading, _ in checks)
    anatomy = topics.get("anatomy", {})
    regions = [_about_region(region, anatomy, trusted=trusted) for region in REGIONS]
    attacks = [
        _about_similarity(similarity.get("iou_top20"), f"an attack on the prediction at eps {eps}")
        for eps, similarity in attacks_on_prediction(topics).items()
    ] or [("undecided", "whether the map is stable under attacks on the prediction: not measured.")]
    moved = topics.get("explanation attack", {})
    on_the_map = _about_similarity(
        moved.get("iou_top20"),
        f"an attack on the map itself that keeps the prediction ({eps_text(moved)})",
    )
    return [*checks, *regions, *attacks, on_the_map, _about_patients(anatomy)]


def _about_faithfulness(faithful: dict) -> Verdict:
    unknown: dict = {"value": None}
    gains = {name: faithful.get(name, {}).get("beyond_random", unknown) for name in FAITHFUL}
    if any(gain["value"] is None for gain in gains.values()):
        return (
            "undecided",
            "whether the map shows what the model uses: faithfulness was not measured slice by "
            "slice against random maps.",
        )
    better: list[str] = []
    others: list[str] = []
    for name, gain in gains.items():
        cited = f"{'ROAD' if name == 'road' else name} {_difference(gain)}"
        (better if gain["ci"][0] > 0 else others).append(cited)
    hint = _hint(gains["insertion"])
    if not others:
        return (
            "may",
            "the pixels that the map marks matter more to the prediction than those of a random "
            f"map: better by {', '.join(better)}{hint}.",
        )
    but = f", although better by {', '.join(better)}" if better else ""
    return (
        "may not",
        "that the map shows what the model uses: it is not better than a random map by "
        f"{', '.join(others)}{but}{hint}.",
    )


def _about_randomization(check: dict) -> Verdict:
    stages = check.get("stages")
    first: dict = stages[min(stages)] if stages else {"value": None}
    if first["value"] is None:
        return (
            "undecided",
            "whether the map depends on what was learned: not checked with a random last layer.",
        )
    cited = f"rank correlation {shown(first)}, limit {SANITY_LIMIT}{_hint(first)}"
    if first["value"] >= SANITY_LIMIT:
        return (
            "may not",
            "that the map shows what the model learned: it hardly changes when the last layer is "
            f"random ({cited}).",
        )
    if first["ci"][1] >= SANITY_LIMIT:
        return (
            "undecided",
            "whether the map depends on what was learned: it changes on average when the last "
            f"layer is random, but the interval reaches the limit ({cited}).",
        )
    return (
        "may",
        "the map depends on what the last layer learned: it is another one when that layer is "
        f"random ({cited}).",
    )


def _about_region(region: str, anatomy: dict, *, trusted: bool) -> Verdict:
    """Where the map lies is a fact about the map. It is one about the model only if the map passed
    both checks (`trusted`)."""
    share, words = anatomy.get(region, {}), REGIONS[region]
    beyond = share.get("beyond_area")
    if beyond is None or beyond["value"] is None:
        return (
            "undecided",
            f"how much of the map lies in the {words}: not measured against the region's area.",
        )
    cited = (
        f"share {shown(share)}, area {anatomy[f'{region}_area']['value']:.2f}, "
        f"difference {_difference(beyond, 2)}{_hint(beyond)}"
    )
    low, high = beyond["ci"]
    if low <= 0 <= high:
        return "undecided", f"whether the map prefers or avoids the {words} ({cited})."
    if abs(beyond["value"]) < NOTABLE:
        return (
            "may not",
            f"that the map prefers or avoids the {words}: the difference is less than {NOTABLE} "
            f"({cited}).",
        )
    prefers, anatomical = low > 0, region in ("brain", "csf")
    if anatomical and not prefers:
        return (
            "may not",
            f"that the map points at the {words}: it has less there than an even map ({cited}).",
        )
    if prefers and not anatomical:
        return (
            "may not",
            f"that the map shows anatomy alone: it prefers the {words} ({cited}).",
        )
    verb = "prefer" if prefers else "avoid"
    if trusted:
        return "may", f"the map {verb}s the {words} ({cited})."
    return (
        "may not",
        f"that the model {verb}s the {words}: the map does ({cited}), but it did not pass both "
        "checks above.",
    )


def _about_similarity(overlap: dict | None, attack: str) -> Verdict:
    if overlap is None or overlap["value"] is None:
        return "undecided", f"whether the map stays in place under {attack}: not measured."
    cited = f"top-20% IoU {shown(overlap)}, alike from {ALIKE}{_hint(overlap)}"
    if overlap["ci"][1] < ALIKE:
        return "may not", f"that the map is stable: {attack} moves most of its top ({cited})."
    if overlap["ci"][0] >= ALIKE:
        return "may", f"the map stays in place under {attack} ({cited})."
    return "undecided", f"whether the map stays in place under {attack} ({cited})."


def _about_patients(anatomy: dict) -> Verdict:
    """Whether the place of the map is known well enough, by its region with the widest interval."""
    widths = {
        region: share["ci"][1] - share["ci"][0]
        for region in REGIONS
        if (share := anatomy.get(region)) and share["value"] is not None
    }
    if not widths:
        return "undecided", "where the map lies: no share of a region was measured."
    region = max(widths, key=lambda region: widths[region])
    share, width = anatomy[region], widths[region]
    cited = (
        f"{share['n_people']} patients, widest interval {width:.2f} "
        f"({REGIONS[region]}, {shown(share)})"
    )
    if share["n_people"] < FEW_PATIENTS or width > WIDE:
        return (
            "may not",
            "where the maps of patients in general lie: too few patients or too wide an interval "
            f"({cited}).",
        )
    return (
        "may",
        f"where the map lies is known to within {width:.2f} of its mass for patients like these "
        f"({cited}).",
    )


def _hint(block: dict) -> str:
    few = block["n_people"] < FEW_PATIENTS
    return f"; only a hint, n = {block['n_people']} patients" if few else ""


def _difference(block: dict, digits: int = 3) -> str:
    """A difference with its interval, both with signs."""
    low, high = block["ci"]
    return f"{block['value']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
