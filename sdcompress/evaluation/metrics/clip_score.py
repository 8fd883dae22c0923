"""How well each picture fits its prompt: the cosine of their CLIP embeddings.

CLIPScore (Hessel et al. 2021) without its factor of 2.5, so not below 0, as studies of Stable
Diffusion report it: about 0.31 for SD2 with ViT-B/32. Some tools print 100 times this. Figures of
different CLIPs cannot be compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdcompress.evaluation.metrics import Batch, Score, _clip

if TYPE_CHECKING:
    from sdcompress.evaluation.metrics import Floats


def _score(batch: Batch) -> Floats:
    from torch.nn.functional import cosine_similarity

    cosine = cosine_similarity(_clip.image_embeddings(batch), _clip.text_embeddings(batch))
    values: Floats = cosine.clamp(min=0).double().cpu().numpy()
    return values


METRIC = Score(unit="cosine", better="higher", possible=_clip.possible, score=_score)
