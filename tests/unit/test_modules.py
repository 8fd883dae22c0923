"""Narrower modules: what they compute, against dense ones in which the same units are silent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdcompress.calibrate._layers import find_module
from sdcompress.catalog import read_config, weight_files
from sdcompress.errors import InputError
from sdcompress.models import modules
from sdcompress.structure import KEY, Block, channels_of, cut
from tests.narrowed import blocks_of

KINDS = [
    ("text_encoder", "neurons"),
    ("text_encoder", "heads"),
    ("unet", "neurons"),
    ("unet", "heads"),
    ("unet", "channels"),
    ("vae", "channels"),
]
EXACT = 1e-5  # of numbers around 1
Run = Callable[[Any], Tensor]


def gone(block: Block) -> list[int]:
    """Some units, of every block others: the first is always among them, the last never."""
    third = range(0, block.units - 1, 3)
    return sorted({0, *(i for i in third if (i + len(block.name)) % 2)})


def removal(model: Path, component: str, kind: str | None = None) -> dict[Block, list[int]]:
    blocks = [b for b in blocks_of(model)[component] if kind in (None, b.kind)]
    assert blocks
    return {block: gone(block) for block in blocks}


def widths(removed: dict[Block, list[int]]) -> dict[str, int]:
    return {b.name: b.unit * (b.units - len(units)) for b, units in removed.items()}


def state_of(model: Path, component: str) -> dict[str, Tensor]:
    """By the names in the files."""
    return {k: v for file in weight_files(model / component) for k, v in load_file(file).items()}


def narrowed(state: dict[str, Tensor], removed: dict[Block, list[int]]) -> dict[str, Tensor]:
    state = dict(state)
    for block, units in removed.items():
        channels = channels_of(block, [u for u in range(block.units) if u not in units])
        for part in block.parts:
            state[part.tensor] = cut(state[part.tensor], part, channels, block.width)
    return state


@pytest.fixture
def write(tiny_sd: Path, tmp_path: Path) -> Callable[..., Path]:
    """A component's folder with these weights and widths."""

    def write(component: str, state: dict[str, Tensor], narrower: dict[str, int]) -> Path:
        source, folder = tiny_sd / component, tmp_path / component
        folder.mkdir(exist_ok=True)
        config = {**read_config(source), **({KEY: narrower} if narrower else {})}
        (folder / "config.json").write_text(json.dumps(config))
        state = {name: value.contiguous() for name, value in state.items()}
        save_file(state, folder / weight_files(source)[0].name)
        return folder

    return write


def run(component: str, module: Any) -> Tensor:
    """What a module makes of the same inputs; an odd size of the latents, a prompt with padding."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 9, 7, generator=generator)
    if component == "unet":
        text = torch.randn(2, 11, 32, generator=generator)
        return module(latents, torch.tensor([3, 700]), text).sample  # type: ignore[no-any-return]
    if component == "vae":
        pictures = torch.randn(2, 3, 8, 12, generator=generator)
        encoded = module.encode(pictures).latent_dist.parameters
        return torch.cat([encoded.flatten(), module.decode(latents).sample.flatten()])
    ids = torch.randint(3, 400, (2, 11), generator=generator)
    there = torch.ones_like(ids)
    there[1, 6:] = 0
    whole = [module(ids, attention_mask=mask).last_hidden_state for mask in (None, there)]
    return torch.cat(whole)


def far(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert bool(a.isfinite().all())
    return float((a - b).abs().max())


@contextmanager
def silenced(module: nn.Module, removed: dict[Block, list[int]]) -> Iterator[None]:
    """The module as it is, but what these units give their consumer is zero."""

    def silence(block: Block, units: list[int]) -> Any:
        def hook(consumer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            (x,) = inputs
            axis = 1 if block.kind == "channels" else -1
            alive = torch.ones(x.shape[axis])
            for unit in units:
                alive[unit * block.unit : (unit + 1) * block.unit] = 0
            return (x * (alive[:, None, None] if axis == 1 else alive),)

        return hook

    hooks = [
        find_module(module, block.consumer).register_forward_pre_hook(silence(block, units))
        for block, units in removed.items()
    ]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("component", "kind"), KINDS)
@torch.no_grad()
def test_what_takes_no_part_can_go(
    component: str, kind: str, tiny_sd: Path, write: Callable[..., Path]
) -> None:
    """Units whose producers and consumer's columns are zero: without them, the same numbers."""
    removed, state = removal(tiny_sd, component, kind), state_of(tiny_sd, component)
    before = run(component, modules.load(tiny_sd / component, component))
    for block, units in removed.items():
        for part in block.parts:
            value = state[part.tensor].clone()
            for copy in range(part.copies):
                for channel in channels_of(block, units):
                    value.select(part.axis, copy * block.width + channel).zero_()
            state[part.tensor] = value
    zeroed = run(component, modules.load(write(component, state, {}), component))
    assert far(zeroed, before) > 1e-2  # those units did something
    state = narrowed(state, removed)
    left = modules.load(write(component, state, widths(removed)), component)
    assert far(run(component, left), zeroed) < EXACT


