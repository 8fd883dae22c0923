"""The training loop on a model of one matrix: masks, checkpoints, divergence, precision, logs."""

from __future__ import annotations

import csv
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdcompress.errors import InputError, SdcompressError, UsageError
from sdcompress.models.denoising import seeded
from sdcompress.recipe import Tune
from sdcompress.tuning import _accelerator, _checkpoint
from sdcompress.tuning._job import Job
from sdcompress.tuning._log import log_path
from sdcompress.tuning._loop import FixedMasks, Watch, fit, share_out

MASK = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
TARGET = torch.tensor([[0.5, -1.0, 2.0, 0.0], [1.0, 1.0, -0.5, 0.25], [-2.0, 0.5, 1.0, 1.0]])


class Rows:
    """Seeded inputs, and a state that has to survive: how often each index was drawn."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.drawn: dict[int, Any] = {}

    def draw(self, step: int, indices: range) -> Tensor:
        if step == self.stop_at:
            raise KeyboardInterrupt
        for i in indices:
            self.drawn[i] = self.drawn.get(i, 0) + 1
        noise = [torch.randn(4, generator=seeded(step, i)) for i in indices]
        scaled = [row * (1 + self.drawn[i] % 3 / 10) for row, i in zip(noise, indices, strict=True)]
        return torch.stack(scaled)

    def state(self) -> dict[int, Any]:
        return dict(self.drawn)

    def restore(self, state: dict[int, Any]) -> None:
        self.drawn = dict(state)


def _job(folder: Path, progress: Callable[..., None] | None = None, **settings: Any) -> Job:
    folder.mkdir(exist_ok=True)
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight.copy_(MASK.float())
        linear.bias.zero_()
    tune = Tune(**{"steps": 12, "batch": 4, "learning_rate": 0.05, **settings})
    bundle: Any = SimpleNamespace(digest="a" * 64, path=folder)
    plan: Any = None
    return Job(
        tune,
        bundle,
        bundle,
        plan,
        ("unet",),
        {"unet": linear},
        {"unet": {}},
        {"unet": {"weight": MASK}},
        _accelerator(tune),
        folder / "checkpoint.pt",
        log_path(folder / "out", tune.log),
        progress or (lambda what, done, total: None),
    )


def _loss(job: Job) -> Callable[[Tensor], Tensor]:
    return lambda x: (job.students["unet"](x) - x @ TARGET.T).square().mean()


def _fit(job: Job, samples: Rows | None = None, **more: Any) -> dict[str, Tensor]:
    fit(job, _loss(job), samples or Rows(), **more)
    return {name: value.clone() for name, value in job.students["unet"].state_dict().items()}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((8, 1, 1, 0), [range(0, 8)]),
        ((8, 2, 1, 0), [range(0, 4), range(4, 8)]),
        ((8, 1, 2, 1), [range(4, 8)]),
        ((8, 2, 2, 0), [range(0, 2), range(4, 6)]),
        ((8, 2, 2, 1), [range(2, 4), range(6, 8)]),
    ],
)
def test_a_batch_is_cut_into_equal_pieces(
    asked: tuple[int, int, int, int], expected: list[range]
) -> None:
    assert share_out(*asked) == expected


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UsageError, match="a batch of 6 .* 2 processes in 2 parts .* multiple of 4"):
        share_out(6, 2, 2, 0)


def test_fit_learns_what_the_masks_allow(tmp_path: Path) -> None:
    job = _job(tmp_path, steps=100, batch=16, learning_rate=0.1, schedule="linear")
    weights = _fit(job)
    # With independent inputs the best masked weights are the target's own where they may live.
    assert torch.allclose(weights["weight"], TARGET * MASK, atol=0.2)
    assert not weights["weight"][~MASK].any()
    assert job.details["steps"] == 100
    assert job.details["final_loss"] < job.details["first_loss"]


def test_masks_hold_after_every_step(tmp_path: Path) -> None:
    seen = []

    class Spy(FixedMasks):
        def after_step(self, step: int) -> None:
            weight = job.students["unet"].weight
            seen.append((step, int((weight[~MASK] != 0).sum()), int((weight[MASK] != 1).sum())))
            super().after_step(step)

    job = _job(tmp_path, weight_decay=0.1, ema=0.9)
    _fit(job, keeper=Spy(job))
    assert seen == [(step, 0, 6) for step in range(12)]  # none revived, and all six trained


def test_a_zero_that_comes_alive_is_an_error(tmp_path: Path) -> None:
    class Broken(FixedMasks):
        def after_backward(self) -> None:
            pass

    job = _job(tmp_path)
    with pytest.raises(SdcompressError, match=r"unet\.weight: .* not zero after step 1; .* report"):
        _fit(job, keeper=Broken(job))


def test_two_parts_are_one_batch(tmp_path: Path) -> None:
    whole = _fit(_job(tmp_path / "a", batch=8))
    parts = _fit(_job(tmp_path / "b", batch=8, accumulate=2))
    assert torch.allclose(whole["weight"], parts["weight"], rtol=1e-5, atol=1e-6)
    assert not torch.equal(whole["weight"], MASK.float())


def test_the_moving_average_is_what_is_kept(tmp_path: Path) -> None:
    plain = _fit(_job(tmp_path / "a"))
    averaged = _fit(_job(tmp_path / "b", ema=0.9))
    # It lags behind: less far from where all began.
    assert (averaged["weight"] - MASK.float()).norm() < (plain["weight"] - MASK.float()).norm()
    assert not averaged["weight"][~MASK].any()


def test_bf16_trains_fp32_weights(tmp_path: Path) -> None:
    dtypes = []
    job = _job(tmp_path, mixed_precision="bf16")

    def loss(x: Tensor) -> Tensor:
        output = job.students["unet"](x)
        dtypes.append(output.dtype)
        return (output - x @ TARGET.T).float().square().mean()

    fit(job, loss, Rows())
    assert set(dtypes) == {torch.bfloat16}
    weight = job.students["unet"].weight
    assert weight.dtype == torch.float32
    assert not weight[~MASK].any()
    assert job.details["final_loss"] < job.details["first_loss"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can")
def test_fp16_is_refused_where_it_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fp16 needs a GPU; take bf16"):
        _job(tmp_path, mixed_precision="fp16")


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_stopped_training_goes_on_as_if_it_had_not(tmp_path: Path, ema: float | None) -> None:
    settings = {"ema": ema, "warmup": 3, "weight_decay": 0.01}
    straight = _job(tmp_path / "a", **settings)
    expected = _fit(straight)
    for _ in range(2):  # no checkpoint yet; then the one of step 5
        with pytest.raises(KeyboardInterrupt):
            _fit(_job(tmp_path / "b", checkpoint_every=5, **settings), Rows(stop_at=8))
        assert (tmp_path / "b" / "checkpoint.pt").is_file()
    again = _job(tmp_path / "b", checkpoint_every=3, **settings)
    first = []
    again.progress = lambda what, done, total: first.append((done, total))
    assert _same(_fit(again), expected)
    assert first[0] == (6, 12)
    assert again.details == straight.details
    table = _table(tmp_path / "b" / "out.csv")
    assert [int(row["step"]) for row in table] == list(range(1, 13))
    straight_table = _table(tmp_path / "a" / "out.csv")
    assert [row["loss"] for row in table] == [row["loss"] for row in straight_table]
    assert [row["learning_rate"] for row in table][:4] == ["0", "0.0166667", "0.0333333", "0.05"]


def _table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as f:
        return list(csv.DictReader(f))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _fit(_job(tmp_path, checkpoint_every=2), Rows(stop_at=4))
    with pytest.raises(UsageError, match=r"with learning_rate 0\.05, not 0\.1; .* --fresh"):
        _fit(_job(tmp_path, learning_rate=0.1))


def test_a_checkpoint_that_not_all_machines_see_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        _fit(_job(tmp_path, checkpoint_every=2), Rows(stop_at=4))
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: [*mine, True])
    with pytest.raises(UsageError, match="some processes find .* a folder that all machines share"):
        _fit(_job(tmp_path))


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"not one")
    with pytest.raises(InputError, match="checkpoint.pt: not a checkpoint .* --fresh"):
        _fit(_job(tmp_path))


class Exploding(Rows):
    """Inputs that leave all bounds at a step."""

    def __init__(self, at: int, factor: float) -> None:
        super().__init__()
        self._at, self._factor = at, factor

    def draw(self, step: int, indices: range) -> Tensor:
        return super().draw(step, indices) * (self._factor if step >= self._at else 1.0)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_diverging_loss_stops_with_the_last_good_weights(tmp_path: Path, factor: float) -> None:
    with pytest.raises(KeyboardInterrupt):
        _fit(_job(tmp_path / "good", checkpoint_every=5), Rows(stop_at=6))
    good = _checkpoint.read(tmp_path / "good" / "checkpoint.pt")
    assert good
    with pytest.raises(InputError, match=r"step 8, from .* good weights of step 5 are kept in .*"):
        _fit(_job(tmp_path, checkpoint_every=5), Exploding(7, factor))
    job = _job(tmp_path, checkpoint_every=5, on_divergence="keep")
    kept = _fit(job, Exploding(7, factor))
    assert torch.equal(kept["weight"], good["parameters"]["unet.weight"])
    assert (job.details["steps"], job.details["diverged_in_step"]) == (5, 8)


def test_a_loss_that_diverges_at_once_says_what_to_try(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="step 1, at once, before .* learning rate below 0.05"):
        _fit(_job(tmp_path, on_divergence="keep"), Exploding(0, float("nan")))


def test_no_checkpoint_is_made_of_a_loss_that_looks_bad(tmp_path: Path) -> None:
    job = _job(tmp_path, steps=60, checkpoint_every=1, learning_rate=1e-9)
    with pytest.raises(InputError, match="step 40, .* weights of step 20 are kept"):
        _fit(job, Exploding(20, 1e4))


@pytest.mark.parametrize(
    ("losses", "well"),
    [
        ([0.3] * 50, True),
        ([0.001, *[0.5] * 50], True),  # a lucky first sample
        ([0.3, *[0.3, 9.0] * 40], True),  # spikes that come back
        ([0.3, float("nan")], False),
        ([0.3] * 50 + [2.0] * 19, True),
        ([0.3] * 50 + [2.0] * 20, False),
        ([0.3, 7.0, 80.0, *[900.0] * 18], False),  # from the second step on
        ([30.0] * 50, True),  # a model pruned too far, that learns slowly
    ],
)
def test_what_counts_as_divergence(losses: list[float], well: bool) -> None:
    watch = Watch()
    assert [watch.add(loss) for loss in losses][-1] is well


@contextmanager
def _largest_file(nbytes: int) -> Iterator[None]:
    """Writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    expected = _fit(_job(tmp_path / "straight"))
    with pytest.raises(KeyboardInterrupt):
        _fit(_job(tmp_path, checkpoint_every=4), Rows(stop_at=5))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    message = "state after step 8 cannot be written .File too large.; the checkpoint before is kept"
    with _largest_file(1000), pytest.raises(InputError, match=message):
        _fit(_job(tmp_path, checkpoint_every=4))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert [p.name for p in tmp_path.glob(".*")] == []
    assert _same(_fit(_job(tmp_path, checkpoint_every=4)), expected)


def test_tensorboard_gets_the_losses(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = _job(tmp_path, log="tensorboard", steps=3)
    _fit(job)
    events = EventAccumulator(str(tmp_path / "out.tensorboard"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [e.step for e in losses] == [1, 2, 3]
    assert losses[0].value == pytest.approx(job.details["first_loss"])
