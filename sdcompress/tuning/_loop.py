"""The loop that every method which trains shares: `fit`.

The libraries do what they are good at: accelerate the devices, the processes and the precision,
diffusers the schedule and the moving average. What is added here is what pruning needs: masks that
are checked after every step, and a state on disk that a killed process goes on from as if it had
never stopped, on any number of processes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from sdcompress.bundle import tool_versions
from sdcompress.errors import InputError, SdcompressError, UsageError
from sdcompress.models.denoising import seeded
from sdcompress.tuning import _checkpoint
from sdcompress.tuning._job import Job
from sdcompress.tuning._log import open_log

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Loss = Callable[[Any], "Tensor"]


class Samples(Protocol):
    """What is learnt from. `draw` must be a function of the seed, the step and the indices (and of
    what `state` holds), never of how the indices are shared out among processes and parts.
    """

    def draw(self, step: int, indices: range) -> Any:
        """The samples `indices` (of 0 .. batch - 1) of optimiser step `step` (from 0), on the
        device, as tensors in dicts, lists or tuples. Called once for each index of a step."""

    def state(self) -> dict[int, Any]:
        """By sample index, what `draw` keeps from one step to the next, of the indices this process
        draws; {} where there is none. Tensors, numbers, strings, lists and dicts of them."""

    def restore(self, state: dict[int, Any]) -> None:
        """Take up the state of all indices, as it was when the next step is to be drawn."""


class Keeper(Protocol):
    """What must hold of the weights after every step. The standard one is `FixedMasks`; LoRA and
    methods that move their masks bring their own.

    Made before training starts, so it may change the students (adapters, parametrisations): what
    then requires a gradient is what is trained.
    """

    def after_backward(self) -> None:
        """The gradients of a step are complete (and averaged over processes), not yet clipped."""

    def after_step(self, step: int) -> None:
        """The optimiser has made step `step` (from 0): check what must hold.

        Raises:
            SdcompressError: it does not.
        """

    def finish(self) -> None:
        """Training (and its moving average) is done: leave plain students, without adapters, whose
        weights outside `job.masks` are zero."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the trained parameters; mostly {}."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take it up again; the parameters have been restored before."""


class FixedMasks:
    """Zeros stay: their gradients are dropped, so that AdamW, whose decay of a zero is zero, leaves
    them alone. That it did is looked at after every step.
    """

    def __init__(self, job: Job) -> None:
        parameters = job.parameters()
        self._pruned = {
            name: (parameters[name], ~mask)
            for component, masks in job.masks.items()
            for key, mask in masks.items()
            if (name := f"{component}.{key}") in parameters
        }

    def after_backward(self) -> None:
        for parameter, zero in self._pruned.values():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(zero, 0.0)

    def after_step(self, step: int) -> None:
        refuse_revived(self._pruned, f"step {step + 1}")

    def finish(self) -> None:
        refuse_revived(self._pruned, "the last step")

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        refuse_revived(self._pruned, "the checkpoint")


def refuse_revived(pruned: Mapping[str, tuple[Tensor, Tensor]], when: str) -> None:
    """Check weights, by name, against the places (True) where they must be zero.

    Raises:
        SdcompressError: one is not.
    """
    import torch

    if not pruned:
        return
    revived = torch.stack([((w != 0) & zero).any() for w, zero in pruned.values()])
    if revived.any():
        name = list(pruned)[int(revived.int().argmax())]
        raise SdcompressError(
            f"{name}: weights that were pruned are not zero after {when}; please report this"
        )


class Watch:
    """Tells when a loss will not come back by itself.

    That is once it is no number, or for PATIENCE steps in a row FAR times what is usual: the median
    of the last USUAL steps, at most what the first step had or, if that is more, the 1 that any
    loss here gives a model that predicts nothing.
    """

    FAR, PATIENCE, USUAL, FEW = 5.0, 20, 100, 10

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=self.USUAL)
        self._most = math.nan
        self.far = 0  # how many steps in a row

    def add(self, loss: float) -> bool:
        """Whether it still is well."""
        if not self._usual:
            self._most = max(1.0, loss)
        few = len(self._usual) < self.FEW
        usual = self._most if few else min(self._most, statistics.median(self._usual))
        if loss <= self.FAR * usual:
            self._usual.append(loss)
            self.far = 0
        else:
            self.far += 1
        return math.isfinite(loss) and self.far < self.PATIENCE


def fit(job: Job, loss: Loss, samples: Samples, *, keeper: Keeper | None = None) -> None:
    """Train `job.parameters()` by `settings.steps` optimiser steps, from the last checkpoint on.

    `loss(what samples.draw gave)` is the mean over those samples of each one's own loss, a scalar,
    and calls `job.students`; it runs under autocast where mixed precision is asked for. As a mean
    of independent samples it is the same however a batch is split over processes and parts.
    `keeper` is by default the adapters of `_lora` where a rank is asked for, else `FixedMasks`.

    Raises:
        UsageError: the batch cannot be shared out, or a checkpoint is of other settings.
        InputError: the loss diverges, or a checkpoint cannot be written; the line says what is
            kept.
    """
    import torch

    settings, accelerator = job.settings, job.accelerator
    training = _Training(job, loss, samples, keeper or _standard_keeper(job))
    training.resume()
    done = len(training.losses)
    main = accelerator.is_main_process
    log = open_log(job.log, settings.log, done) if main else nullcontext(_unlogged)
    with torch.random.fork_rng(devices=[]), log as write:
        for step in range(done, settings.steps):
            start = time.perf_counter()
            if (value := training.step(step)) is None:
                training.give_up(step)
                break
            write(step + 1, value, training.learning_rate, time.perf_counter() - start)
            job.progress(f"tuning, loss {value:.4g}", step + 1, settings.steps)
            if (step + 1) % settings.checkpoint_every == 0 and step + 1 < settings.steps:
                training.save()
    training.finish()


def _unlogged(*row: float) -> None:
    pass


def share_out(batch: int, accumulate: int, processes: int, process: int) -> list[range]:
    """The indices of a batch that one process draws, part after part.

    Raises:
        UsageError: the batch cannot be cut into so many equal pieces.
    """
    pieces = accumulate * processes
    if batch % pieces:
        raise UsageError(
            f"a batch of {batch} cannot be shared by {processes} processes in {accumulate} parts "
            f"each; give a multiple of {pieces}"
        )
    share = batch // pieces
    starts = [(part * processes + process) * share for part in range(accumulate)]
    return [range(start, start + share) for start in starts]


def _standard_keeper(job: Job) -> Keeper:
    if job.settings.lora_rank is None:
        return FixedMasks(job)
    from sdcompress.tuning._lora import Adapters

    return Adapters(job)


class _Training:
    """The state of a training: what a checkpoint holds, and what one step does to it."""

    def __init__(self, job: Job, loss: Loss, samples: Samples, keeper: Keeper) -> None:
        from diffusers.optimization import get_scheduler
        from torch.optim import AdamW

        settings, accelerator = job.settings, job.accelerator
        self._job, self._samples, self._keeper = job, samples, keeper
        self._parts = share_out(
            settings.batch,
            settings.accumulate,
            accelerator.num_processes,
            accelerator.process_index,
        )
        if settings.gradient_checkpointing:
            _checkpoint_gradients(job.students)
        self._parameters = job.parameters()
        optimizer = AdamW(
            self._parameters.values(), settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._module, self._optimizer = accelerator.prepare(_as_module(job, loss), optimizer)
        constant = "constant_with_warmup"
        self._schedule = get_scheduler(
            constant if settings.schedule == "constant" else settings.schedule,
            optimizer,
            num_warmup_steps=settings.warmup,
            num_training_steps=settings.steps,
        )
        self._average: Any = None
        if settings.ema is not None:
            from diffusers.training_utils import EMAModel

            self._average = EMAModel(self._parameters.values(), settings.ema)
        self.losses: list[float] = []
        self.learning_rate = 0.0  # of the last step made
        self._watch = Watch()
        self._saved = False

    def step(self, step: int) -> float | None:
        """One optimiser step; its loss over the whole batch, or None where it has diverged."""
        import torch

        settings, accelerator = self._job.settings, self._job.accelerator
        # For dropout and the like, of which SD2 has none.
        torch.manual_seed(
            seeded(settings.seed, "step", step, accelerator.process_index).initial_seed()
        )
        total = torch.zeros((), device=accelerator.device)
        for part, indices in enumerate(self._parts):
            with accelerator.autocast():
                batch = self._samples.draw(step, indices)
            last = part + 1 == len(self._parts)
            with nullcontext() if last else accelerator.no_sync(self._module):
                value = self._module(batch) / len(self._parts)
                accelerator.backward(value)
            total += value.detach()
        loss = float(accelerator.reduce(total, "mean"))
        self._keeper.after_backward()
        norm = accelerator.clip_grad_norm_(self._parameters.values(), settings.max_grad_norm)
        scaled = accelerator.scaler is not None  # then an infinite gradient is its daily bread
        if not self._watch.add(loss) or not (scaled or norm.isfinite()):
            return None
        self.learning_rate = float(self._schedule.get_last_lr()[0])
        self._optimizer.step()
        self._optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            self._schedule.step()
        if self._average:
            self._average.step(self._parameters.values())
        self._keeper.after_step(step)
        self.losses.append(loss)
        return loss

    def save(self) -> None:
        """Write the checkpoint, unless the loss looks bad just now: the last good one stays.

        Raises:
            InputError: it cannot be written; the last one is still there.
        """
        from accelerate.utils import broadcast_object_list, gather_object, send_to_device

        if self._watch.far:
            return
        job = self._job
        # Of all processes; a tensor on another machine's GPU could not be received here.
        samples = gather_object([send_to_device(self._samples.state(), "cpu")])
        failure: list[str | None] = [None]
        if job.accelerator.is_main_process:
            state = {
                "made_by": _made_by(job),
                "losses": self.losses,
                "parameters": {k: p.detach() for k, p in self._parameters.items()},
                "optimizer": self._optimizer.state_dict(),
                "schedule": self._schedule.state_dict(),
                "average": self._average.state_dict() if self._average else None,
                "scaler": job.accelerator.scaler.state_dict() if job.accelerator.scaler else None,
                "keeper": self._keeper.state(),
                "samples": {i: s for part in samples for i, s in part.items()},
            }
            failure = [_checkpoint.write(job.checkpoint, state)]
        broadcast_object_list(failure)
        if failure[0]:
            kept = "the checkpoint before is kept" if self._saved else "nothing else was lost"
            raise InputError(
                f"{job.checkpoint}: the state after step {len(self.losses)} cannot be written "
                f"({failure[0]}); {kept}: free some space and repeat the command to go on"
            )
        self._saved = True

    def resume(self) -> None:
        """Take up the checkpoint, if there is one.

        Raises:
            UsageError: it was made by other settings, from other models or with other tools, or
                other machines do not see it.
        """
        import torch
        from accelerate.utils import gather_object

        job = self._job
        state = _checkpoint.read(job.checkpoint)
        if len(set(gather_object([state is None]))) > 1:
            raise UsageError(
                f"{job.checkpoint}: some processes find this checkpoint and others none; write to "
                "a folder that all machines share"
            )
        if state is None:
            return
        if differs := _differences(state["made_by"], _made_by(job)):
            raise UsageError(
                f"{job.checkpoint}: is of a tuning with {differs}; repeat that command, or say "
                "--fresh to begin anew"
            )
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state["parameters"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        if self._average:
            self._average.load_state_dict(state["average"])
            self._average.to(job.accelerator.device)
        if job.accelerator.scaler:
            job.accelerator.scaler.load_state_dict(state["scaler"])
        self._keeper.restore(state["keeper"])
        self._samples.restore(state["samples"])
        self.losses, self._watch = [], Watch()
        for loss in state["losses"]:
            self.losses.append(loss)
            self._watch.add(loss)
        self._saved = True

    def give_up(self, step: int) -> None:
        """The loss has diverged in `step`: stop with the last good weights, or without any.

        Raises:
            InputError: unless the settings say to keep what is good, and something is.
        """
        job = self._job
        usual = f"from {statistics.median(self.losses):.3g}" if self.losses else "at once"
        said = f"the loss left all bounds in step {step + 1}, {usual}"
        lower = f"try a learning rate below {job.settings.learning_rate:g}"
        if not self._saved:
            raise InputError(f"{said}, before the first checkpoint; {lower}")
        self.resume()
        if job.settings.on_divergence == "stop":
            raise InputError(
                f"{said}; the good weights of step {len(self.losses)} are kept in "
                f"{job.checkpoint}: repeat with --on-divergence keep to make a bundle of them, or "
                f"with --fresh, and {lower}"
            )
        job.details["diverged_in_step"] = step + 1

    def finish(self) -> None:
        """Leave plain students, and say in the job's details how it went."""
        if self._average:
            self._average.copy_to(self._parameters.values())
        self._keeper.finish()
        tenth = max(1, len(self.losses) // 10)
        self._job.details |= {
            "steps": len(self.losses),
            "first_loss": statistics.fmean(self.losses[:tenth]),
            "final_loss": statistics.fmean(self.losses[-tenth:]),
        }


def _as_module(job: Job, loss: Loss) -> Module:
    """The students and their loss as one module, which is what accelerate wraps."""
    from torch import nn

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.students = nn.ModuleDict(job.students)

        def forward(self, batch: Any) -> Tensor:
            return loss(batch)

    return Step()


def _checkpoint_gradients(students: Mapping[str, Any]) -> None:
    students["unet"].enable_gradient_checkpointing()
    text_encoder = students["text_encoder"]
    # transformers 5 has renamed it.
    enable = getattr(text_encoder, "activation_checkpointing_enable", None)
    (enable or text_encoder.gradient_checkpointing_enable)({"use_reentrant": False})
    text_encoder.train()  # transformers does it for models in training only


def _made_by(job: Job) -> dict[str, Any]:
    return {
        **job.settings.decides(),
        "parent": job.parent.digest,
        "dense": job.dense.digest,
        "tools": tool_versions(),
    }


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first setting that changed, in words; empty if none did."""
    for key in now:
        if before.get(key) != now[key]:
            if key in ("parent", "dense", "tools", "prompts"):
                return f"another {key}" if key != "tools" else "other versions of the libraries"
            return f"{key} {before.get(key)}, not {now[key]}"
    return ""
