"""How is a model attacked? Perturbations of images in pixel space, by name in `ATTACKS`.

    adversarial = ATTACKS["pgd"](model, images, labels, 4 / 255, steps=50)

Each module below registers attacks; `steps` and `ascent` are what the gradient attacks are made of,
`training` is the attack inside adversarial training. A new attack is a function decorated with
`register` in a module that is added to the list of imports here.
"""

# ATTACKS lists the attacks in the order in which these modules register them.
# isort: off
from utils.attacks.base import ATTACKS, Attack, AttackError, register
from utils.attacks import gradient  # noqa: F401
from utils.attacks import auto  # noqa: F401
from utils.attacks import minimal  # noqa: F401
from utils.attacks import black_box  # noqa: F401
from utils.attacks import regional  # noqa: F401

# isort: on
from utils.attacks.training import perturb_for_training

__all__ = ["ATTACKS", "Attack", "AttackError", "perturb_for_training", "register"]
