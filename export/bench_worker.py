"""Measures one engine in a process of its own: `python -m export.bench_worker JOB RESULT`.

Imports only what an application that ships the engine needs (numpy and the backend), so that
memory and load time are the engine's. All numbers of the scheduler come with the job.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.backends import Runner, load_backend
from export.specs import COMPONENTS
from sdcompress.errors import SdcompressError

QUIET = "memory settled"  # as in sdcompress.measure, which is not imported: it would cost memory


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    result: dict[str, Any] = {}
    details = job["details"]
    backend = load_backend(details["backend"])
    # Imports the runtime, so that loading is timed without it.
    if why := backend.available():
        raise SdcompressError(why)
    with ExitStack() as stack:
        runners, load = {}, 0.0
        for component in COMPONENTS:
            runner = backend.open(Path(job["engine"]), component, details)
            started = time.perf_counter()
            runners[component] = stack.enter_context(runner)
            load += time.perf_counter() - started
        bench = Stages(job, runners)
        bench.picture(check=True)
        for _ in range(job["warm_up"]):
            for stage in bench.stages.values():
                stage()
        print(QUIET, flush=True)
        result["load"] = [load * 1000]
        for name, stage in bench.stages.items():
            result[name] = [_milliseconds(stage) for _ in range(job["iterations"][name])]
        result["device_memory"] = _device_memory(runners)
    Path(result_path).write_text(json.dumps(result))


class Stages:
    """The three components with the inputs of one guided picture, and the whole picture."""

    def __init__(self, job: dict[str, Any], runners: dict[str, Runner]) -> None:
        self._runners = runners
        self._steps: list[dict[str, float]] = job["steps"]
        self._guidance: float = job["guidance"]
        self._scaling_factor: float = job["scaling_factor"]
        self._tokens = np.asarray(job["token_ids"], np.int64)
        noise = np.random.default_rng(job["seed"]).standard_normal((1, *job["latent_shape"]))
        self._noise: NDArray[Any] = noise.astype(np.float32)
        self._context = self._encode()
        self.stages: dict[str, Callable[[], object]] = {
            "text_encoder": self._encode,
            "unet_step": lambda: self._predict(self._noise, self._steps[0]["timestep"]),
            "vae_decoder": lambda: self._decode(self._noise),
            "picture": self.picture,
        }

    def picture(self, check: bool = False) -> NDArray[np.uint8]:
        """Text to 8-bit pixels [H, W, 3] with the deterministic update x ← a·x + b·prediction."""
        self._context = self._encode()
        latents = self._noise
        for step in self._steps:
            predicted = self._predict(latents, step["timestep"])
            latents = step["a"] * latents + step["b"] * predicted
        pixels = self._decode(latents / self._scaling_factor)
        if check and not np.isfinite(pixels).all():
            raise SdcompressError(
                "the engine gave NaN or infinity, so its speed means nothing; export with dtype "
                "fp32, or prune less"
            )
        levels: NDArray[np.uint8] = (
            ((pixels[0] / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8)
        )
        return levels.transpose(1, 2, 0)

    def _encode(self) -> NDArray[Any]:
        return self._runners["text_encoder"].infer({"input_ids": self._tokens})["last_hidden_state"]

    def _predict(self, latents: NDArray[Any], timestep: float) -> NDArray[Any]:
        unet = self._runners["unet"]
        batch = len(self._tokens)
        output = unet.infer(
            {
                "sample": np.repeat(latents, batch, axis=0),
                "timestep": np.full((1,) * len(unet.inputs["timestep"].shape), timestep),
                "encoder_hidden_states": self._context,
            }
        )["out_sample"].astype(np.float32)
        if batch == 1:
            return output
        return output[:1] + self._guidance * (output[1:] - output[:1])

    def _decode(self, latents: NDArray[Any]) -> NDArray[np.float32]:
        output = self._runners["vae_decoder"].infer({"latent_sample": latents})["sample"]
        return output.astype(np.float32)


def _milliseconds(stage: Callable[[], object]) -> float:
    started = time.perf_counter()
    stage()
    return (time.perf_counter() - started) * 1000


def _device_memory(runners: dict[str, Runner]) -> dict[str, int] | None:
    total: dict[str, int] = {}
    for runner in runners.values():
        for name, size in (runner.device_memory() or {}).items():
            total[name] = total.get(name, 0) + size
    return total or None


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SdcompressError as error:
        sys.exit(str(error))
