"""Times one engine of torch_cuda at one size, in a process of its own, for `full_size.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from export.backends.torch_cuda import BACKEND
from export.bench_worker import QUIET, DevicePeak
from export.pipeline import Geometry
from export.residency import Components
from export.specs import COMPONENTS, Sizes, component_spec, make_inputs
from sdcompress.catalog import read_config
from sdcompress.errors import SdcompressError


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    engine, details = Path(job["engine"]), job["details"]
    sizes = Sizes(**job["sizes"])
    _, height, width = Geometry.read(engine).latent_shape(sizes.height, sizes.width)
    if why := BACKEND.why_not_run(details):
        raise SdcompressError(why)
    feeds = {}
    for component in COMPONENTS:
        config = read_config(engine / component)
        feeds[component] = make_inputs(
            component_spec(component, config),
            config,
            details["dtype"],
            batch=sizes.batch(component),
            height=height,
            width=width,
        )
    result: dict[str, Any] = {}
    memory: dict[str, dict[str, int]] = {}
    with (
        DevicePeak(True) as device,
        Components(lambda c: BACKEND.open(engine, c, details), "resident") as components,
    ):
        for component in COMPONENTS:
            with components.use(component) as runner:
                for _ in range(job["warm_up"]):
                    runner.infer(feeds[component])
                memory[component] = runner.device_memory() or {}
        device.stop()
        print(QUIET, flush=True)
        for component in COMPONENTS:
            with components.use(component) as runner:
                result[component] = []
                for _ in range(job["iterations"]):
                    runner.infer(feeds[component])
                    result[component].append(runner.gpu_milliseconds)
    result["memory"] = {**memory, "peak": device.peak}
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SdcompressError as error:
        sys.exit(str(error))
