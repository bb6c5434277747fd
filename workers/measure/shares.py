"""How many samples of a data set are for what. Pure arithmetic; which ones they are says `parts`."""

from __future__ import annotations

import math
from typing import Literal

Part = Literal["all", "calibration", "validation", "select", "confirm"]

SELECT_SHARE = 1 / 3  # of the distinct samples that judge; the rest confirms: the verdict takes most of the evidence


def judging(distinct: int, part: Part) -> int:
    """How many of so many distinct samples that judge are of this part."""
    if part == "select":
        return selecting(distinct)
    return distinct - selecting(distinct) if part == "confirm" and distinct > 1 else distinct


def data_set_for(confirming: int) -> int:
    """How many samples the validation data needs for so many to confirm."""
    return math.ceil(confirming / (1 - SELECT_SHARE))


def selecting(distinct: int) -> int:
    return max(int(distinct * SELECT_SHARE), 1)
