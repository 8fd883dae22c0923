"""Weights under fixed masks, matched to the dense model on its own denoising trajectories.

Prompts are all it needs. A pool of trajectories, one a sample of the batch, each at a step of its
own, is driven by the dense model with classifier-free guidance. At every step the student is given
the same inputs, and learns what the dense model predicted and what its blocks put out on the way:
no forward of the dense model is wasted, and a batch holds all levels of noise.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdcompress.evaluation.images import initial_latents, load_scheduler, step_arguments
from sdcompress.models.denoising import seeded
from sdcompress.tuning._job import Job
from sdcompress.tuning._loop import Loss, fit

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


def tune(job: Job) -> None:
    fit(job, distillation_loss(job), Trajectories(job))


def distillation_loss(job: Job) -> Loss:
    """The student's relative errors on what `Trajectories` draws: of the noise prediction, plus
    `features` times the mean over the blocks of the UNet and, where the text encoder is tuned, the
    mean over its layers. Gradients reach the text encoder through the UNet as well.
    """
    import torch

    students, weight = job.students, job.settings.features
    unet = Tapped(students["unet"])

    def loss(batch: dict[str, Any]) -> Tensor:
        targets = batch["targets"]
        text = torch.zeros((), device=targets[0].device)
        if "ids" in batch:
            states = hidden_states(students["text_encoder"], batch["ids"])
            guided = len(targets[0]) > len(batch["ids"])
            pairs = zip(states, batch["states"], strict=True)
            text = torch.stack([_text_error(s, t, guided) for s, t in pairs]).mean()
            prompts = _both_halves(states[-1]) if guided else states[-1]
        else:
            prompts = batch["prompts"]
        outputs = unet(batch["latents"], batch["times"], prompts)
        errors = [relative_error(o, t) for o, t in zip(outputs, targets, strict=True)]
        return errors[0] + weight * (torch.stack(errors[1:]).mean() + text)

    return loss


def relative_error(student: Tensor, dense: Tensor) -> Tensor:
    """Σ(student − dense)² / Σ dense² of each sample (first axis), averaged over the samples."""
    student, dense = student.float().flatten(1), dense.float().flatten(1)
    scale = dense.square().mean(1).clamp_min(1e-12)
    return ((student - dense).square().mean(1) / scale).mean()


def _text_error(student: Tensor, dense: Tensor, guided: bool) -> Tensor:
    """Of states [prompts, tokens, width], every token by itself: some are a hundred times larger.

    With guidance the first is the empty prompt's, and half of what the UNet sees.
    """
    if guided:
        rest = _text_error(student[1:], dense[1:], False)
        return (_text_error(student[:1], dense[:1], False) + rest) / 2
    return relative_error(student.flatten(0, 1), dense.flatten(0, 1))


def _both_halves(prompts: Tensor) -> Tensor:
    """[1 + n, tokens, width], the empty prompt first -> [2n, tokens, width], as guidance needs."""
    import torch

    return torch.cat([prompts[:1].expand(len(prompts) - 1, -1, -1), prompts[1:]])


def hidden_states(text_encoder: Module, ids: Tensor) -> list[Tensor]:
    """[prompts, tokens, width] after each layer, and last what the UNet reads."""
    output = text_encoder(ids, output_hidden_states=True)
    return [*output.hidden_states, output.last_hidden_state]


class Tapped:
    """A UNet that also gives what its blocks put out on the way."""

    def __init__(self, unet: Any) -> None:
        self._unet = unet
        self._seen: list[Tensor] = []
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            block.register_forward_hook(self._see)

    def _see(self, module: Module, inputs: Any, output: Any) -> None:
        self._seen.append(output[0] if isinstance(output, tuple) else output)

    def __call__(self, latents: Tensor, times: Tensor, prompts: Tensor) -> list[Tensor]:
        """The noise prediction, then the blocks in their order: [samples, channels, h, w] each."""
        self._seen.clear()
        (prediction,) = self._unet(latents, times, prompts, return_dict=False)
        seen, self._seen = self._seen, []
        return [prediction, *seen]


@dataclass
class _Slot:
    """A trajectory under way: which one of the tuning's, the step to make next, the one not to."""

    number: int
    step: int
    end: int
    latents: Tensor  # [1, channels, h, w]
    scheduler: Any
    ids: Tensor  # [1, tokens]
    dense: Tensor  # [1, tokens, width], what the dense model reads
    student: Tensor  # and the student, unless its text encoder is being tuned


