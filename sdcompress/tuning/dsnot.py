"""DSnoT: pruned weights come back in exchange for others, without training; needs prompts only.

Dynamic Sparse no Training (Zhang et al. 2023, arXiv 2310.08915). What a row of outputs is expected
to be off by, against the dense model, is e = Σ (d − w)·E[x]. In each cycle every row revives the
pruned weight that takes most off it, for the spread it brings back (d·E[x] / Var[x], of e's sign),
and gives up, among the weights whose loss takes off some more, the one with the least |w|·‖x‖.

Two things differ from the paper. It stops at an error of 0.1, which means something else in every
layer and model; here a row stops when no exchange lowers the expected square of its error,
E = e² + Σ (d − w)²·Var[x] (inputs taken as independent), so that none ever makes E larger. And with
N:M, both weights lie in one group.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from sdcompress.calibrate import collect, exact_device
from sdcompress.patterns import grouped, parse_pattern, ungrouped
from sdcompress.recipe import Calibration
from sdcompress.tuning._job import Job

if TYPE_CHECKING:
    from torch import Tensor

MOVES_MASKS = True
NEEDS = frozenset({"input_sq_norm", "input_mean", "input_var"})


def tune(job: Job) -> None:
    """Exchange weights in every pruned layer; as many stay as before, in the same pattern.

    The statistics are recorded while the dense model paints; what comes back has its dense value.

    Raises:
        UsageError, InputError: see `calibrate.collect`.
    """
    import torch

    asked = job.settings
    calibration = Calibration(
        prompts=asked.prompts, seed=asked.seed, steps=asked.sampling_steps, guidance=asked.guidance
    )
    layers = [(c, key, layer) for c in job.components for key, layer in job.layers[c].items()]
    statistics = collect(
        job.dense,
        {c: {layer.name: NEEDS for layer in job.layers[c].values()} for c in job.components},
        calibration,
        progress=partial(job.progress, "calibrating"),
    )
    place = exact_device()
    swaps, before, after = 0, 0.0, 0.0
    for done, (component, key, layer) in enumerate(layers, 1):
        pattern = parse_pattern(layer.pattern or "")
        student = job.students[component].get_parameter(key)
        dense = job.left_of(component, key, job.teachers[component].get_parameter(key))
        mask = job.masks[component][key]
        recorded = statistics[component][layer.name]
        mean, var, sq_norm = (
            grouped(_inputs_left(job, component, key, recorded[name]).to(place), pattern)
            for name in ("input_mean", "input_var", "input_sq_norm")
        )
        weight, original = (
            grouped(w.detach().to(place, torch.float64), pattern) for w in (student, dense)
        )
        changed, keep = exchange(
            weight,
            original,
            grouped(mask.to(place), pattern),
            mean,
            var,
            sq_norm,
            cycles=asked.cycles,
        )
        before += float(expected_square_error(weight, original, mean, var).sum())
        after += float(expected_square_error(changed, original, mean, var).sum())
        keep = ungrouped(keep, layer.shape, pattern).to(mask.device)
        swaps += int((keep & ~mask).sum())
        mask.copy_(keep)
        with torch.no_grad():
            student.copy_(ungrouped(changed, layer.shape, pattern))
        job.progress("exchanging", done, len(layers))
    job.details |= {"swaps": swaps, "expected_square_error": {"before": before, "after": after}}


def _inputs_left(job: Job, component: str, key: str, statistic: Tensor) -> Tensor:
    """Of [1, in, ...]: what a layer is still given, where its inputs have become fewer."""
    remains = job.remains.get(component, {}).get(key)
    return remains.of(statistic) if remains and remains.part.axis == 1 else statistic


def exchange(
    weight: Tensor,
    dense: Tensor,
    keep: Tensor,
    mean: Tensor,
    var: Tensor,
    sq_norm: Tensor,
    *,
    cycles: int,
) -> tuple[Tensor, Tensor]:
    """The weights and the mask after at most `cycles` exchanges in each row.

    All are [K, groups, members] as `patterns.grouped` cuts them, in fp64, statistics [K or 1, …];
    an exchange is between two members of one group.
    """
    import torch

    weight, keep = weight.clone(), keep.clone()
    rows = torch.arange(len(weight), device=weight.device)  # those that may still get better
    for _ in range(cycles):
        w, d, k = weight[rows], dense[rows], keep[rows]
        m, v, q = (s if len(s) == 1 else s[rows] for s in (mean, var, sq_norm))
        error = ((d - w) * m).sum((1, 2))
        sign = error.sign()[:, None, None]
        # How far a weight's return, or its loss, takes the error towards zero.
        gain, loss = sign * d * m, -sign * w * m
        growth = torch.where(~k & (gain > 0), gain / v, -math.inf)
        worth = torch.where(k & (loss > 0), w.abs() * q.sqrt(), math.inf)
        grown, revive = growth.max(-1)  # [rows, groups]: the best of each group
        lost, drop = worth.min(-1)
        left = error.abs()[:, None] - _at(gain, revive) - _at(loss, drop)
        spread = _at((d**2 - (d - w) ** 2) * v, drop) - _at((d - w) ** 2 * v, revive)
        better = left**2 + spread < error[:, None] ** 2
        better &= (grown > -math.inf) & (lost < math.inf)
        group = torch.where(better, grown, -math.inf).argmax(-1)
        which = better.any(-1).nonzero()[:, 0]
        if not len(which):
            break
        rows, group = rows[which], group[which]
        revive, drop = revive[which, group], drop[which, group]
        weight[rows, group, revive] = dense[rows, group, revive]
        weight[rows, group, drop] = 0.0
        keep[rows, group, revive], keep[rows, group, drop] = True, False
    return weight, keep


def expected_square_error(weight: Tensor, dense: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """E[(Σ (d − w)·x)²] of each row, [K], for inputs x taken as independent of one another."""
    off = dense - weight
    return (off * mean).sum((1, 2)) ** 2 + (off**2 * var).sum((1, 2))


def _at(values: Tensor, index: Tensor) -> Tensor:
    """[rows, groups, members] at one member of each group."""
    return values.gather(-1, index[..., None])[..., 0]
