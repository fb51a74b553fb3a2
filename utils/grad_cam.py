"""Explanations of a classifier and how far to believe them: the names of `utils.explain`."""

from utils.explain.anatomy import anatomy_masks, anatomy_shares
from utils.explain.cells import grid_side, target_layer, upsampler
from utils.explain.conclusion import (
    ALIKE,
    FEW_PATIENTS,
    NOTABLE,
    WIDE,
    explanation_conclusion,
)
from utils.explain.faithfulness import (
    CONTROL,
    deletion_insertion,
    faithfulness,
    random_maps,
    road,
)
from utils.explain.figures import (
    comparison_figure,
    overlay_figure,
    patient_gif,
    patient_strip,
)
from utils.explain.maps import CAMS, METHODS, explain, unit_range
from utils.explain.measures import explanation_measures, explanation_record
from utils.explain.planted import planted_text
from utils.explain.randomization import SANITY_LIMIT, network_stages, randomization_check
from utils.explain.similarity import map_similarity, rank_correlation
from utils.explain.stability import cam_graph, explanation_attack
from utils.explain.tables import FAITHFUL, REGIONS, SIMILARITY, explanation_text
from utils.explain.tokens import eager_attention, map_from_tokens

__all__ = [
    "ALIKE",
    "CAMS",
    "CONTROL",
    "FAITHFUL",
    "FEW_PATIENTS",
    "METHODS",
    "NOTABLE",
    "REGIONS",
    "SANITY_LIMIT",
    "SIMILARITY",
    "WIDE",
    "anatomy_masks",
    "anatomy_shares",
    "cam_graph",
    "comparison_figure",
    "deletion_insertion",
    "eager_attention",
    "explain",
    "explanation_attack",
    "explanation_conclusion",
    "explanation_measures",
    "explanation_record",
    "explanation_text",
    "faithfulness",
    "grid_side",
    "map_from_tokens",
    "map_similarity",
    "network_stages",
    "overlay_figure",
    "patient_gif",
    "patient_strip",
    "planted_text",
    "random_maps",
    "randomization_check",
    "rank_correlation",
    "road",
    "target_layer",
    "unit_range",
    "upsampler",
]
