"""Times the UNet of one engine, in a process of its own, for `speed.py`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from export.backends import load_backend
from export.bench_worker import QUIET
from export.specs import component_spec, make_inputs
from sdcompress.catalog import read_config
from sdcompress.errors import SdcompressError
from sdcompress.measure import anonymous_bytes

UNET = "unet"


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    engine, details = Path(job["engine"]), job["details"]
    config = read_config(engine / UNET)
    spec, size = component_spec(UNET, config), config["sample_size"]
    feeds = make_inputs(spec, config, "fp32", batch=job["batch"], height=size, width=size)
    backend = load_backend(details["backend"])
    if why := backend.why_not_run(details):  # imports the runtime, so that loading is without it
        raise SdcompressError(why)
    result: dict[str, Any] = {UNET: [], "before_bytes": anonymous_bytes(os.getpid())}
    with backend.open(engine, UNET, details) as runner:
        runner.infer(feeds)
        print(QUIET, flush=True)
        for number in range(-job["warm_up"], job["iterations"]):
            start = time.perf_counter()
            runner.infer(feeds)
            if number >= 0:
                result[UNET].append((time.perf_counter() - start) * 1000)
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SdcompressError as error:
        sys.exit(str(error))
