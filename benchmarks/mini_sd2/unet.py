"""Stage 2: the UNet and the text encoder, trained together on cached latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from clip import WIDTH, text_config, tokenize
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from fit import draw, fit, save_atomic, world
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer
from vae import to_tensor

from sdcompress.models.mini_sd2.oracle import matches, read_scene
from sdcompress.models.mini_sd2.scenes import (
    BACKGROUNDS,
    COLOURS,
    PHRASINGS,
    SHAPES,
    SIZES,
    Image,
    Scene,
    caption,
    render,
    sample_prompts,
    sample_scenes,
)

SCENES = 40_000
STEPS = 5300
HORIZON = 12_000
COOLDOWN = 800
# By then single objects are learnt, but which of two lies where is still a coin toss (the text
# encoder is causal: the first object is named before its place is). From this step on most
# batches are pairs, and the text encoder is asked for the place of each object, see `slot_loss`.
PAIRS_FROM = 3500
SLOT_WEIGHT = 0.2
# These steps are for the text encoder alone: four of them cost one of the UNet's.
TEXT_ONLY = range(4000, 4200)
BATCH = 64
LEARNING_RATE = 1e-3
CAPTION_DROP = 0.1


def build_unet() -> UNet2DConditionModel:
    """SD2's blocks, narrow: 8 x 8 latents, cross-attention at every level, 2 and 4 heads."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
    )


def build_scheduler() -> DDIMScheduler:
    """SD2's noise schedule, predicting v as SD 2.1 for 768 pixels does."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class Denoiser(nn.Module):
    """What this stage trains."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = build_unet()
        self.text = CLIPTextModel(text_config(tokenizer))


def build_pipeline(
    vae: AutoencoderKL, denoiser: Denoiser, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The parts as the pipeline everybody loads."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: StableDiffusionPipeline,
    texts: list[str],
    seed: int,
    steps: int = 20,
    guidance: float = 4.0,
    batch: int = 50,
) -> Image:
    """One uint8 picture (64, 64, 3) a prompt; the same for the same seed, order and batch."""
    parts = []
    for start in range(0, len(texts), batch):
        pictures = pipe(
            texts[start : start + batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed * 1000 + start),
            output_type="np",
        ).images
        parts.append(np.rint(pictures * 255).astype(np.uint8))
    return np.concatenate(parts)


def prompt_accuracy(
    pipe: StableDiffusionPipeline,
    prompts: list[tuple[Scene, str]],
    seed: int,
    steps: int = 20,
    guidance: float = 4.0,
) -> float:
    """The share of generated pictures in which the oracle reads all that the prompt says."""
    pictures = generate(pipe, [text for _, text in prompts], seed, steps, guidance)
    right = [matches(s, read_scene(p)) for (s, _), p in zip(prompts, pictures, strict=True)]
    return float(np.mean(right))


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, work: Path, seed: int, first: int, last: int) -> Tensor:
    """Latents of the training scenes first..last, encoded once; the mean of the posterior."""
    path = work / f"latents-{first}-{last}.pt"
    if path.exists():
        latents = torch.load(path, weights_only=True)
        assert isinstance(latents, Tensor)
        return latents
    scenes = sample_scenes(SCENES, None, "train", seed)[first:last]
    parts = []
    for start in range(0, len(scenes), 100):
        images = to_tensor(render(scenes[start : start + 100], seed + first + start))
        parts.append(vae.encode(images).latent_dist.mode())
    latents = torch.cat(parts)
    save_atomic(latents, path)
    return latents


# What a caption says by place: the attributes of the object to the left, on top or alone, then
# those of the other (the last class of each: there is none), the axis, and the background.
SLOTS = (*(len(COLOURS) + 1, len(SHAPES) + 1, len(SIZES) + 1) * 2, 3, len(BACKGROUNDS))


def slot_classes(scene: Scene) -> list[int]:
    """The class of each of SLOTS; equal for a scene and its converse."""
    if scene.relation in ("right of", "below"):
        scene = scene.converse()
    classes = []
    for i in range(2):
        for attribute, names in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES)):
            known = i < len(scene.things)
            value = getattr(scene.things[i], attribute) if known else None
            classes.append(list(names).index(value) if value else len(names))
    axis = (None, "left of", "above").index(scene.relation)
    return [*classes, axis, list(BACKGROUNDS).index(scene.background)]