@pytest.mark.parametrize(("component", "kind"), [*KINDS, ("text_encoder", None), ("unet", None)])
@torch.no_grad()
def test_removed_is_masked(
    component: str, kind: str | None, tiny_sd: Path, write: Callable[..., Path]
) -> None:
    """The removed model equals the dense one whose units are silent, whatever their weights are."""
    removed = removal(tiny_sd, component, kind)
    dense = modules.load(tiny_sd / component, component)
    before = run(component, dense)
    with silenced(dense, removed):
        masked = run(component, dense)
    assert far(masked, before) > 1e-2
    state = narrowed(state_of(tiny_sd, component), removed)
    left = modules.load(write(component, state, widths(removed)), component)
    assert far(run(component, left), masked) < EXACT


@torch.no_grad()
def test_what_is_loaded_is_what_the_library_loads(tiny_sd: Path) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    classes: dict[str, Any] = {
        "text_encoder": CLIPTextModel,
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
    }
    for component, kind in classes.items():
        ours = modules.load(tiny_sd / component, component)
        theirs = kind.from_pretrained(tiny_sd / component).eval()
        assert type(ours) is kind
        assert not ours.training
        assert far(run(component, ours), run(component, theirs)) == 0.0


def test_weights_are_loaded_as_they_are_stored(tiny_sd: Path, write: Callable[..., Path]) -> None:
    removed = removal(tiny_sd, "unet", "neurons")
    state = {k: v.half() for k, v in narrowed(state_of(tiny_sd, "unet"), removed).items()}
    module: Any = modules.load(write("unet", state, widths(removed)), "unet")
    assert module.dtype == torch.float16
    assert module.config.sample_size == 8
    assert KEY not in module.config
    assert {k: v.shape for k, v in module.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }


def test_gradients_reach_a_narrower_text_encoder(tiny_sd: Path, write: Callable[..., Path]) -> None:
    removed = removal(tiny_sd, "text_encoder", "heads")
    state = narrowed(state_of(tiny_sd, "text_encoder"), removed)
    module: Any = modules.load(write("text_encoder", state, widths(removed)), "text_encoder")
    output = module(torch.arange(6)[None], output_hidden_states=True)
    assert [s.shape for s in output.hidden_states] == [(1, 6, 32)] * 3
    output.last_hidden_state.square().sum().backward()
    for block in removed:
        gradient = find_module(module, block.consumer).weight.grad
        assert gradient.shape == (32, widths(removed)[block.name])
        assert bool((gradient != 0).any(0).all())


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_both_spellings_of_a_text_encoder(
    prefix: str, tiny_sd: Path, write: Callable[..., Path]
) -> None:
    """transformers 4 writes a prefix and 5 does not; what one wrote the other loads."""
    removed = removal(tiny_sd, "text_encoder")
    state = narrowed(state_of(tiny_sd, "text_encoder"), removed)

    def spelt(name: str) -> str:
        return prefix + name.removeprefix("text_model.")

    state = {spelt(name): value for name, value in state.items()}
    found = {spelt(name): width for name, width in widths(removed).items()}
    module = modules.load(write("text_encoder", state, found), "text_encoder")
    loaded = {spelt(name): value for name, value in module.state_dict().items()}
    assert loaded.keys() == state.keys()
    assert all(loaded[name].equal(value) for name, value in state.items())


def test_old_names_of_a_vaes_attention(tiny_sd: Path, write: Callable[..., Path]) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in state_of(tiny_sd, "vae").items():
        if ".attentions." in name:
            for new, spelling in old.items():
                name = name.replace(f".{new}.", f".{spelling}.")
        state[name] = value
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in state
    module = modules.load(write("vae", state, {}), "vae")
    for name, value in state_of(tiny_sd, "vae").items():
        assert module.state_dict()[name].equal(value)


def test_a_config_and_weights_that_do_not_fit(
    tiny_sd: Path, tmp_path: Path, write: Callable[..., Path]
) -> None:
    removed, state = removal(tiny_sd, "unet"), state_of(tiny_sd, "unet")
    left, found = narrowed(state, removed), widths(removed)
    for weights, said in ((state, found), (left, {})):
        with pytest.raises(InputError, match=r"do not fit config.json \(size mismatch for "):
            modules.load(write("unet", weights, said), "unet")
    missing = {k: v for k, v in left.items() if k != "conv_out.bias"}
    with pytest.raises(InputError, match=r"\(there is no conv_out\.bias\)"):
        modules.load(write("unet", missing, found), "unet")


@pytest.mark.parametrize(
    ("name", "width", "says"),
    [
        ("mid_block.resnets.9", 8, "the model has no block mid_block.resnets.9"),
        ("mid_block", 8, "expected the name of a feed-forward, an attention or a ResNet block"),
        ("mid_block.resnets.0", 60, "expected a width of whole groups of its GroupNorm of 8"),
        ("mid_block.resnets.0", 0, "expected a width of whole groups of its GroupNorm of 8"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1", 40, "of whole heads of 16, found 40"),
    ],
)
def test_widths_that_cannot_be(name: str, width: int, says: str, tiny_sd: Path) -> None:
    config = {**read_config(tiny_sd / "unet"), KEY: {name: width}}
    with torch.device("meta"), pytest.raises(InputError, match=says):
        modules.build("unet", config)


def test_whether_a_component_is_narrower(tiny_sd: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd / "unet", tmp_path / "unet")
    config = read_config(tmp_path / "unet")
    assert not modules.is_narrow(tmp_path / "unet")
    (tmp_path / "unet" / "config.json").write_text(json.dumps({**config, KEY: {}}))
    assert not modules.is_narrow(tmp_path / "unet")
    (tmp_path / "unet" / "config.json").write_text(json.dumps({**config, KEY: {"a.ff": 8}}))
    assert modules.is_narrow(tmp_path / "unet")
