"""What the path of an image says: its split, its class folder, and a folder of its subject."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from utils.utils_funcs import UserError

#: Folder name, in lower case → split.
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}

#: Folder name, letters alone and in lower case → class: the names of the copies in circulation.
CLASS_NAMES = {
    f"{degree}{noun}": number
    for number, degrees in enumerate((("non", "no"), ("verymild",), ("mild",), ("moderate",)))
    for degree in degrees
    for noun in ("demented", "dementia", "impairment", "impaired", "")
    if noun or degree != "no"  # that is half of yes and no
}
#: Other ordered ratings in circulation, letters alone and in lower case, from healthy to ill.
RATINGS = (
    ("cn", "smc", "emci", "mci", "lmci", "ad"),
    ("nc", "smc", "emci", "mci", "lmci", "ad"),
    ("nondemented", "converted", "demented"),
    ("normal", "mci", "ad"),
    ("healthy", "mci", "ad"),
)


def class_of_folder(folder: str) -> int | None:
    """The class, 0 to 3, that a folder's name means; None where it is none of the known names."""
    return CLASS_NAMES.get(re.sub(r"[^a-z]", "", folder.lower()))


def in_order(names: Iterable[str]) -> tuple[tuple[str, ...], bool]:
    """Class names in the order of what they mean, and whether they are ratings that have one; other
    names are sorted."""
    unsorted = set(names)
    known = {name: class_of_folder(name) for name in unsorted}
    if None not in known.values() and len(set(known.values())) == len(known):
        return tuple(sorted(unsorted, key=lambda name: known[name] or 0)), len(known) > 1
    plain = {name: re.sub(r"[^a-z]", "", name.lower()) for name in unsorted}
    for rating in RATINGS:
        if 2 <= len(plain) == len(set(plain.values()) & set(rating)):
            return tuple(sorted(unsorted, key=lambda name: rating.index(plain[name]))), True
    return tuple(sorted(unsorted)), False


@dataclass(frozen=True)
class Place:
    """What a path says of its image.

    Attributes:
        path: without the folders that all paths share above their splits and classes.
        split: `train`, `validation`, `test`, or empty.
        folder: the class folder as it is written; empty where there is none.
        subject: the folder of the image's subject; empty where there is none.
    """

    path: str
    split: str
    folder: str
    subject: str


def places_of(names: Sequence[str]) -> list[Place]:
    """What each path says.

    Splits may stand above classes or below them. The class folder is the lowest one of a known
    name; where no path has any, classes are told from subjects by how folders lie in each other.

    Args:
        names: paths of image files, with `/`.

    Raises:
        UserError: two levels of folders could both be the classes.
    """
    folders = [name.split("/")[:-1] for name in names]
    levels = [[part for part in parts if part.lower() not in SPLITS] for parts in folders]
    if any(class_of_folder(part) is not None for parts in levels for part in parts):
        chosen = [_last_known(parts) for parts in levels]
    else:
        chosen = _chosen_levels(levels)
    places, outer = [], []
    for name, parts, rest, level in zip(names, folders, levels, chosen, strict=True):
        folder = rest[level] if level is not None else ""
        split = next((SPLITS[part.lower()] for part in parts if part.lower() in SPLITS), "")
        below = rest[level + 1 :] if level is not None else []
        above = [n for n, part in enumerate(parts) if part == folder or part.lower() in SPLITS]
        outer.append(parts[: min(above, default=len(parts))])
        places.append(Place(name, split, folder, below[0] if below else ""))
    shared = len(os.path.commonprefix(outer))
    return [replace(place, path="/".join(place.path.split("/")[shared:])) for place in places]


def _last_known(parts: Sequence[str]) -> int | None:
    """Which of a path's folders is its class: the lowest of a known name, else the lowest."""
    known = [level for level, part in enumerate(parts) if class_of_folder(part) is not None]
    return known[-1] if known else len(parts) - 1 if parts else None


def _chosen_levels(levels: Sequence[list[str]]) -> list[int | None]:
    """Which of each path's folders is its class, where no name is known."""
    shared = len(os.path.commonprefix(list(levels)))
    deepest = max((len(parts) for parts in levels), default=0) - shared
    # Where all images are in one folder, that is their class.
    level = max(shared - 1, 0) if deepest == 0 else shared
    if deepest >= 2:
        level += _class_level([parts[shared : shared + 2] for parts in levels])
    return [min(level, len(parts) - 1) if parts else None for parts in levels]


def _class_level(pairs: Sequence[list[str]]) -> int:
    """0 where classes hold subjects, 1 where subjects hold classes.

    Raises:
        UserError: both could be.
    """
    above, below = defaultdict(set), defaultdict(set)
    for pair in pairs:
        if len(pair) == 2:
            above[pair[1]].add(pair[0])
            below[pair[0]].add(pair[1])
    if len(above) > len(below):
        return 0
    if len(above) < len(below):
        return 1
    raise UserError(
        f"The folders {_some(below)} and the folders {_some(above)} in them could both be the "
        "classes, or the subjects: say which class each image is of in a CSV with the columns "
        "path and label, and name that CSV instead of the folder."
    )


def _some(names: Iterable[str]) -> str:
    """The first three names, in words."""
    names = sorted(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