class Trajectories:
    """The pool, from which `_loop.fit` draws.

    Sample i of a batch is always slot i. Its k-th trajectory is number i + k * batch, and that
    alone decides its prompt and its noise. The first ones are broken off, each at another step, so
    that from then on the slots are spread over all of them.
    """

    def __init__(self, job: Job) -> None:
        settings = job.settings
        unet: Any = job.teachers["unet"]
        self._job, self._device = job, job.accelerator.device
        self._guided = job.guidance > 1
        self._reads = "text_encoder" in job.components
        self._fresh = load_scheduler(job.dense.path / "scheduler")
        self._fresh.set_timesteps(job.sampling_steps)
        self._length = len(self._fresh.timesteps)
        self._prompts = job.prompts(settings.batch * (2 + settings.steps // self._length))
        side = unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        self._shape = (unet.config.in_channels, height, width)
        self._teacher = Tapped(unet)
        self._slots: dict[int, _Slot] = {}
        self._empty = self._read("")

    def draw(self, step: int, indices: range) -> dict[str, Any]:
        """Inputs and targets. With guidance the first half is without the prompt, the other with.

        latents, times, and `targets`: the dense model's prediction and block outputs. The student
        reads `prompts`; if its text encoder is tuned, `ids`, and `states` are its own targets.
        """
        import torch

        with torch.no_grad():
            slots = [self._slot(i) for i in indices]
            times = [self._fresh.timesteps[s.step] for s in slots]
            inputs = [
                s.scheduler.scale_model_input(s.latents, t)
                for s, t in zip(slots, times, strict=True)
            ]
            copies = 2 if self._guided else 1
            batch: dict[str, Any] = {
                "latents": torch.cat(inputs * copies),
                "times": torch.stack(times * copies).to(self._device),
            }
            dense = self._prompted([s.dense for s in slots], self._empty[1])
            batch["targets"] = self._teacher(batch["latents"], batch["times"], dense)
            if self._reads:
                empty = [self._empty[0]] if self._guided else []
                batch["ids"] = torch.cat([*empty, *(s.ids for s in slots)])
                batch["states"] = hidden_states(self._job.teachers["text_encoder"], batch["ids"])
            else:
                batch["prompts"] = self._prompted([s.student for s in slots], self._empty[2])
            self._advance(slots, batch["targets"][0].float())
        return batch

    def _prompted(self, prompts: Sequence[Tensor], empty: Tensor) -> Tensor:
        import torch

        return torch.cat([empty] * len(prompts) + [*prompts] if self._guided else [*prompts])

    def _advance(self, slots: Sequence[_Slot], prediction: Tensor) -> None:
        """One denoising step of every slot, by the dense model's guided prediction."""
        if self._guided:
            without, prompted = prediction.chunk(2)
            prediction = without + self._job.guidance * (prompted - without)
        for slot, noise in zip(slots, prediction.unsqueeze(1), strict=True):
            generator = seeded(self._job.settings.seed, "step", slot.number, slot.step)
            slot.latents = slot.scheduler.step(
                noise,
                self._fresh.timesteps[slot.step],
                slot.latents,
                **step_arguments(slot.scheduler, generator),
                return_dict=False,
            )[0]
            slot.step += 1

    def _slot(self, index: int) -> _Slot:
        """The slot of a sample, on its next trajectory if the last one is done."""
        batch = self._job.settings.batch
        slot = self._slots.get(index)
        if slot is None:
            first = 1 + index * self._length // batch
            slot = self._slots[index] = self._start(index, first)
        elif slot.step == slot.end:
            slot = self._slots[index] = self._start(slot.number + batch, self._length)
        return slot

    def _start(self, number: int, end: int) -> _Slot:
        scheduler = copy.deepcopy(self._fresh)
        noise = initial_latents(seeded(self._job.settings.seed, "start", number), self._shape)
        latents = (noise * scheduler.init_noise_sigma).to(self._device)
        ids, dense, student = self._read(self._prompts[number % len(self._prompts)])
        return _Slot(number, 0, end, latents, scheduler, ids, dense, student)

    def _read(self, prompt: str) -> tuple[Tensor, Tensor, Tensor]:
        """A prompt's ids, and what the dense model's and the student's text encoder make of it."""
        import torch

        ids = self._job.tokenizer(
            prompt,
            padding="max_length",
            max_length=self._job.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(self._device)
        with torch.no_grad():
            encoders = (self._job.teachers["text_encoder"], self._job.students["text_encoder"])
            dense, student = (encoder(ids).last_hidden_state.float() for encoder in encoders)
        return ids, dense, student

    def state(self) -> dict[int, Any]:
        """Where each slot is; its prompt is read again."""
        return {
            index: {
                "number": slot.number,
                "step": slot.step,
                "end": slot.end,
                "latents": slot.latents,
                "scheduler": _changes(slot.scheduler, self._fresh),
            }
            for index, slot in self._slots.items()
        }

    def restore(self, state: dict[int, Any]) -> None:
        from accelerate.utils import send_to_device

        self._slots = {}
        for index, saved in state.items():
            slot = self._start(saved["number"], saved["end"])
            slot.step, slot.latents = saved["step"], saved["latents"].to(self._device)
            vars(slot.scheduler).update(send_to_device(saved["scheduler"], self._device))
            self._slots[index] = slot


def _changes(scheduler: Any, fresh: Any) -> dict[str, Any]:
    """What a scheduler's steps have left in it."""
    before = vars(fresh)
    return {k: v for k, v in vars(scheduler).items() if not _same(v, before.get(k))}


def _same(a: Any, b: Any) -> bool:
    import numpy as np
    import torch

    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.array_equal(a, b)
    return bool(type(a) is type(b) and a == b)
