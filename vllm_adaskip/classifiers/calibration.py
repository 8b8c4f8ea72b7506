# SPDX-License-Identifier: Apache-2.0
"""A threshold, or a share to leave out on average, which the calibration of a fit makes one."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from vllm_adaskip.classifiers.ends import EndsOptions
from vllm_adaskip.classifiers.plan import PlanError


class CalibratedOptions(EndsOptions):
    """Options of a method that goes by a threshold.

    Attributes:
        threshold: see the method.
        target_skip: share to leave out on average over prompts like those of the fit; takes the
            place of ``threshold``.
        calibration: pairs of a threshold and the share left out at it on average, by ascending
            share; what ``target_skip`` looks up. From the fit.

    """

    #: Whether a higher threshold leaves out less.
    falls: ClassVar[bool] = False

    threshold: float = Field(allow_inf_nan=False)
    target_skip: float | None = Field(default=None, ge=0, lt=1)
    calibration: list[Annotated[list[float], Field(min_length=2, max_length=2)]] = Field(
        default=[], max_length=256
    )

    def resolved_threshold(self) -> float:
        """Return the threshold that ``target_skip`` asks for, if it does.

        Raises:
            PlanError: the fit never left out so much, or the profile does not say.

        """
        if self.target_skip is None:
            return self.threshold
        thresholds, shares = np.array(self.calibration or [[0.0, 0.0]]).T
        sign = -1 if self.falls else 1
        if (np.diff(shares) < 0).any() or (sign * np.diff(thresholds) < 0).any():
            way = "descend" if self.falls else "ascend"
            raise PlanError(f"calibration: shares left out must ascend, thresholds {way}")
        if self.target_skip > shares[-1]:
            raise PlanError(
                f"target_skip {self.target_skip:g}; allowed with this profile: 0 to {shares[-1]:g}"
            )
        return float(np.interp(self.target_skip, shares, thresholds))
