"""Which patient and slice does each image show? Images → patients and slice order, from pixels.

raw          a data set's images in memory, with labels, splits, given ids and hashes
similarity   how alike two images are: band-passed features, correlations, nearest neighbors
linking      images linked by correlation, and the gap that separates the links of two patients
patients     groups of images that are patients; synthetic images are left out
order        a patient's slices in order along the body axis
table        `cohort.csv`, one row per image file, and the command line
"""

from utils.cohort.patients import NoPatientsError
from utils.cohort.raw import RawImages, find_raw, read_raw
from utils.cohort.table import (
    COMMITTED_COHORT,
    Cohort,
    Recovery,
    apply_cohort,
    build_cohort,
    cohort_for,
    cohort_identity,
    describe,
    main,
    read_cohort,
    write_cohort,
)
from utils.manifest.files import decode

__all__ = [
    "COMMITTED_COHORT",
    "Cohort",
    "NoPatientsError",
    "RawImages",
    "Recovery",
    "apply_cohort",
    "build_cohort",
    "cohort_for",
    "cohort_identity",
    "decode",
    "describe",
    "find_raw",
    "main",
    "read_cohort",
    "read_raw",
    "write_cohort",
]
