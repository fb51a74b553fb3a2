"""Controls: what simple rules and small linear models score, so that a network has something to
beat.

A network that is no better than these has not shown that it needs its depth. `robust_linear_32` is
the control of robust accuracy: under L-infinity its worst case has a closed form, so its robust
accuracy is exact, and no attack can be too weak to find it. Settings are chosen on validation
patients, never on a test image.

images          slices with what is known of them, as rows of pixels and as a few statistics
choice          settings by cross-validation over patients
robust_linear   the linear model whose worst case is exact
answers         one function a control, and all controls one after the other
record          their record and predictions
"""

from utils.controls.answers import (
    CONTROLS,
    OF_SCANS,
    Answers,
    atrophy_scan_answers,
    control_answers,
    permuted_patients,
)
from utils.controls.choice import validation_splits
from utils.controls.images import (
    Slices,
    as_rows,
    block_means,
    intensity_statistics,
    nearest_rows,
    shrunk,
)
from utils.controls.record import baseline_record, control_runs
from utils.controls.robust_linear import (
    affine_map,
    exact_worst_images,
    fit_robust_linear,
    four_logits,
    moderate_share,
    slack,
)

__all__ = [
    "CONTROLS",
    "OF_SCANS",
    "Answers",
    "Slices",
    "affine_map",
    "as_rows",
    "atrophy_scan_answers",
    "baseline_record",
    "block_means",
    "control_answers",
    "control_runs",
    "exact_worst_images",
    "fit_robust_linear",
    "four_logits",
    "intensity_statistics",
    "moderate_share",
    "nearest_rows",
    "permuted_patients",
    "shrunk",
    "slack",
    "validation_splits",
]
