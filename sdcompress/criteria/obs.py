"""OBS by groups: drops the neurons, heads or channels that all others make up for best.

Optimal brain surgery (Hassibi & Stork 1993) with groups of inputs C in place of single weights: the
layer behind a group loses tr(W_C ([H⁻¹]_CC)⁻¹ W_Cᵀ) without it, H = Σ x xᵀ, after what stays is
fitted anew by least squares; groups go one after the other, each by what those before it left.
`shrink` takes it for the rules of a `structure`; it says nothing of single weights.

Linear [out, in], Conv [K, C, R, S]. Costs a pass over the calibration set, columns² fp64 numbers
of memory for each layer, six times that for the one that is judged, and of it 2 · outputs ·
columns² operations and some 3 · columns³, however many groups go.
"""

from __future__ import annotations

from sdcompress.criteria import Criterion

CRITERION = Criterion(needs=frozenset({"hessian"}), group=True)
