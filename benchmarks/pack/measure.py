"""Size and speed of `pack` and `unpack` on full-size bundles, beside `zstd -19`, `xz -6` and `cp`.

    python benchmarks/pack/measure.py dense=DIR paper=DIR 2:4=DIR --work DIR [--rounds 3]

Each NAME=DIR is a bundle or a diffusers directory. Every command is a cold process of its own,
followed by `sync`, files warm in the page cache; `cp` of the same files in turn with them shows
what the disk takes. The general compressors get the file `--peers-on` of each bundle that has it,
with two threads, once. The digest of what was unpacked is checked by `unpack` itself; here its
files are compared with the originals besides. Writes `results.json` and `results.csv` beside this
file.
"""

from __future__ import annotations

import argparse
import csv
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from export.bench import environment
from sdcompress.bundle import write_json
from sdcompress.measure import PeakMemory
from sdcompress.packing import Pack

SDCOMPRESS = [sys.executable, "-c", "from sdcompress.commands import main; main()"]
PEERS = {"zstd -19": ["zstd", "-19", "-T2", "-q", "-c"], "xz -6": ["xz", "-6", "-T2", "-c"]}


def measure(command: list[str], stdout: Path | None = None) -> dict[str, float]:
    """Run one command: seconds until it and a `sync` have ended, its processor seconds, peak bytes,
    and the bytes of what it wrote to `stdout`."""
    os.sync()
    before, start = os.times(), time.perf_counter()
    with (
        (stdout or Path(os.devnull)).open("wb") as out,
        subprocess.Popen(command, stdout=out) as process,
        PeakMemory(process.pid, every=0.1) as memory,
    ):
        code = process.wait()
    os.sync()
    seconds, after = time.perf_counter() - start, os.times()
    if code != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {code}")
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_mb": round(memory.peak / 1e6),
        "bytes": stdout.stat().st_size if stdout else 0,
    }


def same_files(packed: Path, source: Path, unpacked: Path) -> bool:
    with Pack(packed) as opened:
        names = [file.name for file in opened.index.files[1:]]
    return filecmp.cmpfiles(source, unpacked, names, shallow=False)[0] == names


def stored_bytes(packed: Path, file: str) -> int:
    with Pack(packed) as opened:
        found = next(f for f in opened.index.files if f.name == file)
    return sum(sum(part.stored) for part in found.parts)


def bundle_rounds(bundle: Path, work: Path, rounds: int) -> dict[str, Any]:
    """Pack, unpack and `cp` in turn; what `pack --json` said is under "sizes"."""
    packed, said, unpacked, copy = (work / n for n in ("model.sdz", "said.json", "unpacked", "cp"))
    pack = [*SDCOMPRESS, "pack", str(bundle), "-o", str(packed), "--json"]
    unpack = [*SDCOMPRESS, "unpack", str(packed), "-o", str(unpacked), "--json"]
    series: dict[str, list[dict[str, float]]] = {"pack": [], "unpack": [], "cp": []}
    for _ in range(rounds):
        packed.unlink(missing_ok=True)
        series["pack"].append(measure(pack, said))
        series["unpack"].append(measure(unpack))
        if not same_files(packed, bundle, unpacked):
            raise SystemExit(f"{bundle}: unpacked files differ")
        shutil.rmtree(unpacked)
        series["cp"].append(measure(["cp", "-rL", str(bundle), str(copy)]))
        shutil.rmtree(copy)
    sizes = json.loads(said.read_text())
    kept = ("original_bytes", "packed_bytes", "ratio", "files")  # no paths of this machine
    return {"sizes": {key: sizes[key] for key in kept}, **series}


def row(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """The line of the table for one bundle."""
    sizes = facts["sizes"]
    tensors = {
        key: sum(f[f"{key}_bytes"] for f in sizes["files"])
        for key in ("original", "packed", "entropy")
    }

    def median(what: str, key: str = "seconds") -> float:
        return statistics.median(r[key] for r in facts[what])

    mb = sizes["original_bytes"] / 1e6
    return {
        "bundle": name,
        "original_mb": round(mb, 1),
        "packed_mb": round(sizes["packed_bytes"] / 1e6, 1),
        "ratio": round(sizes["ratio"], 4),
        "tensors_to_entropy": round(tensors["packed"] / tensors["entropy"], 4),
        "pack_mb_per_s": round(mb / median("pack")),
        "unpack_mb_per_s": round(mb / median("unpack")),
        "unpack_mb_per_2_cpu_s": round(2 * mb / median("unpack", "cpu_seconds")),
        "cp_mb_per_s": round(mb / median("cp")),
        "pack_peak_mb": max(r["peak_mb"] for r in facts["pack"]),
        "unpack_peak_mb": max(r["peak_mb"] for r in facts["unpack"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundles", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers-on", default="text_encoder/model.safetensors", metavar="FILE")
    parser.add_argument("--peers", nargs="*", help="names of bundles; all if not given")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    facts: dict[str, Any] = {}
    bundles = {name: Path(folder) for name, _, folder in (b.partition("=") for b in args.bundles)}
    for name, bundle in bundles.items():
        facts[name] = bundle_rounds(bundle, args.work, args.rounds)
        print(json.dumps(row(name, facts[name])), flush=True)
        file = bundle / args.peers_on
        if file.is_file() and name in (args.peers or facts):
            facts[name]["peers"] = {
                "file": args.peers_on,
                "original_bytes": file.stat().st_size,
                "sdcompress": {"bytes": stored_bytes(args.work / "model.sdz", args.peers_on)},
            }
    with (args.out / "results.csv").open("w", newline="") as f:
        rows = [row(name, found) for name, found in facts.items()]
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    document = {
        "rounds": args.rounds,
        "environment": environment(load).model_dump(mode="json"),
        "bundles": facts,
    }
    write_json(args.out / "results.json", document)
    for name, found in ((name, f["peers"]) for name, f in facts.items() if "peers" in f):
        for peer, command in PEERS.items():
            file = bundles[name] / args.peers_on
            found[peer] = measure([*command, str(file)], args.work / "peer")
        print(name, json.dumps(found), flush=True)
        write_json(args.out / "results.json", document)  # they take long: keep what is known


if __name__ == "__main__":
    main()
