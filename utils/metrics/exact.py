"""Exact bounds of a share whose slices come in patients: what is still possible where none, or all,
were seen."""

from __future__ import annotations

import numpy as np

#: Each side of a 95 % interval may miss the truth this often.
TAIL = 0.025


def exact_interval(hits: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Exact 95 % interval (low, high), in [0, 1], of a share of slices that come in patients.

    Clopper and Pearson's binomial interval with an effective number of independent slices, chosen
    so that the binomial variance is the one seen between patients (Korn and Graubard 1998, Survey
    Methodology 24, 193-201). That number is the number of patients where all patients have the same
    share, such as 0 or 1, since nothing is known there about how much patients differ. With one
    slice a patient it is Clopper and Pearson's interval itself.

    Args:
        hits, counts: (P,) by patient: slices for which something is true, and all slices; not all
            counts 0.
    """
    from scipy.stats import beta  # here, since reading records needs no scipy

    present = counts > 0
    hits, counts = hits[present], counts[present]
    share = hits.sum() / counts.sum()
    number = _effective_number(hits, counts)
    some_true, some_false = hits.any(), (hits < counts).any()
    low = beta.ppf(TAIL, share * number, (1 - share) * number + 1) if some_true else 0.0
    high = beta.ppf(1 - TAIL, share * number + 1, (1 - share) * number) if some_false else 1.0
    return float(low), float(high)


def _effective_number(hits: np.ndarray, counts: np.ndarray) -> float:
    """How many independent slices determine a share as well as these slices of P patients do;
    hits, counts (P,)."""
    patients, total = len(counts), counts.sum()
    share = hits.sum() / total
    if np.ptp(hits / counts) < 1e-12:
        return float(patients)
    # Variance of a ratio of sums over patients (linearized).
    variance = ((hits - share * counts) ** 2).sum() / total**2 * patients / (patients - 1)
    # The slices of a patient are at best independent and at worst all alike.
    all_alike = total**2 / (counts**2).sum()
    return float(np.clip(share * (1 - share) / variance, all_alike, total))


def no_event_bound(patients: int) -> float:
    """The upper exact bound, in (0, 1), of a share that was true of none of so many patients."""
    return float(1 - TAIL ** (1 / patients))
