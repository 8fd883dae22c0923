"""One training loop for every stage: deterministic, resumable, with a moving average of weights.

Batch `i` depends on the seed, `i` and the rank alone, so a run that was killed goes on exactly
where its last checkpoint left it, and a run repeated on the same machine gives the same weights.

Started by torchrun, every rank works on its own part of the batch and gradients are averaged. On
a CPU shared with other work, ranks of one thread are faster than one rank of many: they wait for
each other once a step instead of once an operation.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

LossFn = Callable[[int, torch.Generator], dict[str, Tensor]]
"""(step, generator) -> named scalars; their entry 'loss' is minimised."""


def rank() -> int:
    """This process among those of torchrun; 0 without it."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the ranks, in one exchange."""
    if world() == 1:
        return
    flat = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    flat /= world()
    start = 0
    for p in parameters:
        if p.grad is not None:
            p.grad.copy_(flat[start : start + p.numel()].view_as(p))
            start += p.numel()


def draw(seed: int, step: int) -> int:
    """The seed of one rank's part of one batch."""
    return (seed * 1_000_003 + step) * world() + rank()


def save_atomic(state: object, path: Path) -> None:
    """Write a checkpoint so that a kill leaves the old file or the new one, never a half."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def learning_rate(
    step: int, steps: int, peak: float, warmup: int, horizon: int, cooldown: int
) -> float:
    """Linear warm-up to `peak`, then half a cosine towards 2 % of it at step `horizon`.

    Training that ends before `horizon` goes down to nothing in its last `cooldown` steps.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, horizon - warmup))
    rate = peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
    return rate * min(1.0, (steps - step) / cooldown) if cooldown else rate


def fit(
    name: str,
    model: nn.Module,
    loss_fn: LossFn,
    *,
    steps: int,
    lr: float,
    work: Path,
    seed: int,
    weight_decay: float = 0.01,
    warmup: int = 200,
    horizon: int | None = None,
    cooldown: int = 0,
    ema_decay: float = 0.999,
    save_every: int = 500,
    hook: Callable[[int], None] | None = None,
    hook_every: int = 1000,
) -> dict[str, float]:
    """Train `model` in place and leave the moving average of its weights in it.

    Returns the seconds spent and the steps done. `hook(step)` sees the averaged weights.
    Checkpoints lie in `work/name.pt`; a finished one makes the call return at once.
    """
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"{name}.pt"
    log = work / f"{name}.log"
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    average = [p.detach().clone() for p in parameters]
    first, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average = state["average"]
        first, seconds = state["step"], state["seconds"]

    def swap() -> None:
        for p, a in zip(parameters, average, strict=True):
            kept = p.detach().clone()
            p.data.copy_(a)
            a.copy_(kept)

    def say(step: int, values: dict[str, float]) -> None:
        if rank():
            return
        shown = " ".join(f"{k}={v:.4f}" for k, v in values.items())
        with log.open("a") as stream:
            stream.write(f"{name} {step}/{steps} {shown} {seconds:.0f}s\n")

    sums: dict[str, float] = {}
    model.train()
    for step in range(first, steps):
        started = time.perf_counter()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup, horizon or steps, cooldown)
        generator = torch.Generator().manual_seed(draw(seed, step))
        values = loss_fn(step, generator)
        values["loss"].backward()
        average_gradients(parameters)
        values["norm"] = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        # The average forgets the random start sooner than a constant decay would.
        beta = min(ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - beta)
        for key, value in values.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        seconds += time.perf_counter() - started
        done = step + 1
        if done % 50 == 0:
            say(done, {k: v / 50 for k, v in sums.items()})
            sums = {}
        if rank() == 0 and (done % save_every == 0 or done == steps):
            save_atomic(
                {
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "average": average,
                    "step": done,
                    "seconds": seconds,
                },
                path,
            )
        if rank() == 0 and hook is not None and (done % hook_every == 0 or done == steps):
            swap()
            model.eval()
            hook(done)
            model.train()
            swap()
    swap()
    model.eval()
    return {"steps": steps, "seconds": round(seconds, 1)}
