"""How pictures are made where nobody says: steps and guidance of each kind of model."""

from __future__ import annotations

import json
from typing import Any

from sdcompress.bundle import Bundle
from sdcompress.models import mini_sd2

STEPS, GUIDANCE = 25, 7.5  # what Stable Diffusion 2's own model card uses with a fast solver
DISTILLED_STEPS, NO_GUIDANCE = 1, 0.0  # of SD-Turbo, which has the guidance in its weights


def sampling_defaults(bundle: Bundle) -> dict[str, Any]:
    """`steps`, `guidance`, `height` and `width` (pixels; None is the model's native size)."""
    if bundle.outline.source.kind == "mini-sd2":
        steps, guidance = mini_sd2.DEFAULT_STEPS, mini_sd2.DEFAULT_GUIDANCE
    elif _distilled(bundle):
        steps, guidance = DISTILLED_STEPS, NO_GUIDANCE
    else:
        steps, guidance = STEPS, GUIDANCE
    return {"steps": steps, "guidance": guidance, "height": None, "width": None}


def _distilled(bundle: Bundle) -> bool:
    """Whether the scheduler is SD-Turbo's: Euler's, for epsilon, its first step the noisiest.

    The weights cannot tell, and a single step has to start there. Ordinary models are spaced
    otherwise, but for those trained down to no signal at all, which rescale betas or predict v.
    """
    file = bundle.path / "scheduler" / "scheduler_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return (
            config["_class_name"] in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
            and config["timestep_spacing"] == "trailing"
            and config.get("prediction_type", "epsilon") == "epsilon"
            and not config.get("rescale_betas_zero_snr")
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False  # whoever needs the scheduler says what is wrong with it
