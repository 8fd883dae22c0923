"""Optimal brain surgery on groups of inputs: which go, and how the others make up for them.

A layer y = W x whose inputs C go and whose other weights are then refitted loses, of
Σ |W x - W' x|² = tr((W - W') H (W - W')ᵀ) with H = Σ x xᵀ, no less than tr(W_C ([H⁻¹]_CC)⁻¹ W_Cᵀ),
which the update W' = W - W_C ([H⁻¹]_CC)⁻¹ [H⁻¹]_C reaches (Hassibi & Stork 1993, for groups in
place of single weights). The group that costs least goes, W and H⁻¹ are those of what is left, and
so on: every later cost is exact, and so is their sum, for the groups that went.

Neither W' nor all of the downdated H⁻¹ is needed to go on, only what two symmetric matrices hold on
their diagonals, A = H⁻¹ and the Gram matrix M = W'ᵀ W', since that cost is tr(A_CC⁻¹ M_CC). With
A_CC = L Lᵀ, U = A_:C L⁻ᵀ, P = U L⁻¹ and Q = M_:C - ½ P M_CC, a group's going makes them

    A - U Uᵀ        and        M - P Qᵀ - Q Pᵀ.

Diagonals and the one group's rows are kept exact from group to group, and the matrices themselves
brought up to date once for a hundred columns, by products that use a machine as it can be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdcompress.criteria._obs import damp
from sdcompress.errors import InputError
from sdcompress.patterns import as_columns, from_columns
from sdcompress.shrink._importance import Removal

if TYPE_CHECKING:
    from torch import Tensor

_LAZY = 96  # columns that go before the matrices are brought up to date


def order(weight: Tensor, hessian: Tensor, groups: Sequence[Tensor], most: int) -> Removal:
    """Take `most` groups of inputs from a layer, the cheapest first.

    `weight` is [out, in] or [K, C, R, S]; `groups` are the columns of `as_columns(weight)` that go
    together, as many in each, rising, and all positions of a kernel's channels. `hessian` is
    [columns, columns] or [R·S, C, C]; then nothing makes up for an input at another position.
    Losses are shares of tr(W H Wᵀ), so that nothing is left at 1; H has the 1 % on its diagonal
    that it has in `criteria`. Works where `weight` lies, in fp64; memory is about six Hessians.

    Raises:
        InputError: the Hessian is not one, or the numbers run out of range.
    """
    import torch

    state = _State(weight, hessian, torch.stack(tuple(groups)))
    gone: list[int] = []
    costs: list[Tensor] = []
    while len(gone) < most:
        taken = state.remove(min(most - len(gone), max(1, _LAZY // state.size)))
        gone += [group for group, _ in taken]
        costs += [cost for _, cost in taken]
    scale = float(state.total) or 1.0  # where all weights are zero, so is every loss
    # Where nothing is lost, rounding may make it less.
    losses = torch.tensor([0.0, *costs], dtype=torch.float64).clamp(min=0).cumsum(0) / scale
    if not bool(losses.isfinite().all()):
        raise InputError(
            "expected finite losses, found NaN or infinity; keep the block whole, or judge it by "
            "magnitude"
        )
    return Removal(tuple(gone), tuple(losses.tolist()))


def refit(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """[out, kept, ...] in fp64: a layer with these columns alone, fitted anew to H.

    W H_:K (H_KK)⁻¹, the least of tr((W - W') H (W - W')ᵀ) over all weights on the columns K. They
    are columns of `as_columns(weight)`, rising, and all positions of a kernel's channels; forms are
    those of `order`, H damped as there.

    Raises:
        InputError: the Hessian is not one, or the numbers run out of range.
    """
    import torch

    damped = damp(hessian.to(weight.device))
    columns = _in_blocks(weight, damped)
    beside = damped[:, kept[: len(kept) // len(damped)]]  # [blocks, kept, columns]
    there = beside[:, :, kept[: len(kept) // len(damped)]]
    fitted = torch.cholesky_solve(beside @ columns.mT, _factor(there))
    if not bool(fitted.isfinite().all()):
        raise InputError(
            "expected finite weights, found NaN or infinity after the refit; keep the block whole, "
            "or judge it by magnitude"
        )
    shape = (len(weight), len(kept) // weight[0, 0].numel(), *weight.shape[2:])
    return from_columns(fitted.movedim(-1, 0).reshape(len(weight), -1), shape)


def _in_blocks(weight: Tensor, hessian: Tensor) -> Tensor:
    """[blocks, out, columns]: the weights on the inputs of each of a Hessian's blocks.

    As `as_columns` puts one position after the other, a block's columns are those of the first,
    counted from its start.
    """
    return as_columns(weight).double().reshape(len(weight), len(hessian), -1).movedim(1, 0)


class _State:
    """A and M of the groups that are left: [blocks, columns, columns], a group's columns together.

    `total` is tr(W H Wᵀ), `size` the columns of a group within a block.
    """

    def __init__(self, weight: Tensor, hessian: Tensor, groups: Tensor) -> None:
        import torch

        damped = damp(hessian.to(weight.device))
        self.size = groups.shape[1] // len(damped)
        together = groups[:, : self.size].flatten().to(weight.device)
        damped, columns = _part(damped, together), _in_blocks(weight, damped)[:, :, together]
        self._groups = torch.arange(len(groups), device=weight.device)
        self._gram = columns.mT @ columns
        self.total = torch.vdot(self._gram.flatten(), damped.flatten())
        self._inverse = torch.cholesky_inverse(_factor(damped))

    def remove(self, count: int) -> list[tuple[int, Tensor]]:
        """Take so many groups, the cheapest first: each with what it cost."""
        import torch

        size = self.size
        a, m = _diagonal(self._inverse, size), _diagonal(self._gram, size)
        blocks, _, columns = self._inverse.shape
        u, p, q = self._inverse.new_empty(3, blocks, count * size, columns)
        stays = torch.ones_like(self._groups, dtype=torch.bool)
        taken = []
        for i in range(count):
            costs = _costs(a, m).masked_fill_(~stays, float("inf"))
            cost, group = costs.min(0)
            chosen = int(group)
            taken.append((int(self._groups[chosen]), cost))
            stays[chosen] = False
            its = slice(chosen * size, (chosen + 1) * size)
            before, now = slice(i * size), slice(i * size, (i + 1) * size)
            row_a = self._inverse[:, its] - u[:, before, its].mT @ u[:, before]
            row_m = self._gram[:, its] - p[:, before, its].mT @ q[:, before]
            row_m -= q[:, before, its].mT @ p[:, before]
            factor = _factor(row_a[:, :, its])
            u[:, now] = torch.linalg.solve_triangular(factor, row_a, upper=False)
            p[:, now] = torch.linalg.solve_triangular(factor.mT, u[:, now], upper=True)
            q[:, now] = row_m - row_m[:, :, its] @ p[:, now] / 2
            its_u, its_p, its_q = (_by_group(x[:, now], size) for x in (u, p, q))
            a -= its_u.mT @ its_u
            both = its_p.mT @ its_q
            m -= both + both.mT
            a[:, chosen] = torch.eye(size, dtype=a.dtype, device=a.device)  # it could be singular
        self._groups = self._groups[stays]
        left = stays.repeat_interleave(size).nonzero().squeeze(1)
        u, p, q = (x[:, :, left] for x in (u, p, q))
        self._inverse = _part(self._inverse, left).baddbmm_(u.mT, u, alpha=-1)
        self._gram = _part(self._gram, left)
        self._gram.baddbmm_(p.mT, q, alpha=-1).baddbmm_(q.mT, p, alpha=-1)
        return taken


def _factor(matrices: Tensor) -> Tensor:
    """The lower Cholesky factors."""
    import torch

    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(matrices)
    if bool(failed.any()):
        raise InputError(
            "expected a Hessian without negative eigenvalues, found one; keep the block whole, or "
            "judge it by magnitude"
        )
    return lower


def _costs(a: Tensor, m: Tensor) -> Tensor:
    """[groups]: tr(A_CC⁻¹ M_CC) of each, from [blocks, groups, size, size]."""
    import torch

    if a.shape[-1] == 1:
        return (m / a)[..., 0, 0].sum(0)
    solved: Tensor = torch.cholesky_solve(m, _factor(a))
    return solved.diagonal(dim1=-2, dim2=-1).sum((0, 2))


def _diagonal(matrices: Tensor, size: int) -> Tensor:
    """[blocks, groups, size, size]: a copy of what each group has on the diagonal."""
    blocks, columns, _ = matrices.shape
    cut = matrices.reshape(blocks, columns // size, size, columns // size, size)
    return cut.diagonal(dim1=1, dim2=3).movedim(-1, 1).contiguous()


def _by_group(rows: Tensor, size: int) -> Tensor:
    """[blocks, groups, rows, size] of [blocks, rows, columns]."""
    blocks, count, _ = rows.shape
    return rows.reshape(blocks, count, -1, size).movedim(2, 1)


def _part(matrices: Tensor, places: Tensor) -> Tensor:
    return matrices.index_select(1, places).index_select(2, places)
