"""Measures one engine in a process of its own: `python -m export.bench_worker JOB RESULT`.

Imports only what an application that ships the engine needs (numpy and the backend), so that
memory and load time are the engine's. All numbers of the scheduler come with the job.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.backends import Runner, load_backend
from export.residency import Components
from sdcompress.errors import SdcompressError

QUIET = "memory settled"  # as in sdcompress.measure, which is not imported: it would cost memory
SAMPLE_EVERY_S = 0.01
WALL_CLOCK, CUDA_EVENTS = "wall clock", "CUDA events"


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    details = job["details"]
    backend = load_backend(details["backend"])
    # Imports the runtime, so that loading is timed without it.
    if why := backend.why_not_run(details):
        raise SdcompressError(why)

    def open_runner(component: str) -> Runner:
        return backend.open(Path(job["engine"]), component, details)

    result: dict[str, Any] = {}
    with (
        DevicePeak(job["on_gpu"]) as device,
        Components(open_runner, job["residency"]) as components,
    ):
        bench = Stages(job, components)
        bench.picture(check=True)
        device.stop()
        print(QUIET, flush=True)
        if job["iterations"]:
            result |= bench.timed(job["iterations"], job["warm_up"])
        result["load"] = [sum(components.load_seconds.values()) * 1000]
        result["device_memory"] = bench.device_memory(device.peak)
    Path(result_path).write_text(json.dumps(result))


class Stages:
    """The three components with the inputs of one picture, and the whole picture."""

    def __init__(self, job: dict[str, Any], components: Components) -> None:
        self._components = components
        self._steps: list[dict[str, float]] = job["steps"]
        self._guidance: float = job["guidance"]
        self._scaling_factor: float = job["scaling_factor"]
        self._tokens = np.asarray(job["token_ids"], np.int64)
        noise = np.random.default_rng(job["seed"]).standard_normal((1, *job["latent_shape"]))
        self._noise: NDArray[Any] = noise.astype(np.float32)
        self._context: NDArray[Any] = self._noise  # until there is one
        self._memory: dict[str, dict[str, int] | None] = {}

    def picture(self, check: bool = False) -> NDArray[np.uint8]:
        """Text to 8-bit pixels [H, W, 3] with the deterministic update x ← a·x + b·prediction."""
        with self._use("text_encoder") as encoder:
            self._context = self._encode(encoder)
        latents = self._noise
        with self._use("unet") as unet:
            for step in self._steps:
                predicted = self._predict(unet, latents, step["timestep"])
                latents = step["a"] * latents + step["b"] * predicted
        with self._use("vae_decoder") as decoder:
            pixels = self._decode(decoder, latents / self._scaling_factor)
        if check and not np.isfinite(pixels).all():
            raise SdcompressError(
                "the engine gave NaN or infinity, so its speed means nothing; export with dtype "
                "fp32, or prune less"
            )
        levels: NDArray[np.uint8] = (
            ((pixels[0] / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8)
        )
        return levels.transpose(1, 2, 0)

    def timed(self, iterations: dict[str, int], warm_up: int) -> dict[str, Any]:
        """Milliseconds of every iteration of each stage, after a picture has been made.

        A component is timed by the accelerator's own events where it has them, the picture always
        by the clock: it is what a user waits for, loading included where that is part of it.
        """
        runs: dict[str, tuple[str, Callable[[Runner], object]]] = {
            "text_encoder": ("text_encoder", self._encode),
            "unet_step": (
                "unet",
                lambda unet: self._predict(unet, self._noise, self._steps[0]["timestep"]),
            ),
            "vae_decoder": ("vae_decoder", lambda decoder: self._decode(decoder, self._noise)),
        }
        result: dict[str, Any] = {"timer": WALL_CLOCK}
        # A component that is loaded anew has its first run before it again.
        first = 1 if self._components.residency == "sequential" else 0
        for stage, (component, run) in runs.items():
            with self._use(component) as runner:
                for _ in range(first + warm_up):
                    run(runner)
                result[stage] = []
                for _ in range(iterations[stage]):
                    clock = _milliseconds(lambda: run(runner))  # noqa: B023 - called at once
                    events = runner.gpu_milliseconds
                    result[stage].append(clock if events is None else events)
                    result["timer"] = WALL_CLOCK if events is None else CUDA_EVENTS
        for _ in range(warm_up):
            self.picture()
        result["picture"] = [_milliseconds(self.picture) for _ in range(iterations["picture"])]
        return result

    def device_memory(self, peak: int | None) -> dict[str, int] | None:
        """Of all components together, or where one is loaded at a time, of the largest."""
        held = [memory for memory in self._memory.values() if memory]
        if not held:
            return None
        of_all = sum if self._components.residency == "resident" else max
        names = sorted({name for memory in held for name in memory})
        total: dict[str, int] = {n: of_all(memory.get(n, 0) for memory in held) for n in names}
        return total if peak is None else {**total, "peak": peak}

    @contextmanager
    def _use(self, component: str) -> Iterator[Runner]:
        with self._components.use(component) as runner:
            yield runner
            if component not in self._memory:  # known once it has run
                self._memory[component] = runner.device_memory()

    def _encode(self, encoder: Runner) -> NDArray[Any]:
        return encoder.infer({"input_ids": self._tokens})["last_hidden_state"]

    def _predict(self, unet: Runner, latents: NDArray[Any], timestep: float) -> NDArray[Any]:
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

    def _decode(self, decoder: Runner, latents: NDArray[Any]) -> NDArray[np.float32]:
        return decoder.infer({"latent_sample": latents})["sample"].astype(np.float32)


class DevicePeak:
    """How far the accelerator's memory rises above what is taken when the block begins.

    Until `stop`; the whole accelerator is looked at, so nothing else should start on it meanwhile.
    `peak` is in bytes, None without an accelerator or a CUDA runtime to ask. What CUDA itself takes
    to start lies below the level it is compared with.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.peak: int | None = None
        self._used = _device_memory_used() if on_gpu else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> DevicePeak:
        if self._used:
            self._before = self._used()
            self.peak = 0
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        assert self._used is not None
        assert self.peak is not None
        stopping = False
        while not stopping:
            stopping = self._stop.wait(SAMPLE_EVERY_S)  # and then looks once more
            self.peak = max(self.peak, self._used() - self._before)


def _device_memory_used() -> Callable[[], int] | None:
    from export.device.cuda import Cuda
    from export.device.errors import DeviceError

    try:
        cuda = Cuda.load()
    except DeviceError:
        return None

    def used() -> int:
        free, total = cuda.mem_get_info()
        return total - free

    return used


def _milliseconds(stage: Callable[[], object]) -> float:
    started = time.perf_counter()
    stage()
    return (time.perf_counter() - started) * 1000


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SdcompressError as error:
        sys.exit(str(error))
