"""A patient's ordered slices as one scan: models over the sequence, and attacks on the whole scan.

A `ScanModel` maps the slices of several patients, pixels (B, S, 1, H, W) in [0, 1] with a mask
(B, S) of the slices that exist, to logits (B, 4): a frozen backbone turns each slice into features,
an aggregator reads them in body order. It is differentiable end to end, so an adversary may perturb
every slice of a scan towards another diagnosis of the *patient*. Each decision (four classes,
three, Non against the rest) is attacked separately: robustness to attacks on one decision says
nothing about another.
"""

from utils.sequence.aggregators import (
    AGGREGATOR_CLASSES,
    AGGREGATORS,
    AttentionPooling,
    MeanProbability,
    RecurrentReader,
    SmallTransformer,
    build_aggregator,
)
from utils.sequence.attacks import MOMENTUM, AttackedScan, ScanAttack, attack_scan, random_scan
from utils.sequence.budgets import robust_curve, slice_budgets, slice_gains
from utils.sequence.decisions import grouped_logits, scan_decisions, scan_labels
from utils.sequence.fitting import drop_slices, fit_aggregator, one_seeded_thread
from utils.sequence.model import ScanModel
from utils.sequence.scans import Scans, gather_scans

__all__ = [
    "AGGREGATORS",
    "AGGREGATOR_CLASSES",
    "MOMENTUM",
    "AttackedScan",
    "AttentionPooling",
    "MeanProbability",
    "RecurrentReader",
    "ScanAttack",
    "ScanModel",
    "Scans",
    "SmallTransformer",
    "attack_scan",
    "build_aggregator",
    "drop_slices",
    "fit_aggregator",
    "gather_scans",
    "grouped_logits",
    "one_seeded_thread",
    "random_scan",
    "robust_curve",
    "scan_decisions",
    "scan_labels",
    "slice_budgets",
    "slice_gains",
]
