"""SR-STE: the step against its formula, masks that move, and what they satisfy in the end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdcompress.errors import SdcompressError
from sdcompress.patterns import violations
from sdcompress.plan import LayerPlan
from sdcompress.recipe import Tune
from sdcompress.tuning import sr_ste
from sdcompress.tuning._job import Job
from sdcompress.tuning.sr_ste import MovingMasks

DENSE = torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.5, 0.25, -0.75, 1.0]])
KEPT = torch.tensor([[True, True, False, False], [False, False, True, True]])
# What the parent made of it: it kept the smaller half of the first row, and tuned one weight.
PARENT = torch.tensor([[1.5, -2.0, 0.0, 0.0], [0.0, 0.0, -0.75, 1.0]])


def make_job(
    dense: dict[str, Tensor],
    parent: dict[str, Tensor],
    pattern: str = "2:4",
    zeros: dict[str, int] | None = None,
    asked: float = 0.5,
    criterion: str = "magnitude",
    scale: float | None = None,
) -> Job:
    """Layers without biases, named by their keys, as a UNet that was pruned."""

    def model(weights: dict[str, Tensor]) -> nn.Module:
        made = nn.ModuleDict()
        for name, weight in weights.items():
            out, features, *kernel = weight.shape
            layer: nn.Module = nn.Linear(features, out, bias=False)
            if kernel:
                layer = nn.Conv2d(features, out, tuple(kernel), bias=False)
            layer.weight = nn.Parameter(weight.clone())
            made[name] = layer
        return made

    layers = {
        f"{name}.weight": LayerPlan(
            component="unet",
            name=f"{name}.weight",
            kind="linear" if weight.dim() == 2 else "conv",
            shape=tuple(weight.shape),
            dtype="F32",
            rule=0,
            criterion=criterion,
            pattern=pattern,
            axis=1,
            asked=asked,
            sparsity=asked,
            zeros=(zeros or {}).get(name, weight.numel() // 2),
        )
        for name, weight in dense.items()
    }
    other: Any = SimpleNamespace()
    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    job = Job(
        Tune(method="sr_ste", decay=0.1),
        parent=other,
        dense=other,
        plan=other,
        components=("unet",),
        students={"unet": model(parent)},
        layers={"unet": layers},
        masks={"unet": {f"{name}.weight": weight != 0 for name, weight in parent.items()}},
        accelerator=SimpleNamespace(scaler=scaler),
    )
    job.__dict__["teachers"] = {"unet": model(dense)}
    return job


X, SLOPES = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 3.0])


def loss(job: Job) -> Tensor:
    """2·y₀ + 3·y₁ of y = W·(1, 2, 3, 4)."""
    unet: Any = job.students["unet"]
    y: Tensor = unet["fc"](X)
    return (SLOPES * y).sum()


def original(job: Job) -> Tensor:
    (parameter,) = job.parameters().values()
    return parameter


def test_the_first_forward_is_the_parents() -> None:
    job = make_job({"fc": DENSE}, {"fc": PARENT})
    expected = float(loss(job).detach())
    MovingMasks(job)
    assert float(loss(job).detach()) == expected == 2 * (1.5 - 4) + 3 * (-2.25 + 4)
    # Below the mask: the parent where it kept, the dense model where it pruned.
    assert original(job).tolist() == [[1.5, -2.0, 3.0, -4.0], [0.5, 0.25, -0.75, 1.0]]


def test_the_gradient_is_the_formula() -> None:
    job = make_job({"fc": DENSE}, {"fc": PARENT})
    keeper = MovingMasks(job)
    loss(job).backward()
    # Straight through: the slope of every weight, masked or not.
    straight = [[2.0, 4.0, 6.0, 8.0], [3.0, 6.0, 9.0, 12.0]]
    assert original(job).grad.tolist() == straight
    keeper.after_backward()
    # λ = 0.1 of the dense weights where the mask is 0: 3, −4 above and 0.5, 0.25 below.
    expected = [[2.0, 4.0, 6.3, 7.6], [3.05, 6.025, 9.0, 12.0]]
    torch.testing.assert_close(original(job).grad, torch.tensor(expected))


def test_the_mask_follows_the_step() -> None:
    job = make_job({"fc": DENSE}, {"fc": PARENT})
    keeper = MovingMasks(job)
    loss(job).backward()
    keeper.after_backward()
    torch.optim.SGD(job.parameters().values(), lr=0.1).step()
    keeper.after_step(0)
    w = [[1.3, -2.4, 2.37, -4.76], [0.195, -0.3525, -1.65, -0.2]]
    torch.testing.assert_close(original(job).detach(), torch.tensor(w))
    keeper.finish()
    unet: Any = job.students["unet"]
    final = torch.tensor([[0.0, -2.4, 0.0, -4.76], [0.0, -0.3525, -1.65, 0.0]])
    torch.testing.assert_close(unet["fc"].weight.detach(), final)
    mask = [[False, True, False, True], [False, True, True, False]]
    assert job.masks["unet"]["fc.weight"].tolist() == mask
    assert job.details == {"revived": 0.5}  # the −4 above and the 0.25 below, of four
    assert list(unet.state_dict()) == ["fc.weight"]
    assert type(unet["fc"]) is nn.Linear


def test_a_batch_in_parts_decays_once() -> None:
    whole, parts = (make_job({"fc": DENSE}, {"fc": PARENT}) for _ in range(2))
    keepers = MovingMasks(whole), MovingMasks(parts)
    loss(whole).backward()
    (loss(parts) / 2).backward()
    (loss(parts) / 2).backward()
    for keeper in keepers:
        keeper.after_backward()
    assert torch.equal(original(whole).grad, original(parts).grad)


def test_the_decay_is_scaled_like_the_loss() -> None:
    plain = make_job({"fc": DENSE}, {"fc": PARENT})
    scaled = make_job({"fc": DENSE}, {"fc": PARENT}, scale=1024.0)
    for job, factor in ((plain, 1.0), (scaled, 1024.0)):
        keeper = MovingMasks(job)
        (loss(job) * factor).backward()
        keeper.after_backward()
    torch.testing.assert_close(original(scaled).grad, original(plain).grad * 1024.0)


def train(job: Job, keeper: MovingMasks, steps: int = 20) -> list[Tensor]:
    """Pull the layers to random weights; gives the zeros of the first layer after each step."""
    torch.manual_seed(0)
    unet: Any = job.students["unet"]
    goals = [torch.randn(layer.weight.shape) for layer in unet.values()]
    optimizer = torch.optim.AdamW(job.parameters().values(), 0.05)
    seen = []
    for step in range(steps):
        pairs = zip(unet.values(), goals, strict=True)
        sum((layer.weight - goal).square().mean() for layer, goal in pairs).backward()
        keeper.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        keeper.after_step(step)
        seen.append(next(iter(unet.values())).weight.detach() == 0)
    return seen


def test_masks_move_and_keep_n_of_m_along_the_reduction_axis() -> None:
    torch.manual_seed(3)
    dense = {"conv": torch.randn(4, 8, 3, 3), "fc": torch.randn(6, 8)}
    # Pruned in another way than by size: the first two of every four input channels went.
    parent = {k: w.clone() for k, w in dense.items()}
    for weight in parent.values():
        weight[:, [0, 1, 4, 5]] = 0.0
    job = make_job(dense, parent)
    was = {k: m.clone() for k, m in job.masks["unet"].items()}
    keeper = MovingMasks(job)
    zeros = train(job, keeper)
    assert not torch.equal(zeros[0], ~was["conv.weight"])
    assert not torch.equal(zeros[0], zeros[-1])
    keeper.finish()
    for name, layer in job.students["unet"].named_children():
        weight = layer.weight.detach()
        assert isinstance(weight, Tensor)
        groups = (weight != 0).movedim(1, -1).reshape(-1, 4).sum(1)
        assert groups.tolist() == [2] * (weight.numel() // 4)
        assert torch.equal(job.masks["unet"][f"{name}.weight"], weight != 0)


@pytest.mark.parametrize("zeros", [0, 7, 24])
def test_unstructured_keeps_the_number_of_zeros_that_was_planned(zeros: int) -> None:
    torch.manual_seed(3)
    dense = {"fc": torch.randn(4, 6)}
    parent = {"fc": dense["fc"].clone()}
    parent["fc"].view(-1)[:zeros] = 0.0
    job = make_job(dense, parent, "unstructured", {"fc": zeros}, asked=zeros / 24)
    keeper = MovingMasks(job)
    if zeros == 24:
        keeper.finish()
    else:
        moved = train(job, keeper)
        assert {int(z.sum()) for z in moved} == {zeros}
        keeper.finish()
    weight = job.students["unet"].get_parameter("fc.weight").detach()
    assert int((weight == 0).sum()) == zeros
    assert not weight.signbit()[weight == 0].any()  # +0.0, as everywhere


def test_criteria_that_compare_within_rows_keep_doing_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sr_ste, "load_criterion", lambda name: SimpleNamespace(compare="row"))
    dense = {"fc": torch.tensor([[1.0, 2.0, 3.0, 4.0], [50.0, 60.0, 70.0, 80.0]])}
    parent = {"fc": dense["fc"] * torch.tensor([1.0, 0.0, 1.0, 1.0])}
    # Three zeros in two rows of four: rows give the same share, to within one weight.
    job = make_job(dense, parent, "unstructured", {"fc": 3}, asked=0.375)
    keeper = MovingMasks(job)
    keeper.finish()
    weight = job.students["unet"].get_parameter("fc.weight")
    assert weight.tolist() == [[0.0, 2.0, 3.0, 4.0], [0.0, 0.0, 70.0, 80.0]]


def test_going_on_from_a_checkpoint_chooses_the_same_masks() -> None:
    torch.manual_seed(3)
    dense = {"fc": torch.randn(4, 8)}
    parent = {"fc": dense["fc"] * (torch.arange(8) % 4 < 2)}
    job, again = make_job(dense, parent), make_job(dense, parent)
    keeper = MovingMasks(job)
    last = train(job, keeper)[-1]
    resumed = MovingMasks(again)
    original(again).data.copy_(original(job).detach())
    resumed.restore(keeper.state())
    assert torch.equal(again.students["unet"].get_submodule("fc").weight == 0, last)


def test_a_broken_pattern_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job({"fc": DENSE}, {"fc": PARENT})
    keeper = MovingMasks(job)
    everything = torch.ones(2, 4, dtype=torch.bool)
    monkeypatch.setattr(sr_ste, "keep_mask", lambda *_: everything)
    with pytest.raises(SdcompressError, match=r"unet\.fc\.weight: 2 groups break .* 2:4 after ste"):
        keeper.after_step(0)
    assert violations(DENSE, sr_ste.parse_pattern("2:4")) == 2
    loose = make_job({"fc": DENSE}, {"fc": PARENT}, "unstructured")
    with pytest.raises(SdcompressError, match="0 zeros where 4 are planned after the last step"):
        MovingMasks(loose).finish()
