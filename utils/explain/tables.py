"""The record of the maps as plain tables for a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from utils.explain.faithfulness import CONTROL
from utils.explain.randomization import SANITY_LIMIT
from utils.utils_funcs import CLASSES

#: Names of the record → words of the tables.
REGIONS = {
    "brain": "brain",
    "csf": "ventricles (CSF)",
    "background": "background",
    "rim": "rim of the brain's outline",
}
FAITHFUL = {"insertion": "insertion (high)", "deletion": "deletion (low)", "road": "ROAD (high)"}
SIMILARITY = {"ssim": "SSIM", "rank_correlation": "rank correlation", "iou_top20": "top-20% IoU"}
SIZES = "n slices / n patients"
NOTHING = (
    "No explanation was measured for this run: its weights are on another machine, or its record "
    "was made without the explanation part."
)


def explanation_text(numbers: Mapping[str, dict]) -> str:
    """The numbers of `explanation_record` as tables with 95% intervals over patients and n: where
    the maps lie, faithfulness, both attacks and the randomization check. What was not measured is
    named."""
    methods = methods_of(numbers)
    if not methods:
        return NOTHING
    blocks = []
    for method, topics in methods.items():
        blocks += [
            _anatomy_table(method, topics.get("anatomy")),
            _faithfulness_table(method, topics.get("faithfulness")),
            _similarity_table(method, topics, numbers.get("prediction", {}).get("kept", {})),
        ]
    return "\n\n".join([*blocks, _randomization_table(methods)])


def methods_of(numbers: Mapping[str, dict] | None) -> dict[str, dict]:
    """method → topics: the record without `prediction`, which is about predictions under attack and
    not about a map."""
    return {method: topics for method, topics in (numbers or {}).items() if method != "prediction"}


def attacks_on_prediction(topics: Mapping[str, dict]) -> dict[str, dict]:
    """eps as text → similarity of the clean and the attacked map."""
    return {
        topic.removeprefix("attack "): similarity
        for topic, similarity in topics.items()
        if topic.startswith("attack ")
    }


def _anatomy_table(method: str, anatomy: dict | None) -> str:
    title = f"{method}: where the map lies (share of its mass; an even map has the region's area)"
    if not anatomy:
        return f"{title}\nnot measured"
    unknown: list[dict] = [{}] * len(CLASSES)
    rows = [["region", "all", "area", "share minus area", *CLASSES]]
    for region, words in REGIONS.items():
        share = anatomy.get(region, {})
        cells = (share, anatomy.get(f"{region}_area"), share.get("beyond_area"))
        rows.append([words, *map(shown, (*cells, *share.get("by_class", unknown)))])
    sized: dict = next((anatomy[region] for region in REGIONS if region in anatomy), {})
    by_class = map(sizes_text, sized.get("by_class", unknown))
    rows.append([SIZES, sizes_text(sized), "", "", *by_class])
    return f"{title}\n{aligned(rows)}"


def _faithfulness_table(method: str, faithful: dict | None) -> str:
    title = (
        f"{method}: faithfulness, compared with random maps as coarse "
        "(difference paired by slice, above 0 is better than random)"
    )
    if not faithful:
        return f"{title}\nnot measured"
    rows = [["measure", "map", "random map", "better than random by", SIZES]]
    for name, words in FAITHFUL.items():
        measure = faithful.get(name)
        gain = (measure or {}).get("beyond_random")
        cells = (measure, faithful.get(f"{name}{CONTROL}"), gain)
        rows.append([words, *(shown(cell, 3) for cell in cells), sizes_text(measure)])
    return f"{title}\n{aligned(rows)}"


def _similarity_table(method: str, topics: dict, kept: dict) -> str:
    title = (
        f"{method}: similarity of the clean and the attacked map of one class "
        "(1 is equal; IoU by chance 0.11)"
    )
    rows = [["attack", *SIMILARITY.values(), "prediction kept", SIZES]]

    def row(attack: str, similarity: dict, prediction_kept: str) -> list[str]:
        cells = [shown(similarity.get(name)) for name in SIMILARITY]
        return [attack, *cells, prediction_kept, sizes_text(similarity.get("iou_top20"))]

    attacks = attacks_on_prediction(topics)
    for eps, similarity in attacks.items():
        rows.append(row(f"on the prediction, eps {eps}", similarity, shown(kept.get(eps))))
    if not attacks:
        rows.append(["on the prediction", "not measured"])
    if moved := topics.get("explanation attack"):
        rows.append(row(f"on the map, {eps_text(moved)}", moved, "by construction"))
    else:
        rows.append(["on the map", "not measured"])
    return f"{title}\n{aligned(rows)}"


def _randomization_table(methods: Mapping[str, dict]) -> str:
    title = (
        "Randomization check: rank correlation with the map of a partly random network "
        f"(must be below {SANITY_LIMIT})"
    )
    rows = [["method", "last layer random", "everything random", SIZES, ""]]
    for method, topics in methods.items():
        stages = topics.get("randomisation", {}).get("stages")
        if not stages:
            mark = "UNKNOWN: not checked with a random last layer"
            rows.append([method, "not measured", "", "", mark])
            continue
        first, last = stages[min(stages)], stages[max(stages)]
        everything = shown(last) if len(stages) > 1 else "not measured"
        rows.append([method, shown(first), everything, sizes_text(first), _mark(method, first)])
    return f"{title}\n{aligned(rows)}"


def _mark(method: str, first: dict) -> str:
    """The result of the randomization check, from the block of its first stage."""
    if first["value"] is None:
        return "UNKNOWN: no map to compare"
    if first["value"] >= SANITY_LIMIT:
        reason = " (rollout never reads that layer)" if method == "rollout" else ""
        return (
            f"FAILS: this map hardly changes when the last layer is random{reason}: "
            "do not read it as evidence"
        )
    if first["ci"][1] >= SANITY_LIMIT:
        return "ok on average, but the interval reaches the limit"
    return "ok"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text with aligned columns; short rows are filled with blanks."""
    columns = max(map(len, rows))
    filled = [[*row, *[""] * (columns - len(row))] for row in rows]
    widths = [max(map(len, column)) for column in zip(*filled, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in filled)
    return "\n".join(line.rstrip() for line in lines)


def shown(block: dict | None, digits: int = 2) -> str:
    """A value with its interval, "none" where there is no slice, or "not measured"."""
    if not block or block.get("value") is None:
        return "none" if block and block.get("n_slices") == 0 else "not measured"
    low, high = block["ci"]
    return f"{block['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def sizes_text(block: dict | None) -> str:
    """The numbers of slices and patients behind a value."""
    return f"{block['n_slices']} / {block['n_people']}" if block else "not measured"


def eps_text(moved: dict | None) -> str:
    """The eps of the explanation attack, from its topic of the record."""
    value = (moved or {}).get("eps", {}).get("value")
    return "eps not in the record" if value is None else f"eps {round(255 * value, 2):g}/255"
