"""Clean and adversarial fitting of one model: losses, curriculum, checkpoints, resuming.

`fit` is the way in; `fitting` starts, resumes and finishes a training, `trainer` runs its epochs
with the `losses`, `schedule` and `validation` of their modules. One process trains, or as many as
`torchrun` starts (`processes`), with the same global batch and the same gradient.
"""

from utils.prediction import predict
from utils.training.fitting import Fit, finished_fit, fit
from utils.training.losses import (
    balanced_accuracy,
    class_weights,
    classification_loss,
    loss_of_batch,
    macro_cross_entropy,
    ordinal_targets,
)
from utils.training.precision import probe_precision
from utils.training.processes import Team
from utils.training.schedule import (
    curriculum,
    freeze_lower_layers,
    learning_rate,
    parameter_groups,
)
from utils.training.settings import different_settings, training_settings
from utils.training.trainer import Trainer
from utils.training.validation import VALIDATION_STEPS, attacked_logits, best_epoch, validate

__all__ = [
    "VALIDATION_STEPS",
    "Fit",
    "Team",
    "Trainer",
    "attacked_logits",
    "balanced_accuracy",
    "best_epoch",
    "class_weights",
    "classification_loss",
    "curriculum",
    "different_settings",
    "finished_fit",
    "fit",
    "freeze_lower_layers",
    "learning_rate",
    "loss_of_batch",
    "macro_cross_entropy",
    "ordinal_targets",
    "parameter_groups",
    "predict",
    "probe_precision",
    "training_settings",
    "validate",
]
