"""Adapters on pruned layers: what they compute is what the merged weights compute, zeros kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdcompress.errors import SdcompressError
from sdcompress.recipe import Tune
from sdcompress.tuning._job import Job
from sdcompress.tuning._lora import Adapters


class Block(nn.Module):
    """A pruned Linear and Conv, and a Linear that is not pruned and whose name ends like one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.inner = nn.ModuleDict({"fc": nn.Linear(12, 5)})

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.fc(x)).reshape(len(x), 2, 2, 2).repeat(1, 1, 2, 2)
        out: Tensor = self.inner["fc"](self.conv(hidden).flatten(1))
        return out


def make_job(rank: int = 2, seed: int = 0) -> Job:
    torch.manual_seed(1)
    unet = Block()
    masks = {}
    for name in ("fc.weight", "conv.weight"):
        weight = unet.get_parameter(name)
        masks[name] = torch.rand(weight.shape) < 0.5
        weight.data.masked_fill_(~masks[name], 0.0)
    other: Any = SimpleNamespace(scaler=None)
    return Job(
        Tune(lora_rank=rank, seed=seed),
        parent=other,
        dense=other,
        plan=other,
        components=("unet",),
        students={"unet": unet},
        layers={},
        masks={"unet": masks},
        accelerator=other,
    )


def trained(job: Job) -> Adapters:
    """Adapters after a few steps on something."""
    adapters = Adapters(job)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.AdamW(job.parameters().values(), 0.05)
    for step in range(3):
        job.students["unet"](x).square().mean().backward()
        adapters.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        adapters.after_step(step)
    return adapters


X = torch.linspace(-1, 1, 24).reshape(4, 6)


def test_the_merge_changes_nothing_and_keeps_the_zeros() -> None:
    job = make_job()
    unet, before = job.students["unet"], {}
    for key, value in unet.state_dict().items():
        before[key] = value.clone()
    start = unet(X)
    adapters = trained(job)
    output = unet(X)
    assert not torch.allclose(output, start, atol=1e-2)  # something was learnt
    adapters.finish()
    assert torch.equal(unet(X), output)
    after = unet.state_dict()
    assert list(after) == list(before)
    assert type(unet.get_submodule("fc")) is nn.Linear
    for key, mask in job.masks["unet"].items():
        assert torch.equal(after[key] == 0, ~mask)
        assert not torch.equal(after[key], before[key])
    for key in before.keys() - job.masks["unet"].keys():
        assert torch.equal(after[key], before[key])


def test_weights_are_w_plus_the_masked_product() -> None:
    job = make_job()
    unet: Any = job.students["unet"]
    was = {key: unet.get_parameter(key).detach().clone() for key in job.masks["unet"]}
    adapters = trained(job)
    (a_fc, b_fc), (a_conv, b_conv) = (
        (layer.lora_A["masked"].weight.detach(), layer.lora_B["masked"].weight.detach())
        for layer in (unet.fc, unet.conv)
    )
    assert (a_fc.shape, b_fc.shape) == ((2, 6), (8, 2))
    assert (a_conv.shape, b_conv.shape) == ((2, 2, 3, 3), (3, 2, 1, 1))
    masks = job.masks["unet"]
    fc = was["fc.weight"] + masks["fc.weight"] * torch.einsum("or,ri->oi", b_fc, a_fc)
    product = torch.einsum("kr,rcyx->kcyx", b_conv[:, :, 0, 0], a_conv)
    conv = was["conv.weight"] + masks["conv.weight"] * product
    adapters.finish()
    torch.testing.assert_close(unet.fc.weight, fc)
    torch.testing.assert_close(unet.conv.weight, conv)


def test_only_adapters_are_trained() -> None:
    job = make_job(rank=1)
    Adapters(job)
    names = {f"unet.{layer}.lora_{ab}.masked.weight" for layer in ("fc", "conv") for ab in "AB"}
    assert job.parameters().keys() == names
    job.students["unet"](X).sum().backward()
    graded = {f"unet.{n}" for n, p in job.students["unet"].named_parameters() if p.grad is not None}
    assert graded == names


def test_begins_as_the_pruned_model_and_by_the_seed() -> None:
    start = make_job().students["unet"](X)

    def first(seed: int) -> dict[str, Tensor]:
        job = make_job(seed=seed)
        state = torch.get_rng_state()
        Adapters(job)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(job.students["unet"](X), start)
        return {k: p.detach() for k, p in job.parameters().items()}

    one, again, other = first(7), first(7), first(8)
    assert all(torch.equal(one[k], again[k]) for k in one)
    key = "unet.fc.lora_A.masked.weight"
    assert not torch.equal(one[key], other[key])


def test_half_precision_trains_what_is_merged() -> None:
    job = make_job()
    adapters, unet = trained(job), job.students["unet"]
    with torch.autocast("cpu", torch.bfloat16):
        output = unet(X)
    adapters.finish()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(unet(X), output)
    assert output.dtype == torch.bfloat16


def test_a_zero_that_does_not_hold_is_noticed() -> None:
    job = make_job()
    unet: Any = job.students["unet"]
    adapters = Adapters(job)
    zero = (~job.masks["unet"]["conv.weight"]).nonzero()[0]
    unet.conv.base_layer.weight.data[tuple(zero)] = 0.1
    with pytest.raises(SdcompressError, match=r"unet\.conv\.weight: .* not zero after step 5"):
        adapters.after_step(4)
    with pytest.raises(SdcompressError, match="after the last step"):
        adapters.finish()
    with pytest.raises(SdcompressError, match="after the checkpoint"):
        adapters.restore({})