def slot_code(seed: int) -> Tensor:
    """One of mutually orthogonal directions (width, classes) for every class of every slot."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    return basis[:, : sum(SLOTS)] * 2


def slot_loss(hidden: Tensor, ids: Tensor, end: int, classes: Tensor, code: Tensor) -> Tensor:
    """Cross-entropy of reading `classes` (n, 8) off every state from the end token on.

    The end token and the padding behind it have seen the whole caption; this makes them hold what
    it says by place, where the UNet's cross-attention can pick it up. The code is fixed.
    """
    after = (ids == end).float()
    losses = []
    for scores, wanted in zip((hidden @ code).split(SLOTS, -1), classes.T, strict=True):
        each = F.cross_entropy(
            scores.transpose(1, 2), wanted[:, None].expand(ids.shape), reduction="none"
        )
        losses.append((each * after).sum(1) / after.sum(1))
    return torch.stack(losses).mean()


def train_unet(
    work: Path,
    seed: int,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    scenes: list[Scene],
) -> tuple[Denoiser, dict[str, float]]:
    """Train on `latents` (n, 4, 8, 8), scaled to unit variance, of `scenes`."""
    torch.manual_seed(seed)
    denoiser = Denoiser(tokenizer)
    pipe = build_pipeline(vae, denoiser, tokenizer)
    alphas = pipe.scheduler.alphas_cumprod
    code, end = slot_code(seed), tokenizer.eos_token_id
    pairs = np.array([i for i, scene in enumerate(scenes) if scene.relation])

    def loss_fn(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        n = BATCH // world()
        rng = np.random.default_rng(draw(seed, step))
        chosen = rng.integers(len(scenes), size=n)
        if step >= PAIRS_FROM:
            chosen = np.where(rng.random(n) < 0.6, rng.choice(pairs, n), chosen)
        texts = [caption(scenes[i], int(rng.integers(2 * len(PHRASINGS)))) for i in chosen]
        texts = ["" if rng.random() < CAPTION_DROP else text for text in texts]
        ids = tokenize(tokenizer, texts)
        slots = torch.zeros(())
        more: list[Scene] = []
        said: list[str] = []
        if PAIRS_FROM <= step < TEXT_ONLY.stop:
            # Captions are cheap: as many again, for the text encoder alone.
            more = [scenes[i] for i in rng.choice(pairs, n)]
            said = [caption(scene, int(rng.integers(2 * len(PHRASINGS)))) for scene in more]
            ids = torch.cat([ids, tokenize(tokenizer, said)])
        hidden = denoiser.text(ids).last_hidden_state
        if step >= PAIRS_FROM:
            about = [*(scenes[i] for i in chosen), *more]
            told = torch.tensor([text != "" for text in [*texts, *said]])
            classes = torch.tensor([slot_classes(scene) for scene in about])
            slots = slot_loss(hidden[told], ids[told], end, classes[told], code)
        if step in TEXT_ONLY:
            return {"loss": slots, "slots": slots}
        x = latents[torch.from_numpy(chosen)]
        noise = torch.randn(x.shape, generator=generator)
        # One timestep from each n-th of the range: less noise in the loss than independent draws.
        u = (torch.arange(n) + torch.rand(n, generator=generator)) / n
        t = (u * len(alphas)).long()
        a = alphas[t].sqrt().view(-1, 1, 1, 1)
        s = (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        v = denoiser.unet(a * x + s * noise, t, hidden[:n]).sample
        error = (v - (a * noise - s * x)).square().mean((1, 2, 3))
        high = error.detach()[t >= 500].mean()
        return {"loss": error.mean() + SLOT_WEIGHT * slots, "high": high, "slots": slots}

    probes = [sample_prompts(50, n, s, 20_000) for s in ("train", "validation") for n in (1, 2)]

    def hook(step: int) -> None:
        found = [prompt_accuracy(pipe, p, 1, 10) for p in probes]
        with (work / "unet.log").open("a") as stream:
            shown = " ".join(f"{f:.2f}" for f in found)
            stream.write(f"unet {step} accuracy train1 train2 val1 val2: {shown}\n")

    report = fit(
        "unet", denoiser, loss_fn, steps=STEPS, lr=LEARNING_RATE, work=work, seed=seed,
        horizon=HORIZON, cooldown=COOLDOWN, ema_decay=0.997, hook=hook, hook_every=1000,
    )  # fmt: skip
    return denoiser, report
