"""Size and speed of `pack` and `unpack` on full-size bundles, beside `zstd -19`, `xz -6` and `cp`.

    python benchmarks/pack/measure.py dense=DIR paper=DIR 2:4=DIR --work DIR [--rounds 5]
        [--part rounds peers] [--cut 200]

Each NAME=DIR is a bundle or a diffusers directory. Every command is a cold process of its own,
followed by `sync`, files warm in the page cache; `cp` of the same files in turn with them shows
what the disk takes. `unpack` and `cp` run twice in a row, and the second run counts: on a virtual
machine the first waits for memory that the host has to give. `unpack` checks all digests itself;
here its files are compared with the originals besides. The general compressors get each file of
weights (`--file`) with two threads, once: at full size that takes about twenty minutes a bundle.
`--cut MB` gives them, and `pack` beside them, only the first tensors of each file.

Every measurement is kept in DIR/answers.json as soon as it is there: a run that was stopped goes
on. Remove that file to measure anew. Writes results.json and results.csv beside this file, and the
tables into README.md.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from export.bench import environment
from sdcompress.bundle import Bundle, Manifest, SourceRecord, seal, sha256_file, write_json
from sdcompress.measure import PeakMemory
from sdcompress.packing import Pack, pack
from sdcompress.safetensors_io import read_header

HERE = Path(__file__).parent
SDCOMPRESS = [sys.executable, "-c", "from sdcompress.commands import main; main()"]
PEERS = {"zstd -19": ["zstd", "-19", "-T2", "-q", "-c"], "xz -6": ["xz", "-6", "-T2", "-c"]}
FILES = ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
PARTS = ("rounds", "peers")
BEGIN, END = "<!-- measured -->", "<!-- end -->"

Facts = dict[str, Any]


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


def again(command: list[str], made: Path) -> dict[str, float]:
    """The second of two runs in a row, with what the first has made removed right before it."""
    measure(command)
    shutil.rmtree(made)
    return measure(command)


def same_files(packed: Path, source: Path, unpacked: Path) -> bool:
    with Pack(packed) as opened:
        names = [file.name for file in opened.index.files[1:]]
    return filecmp.cmpfiles(source, unpacked, names, shallow=False)[0] == names


def one_round(bundle: Path, work: Path) -> Facts:
    """Pack, unpack and `cp` in turn; "sizes" is what `pack --json` said, without paths."""
    packed, said, unpacked, copy = (work / n for n in ("model.sdz", "said.json", "unpacked", "cp"))
    for left in (unpacked, copy):  # by a run that was stopped
        shutil.rmtree(left, ignore_errors=True)
    packed.unlink(missing_ok=True)
    found: Facts = {
        "pack": measure([*SDCOMPRESS, "pack", str(bundle), "-o", str(packed), "--json"], said),
        "unpack": again(
            [*SDCOMPRESS, "unpack", str(packed), "-o", str(unpacked), "--json"], unpacked
        ),
    }
    if not same_files(packed, bundle, unpacked):
        raise SystemExit(f"{bundle}: unpacked files differ")
    shutil.rmtree(unpacked)
    found["cp"] = again(["cp", "-rL", str(bundle), str(copy)], copy)
    shutil.rmtree(copy)
    packed.unlink()
    sizes = json.loads(said.read_text())
    found["sizes"] = {k: sizes[k] for k in ("original_bytes", "packed_bytes", "ratio", "files")}
    return found


def cut_file(source: Path, target: Path, most: int) -> None:
    """The first tensors of a safetensors file, `most` bytes of them at the most; embeddings at its
    begin that take more are left out."""
    tensors, size = [], 0
    for info in read_header(source).tensors.values():
        if size + info.nbytes <= most:
            size += info.nbytes
            tensors.append(info)
        elif tensors:
            break
    begin = tensors[0].offset
    header = {
        t.name: {
            "dtype": t.dtype,
            "shape": t.shape,
            "data_offsets": [t.offset - begin, t.offset - begin + t.nbytes],
        }
        for t in tensors
    }
    text = json.dumps(header).encode()
    with source.open("rb") as data, target.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        data.seek(begin)
        out.write(data.read(size))


def of_one_file(file: Path, work: Path) -> Path:
    """A bundle of nothing but this file, linked."""
    folder = work / "one"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(file.resolve())
    source = SourceRecord(id="one", kind="directory")
    seal(folder, Manifest(stage="source", parent=None, source=source, tools={}))
    return folder


def file_sizes(file: Path, work: Path, known: Facts, save: Callable[[], None]) -> None:
    """Fill in what is not known yet: the file packed (with manifest and index) and by each peer."""
    if "sdcompress" not in known:
        packed = work / "one.sdz"
        packed.unlink(missing_ok=True)
        start, folder = time.perf_counter(), of_one_file(file, work)
        sizes = pack(Bundle.open(folder), packed)
        seconds = round(time.perf_counter() - start, 2)
        known["sdcompress"] = {"bytes": sizes.packed_bytes, "seconds": seconds}
        packed.unlink()
        save()
    for peer, command in PEERS.items():
        if peer not in known:
            known[peer] = measure([*command, str(file)], work / "peer")
            (work / "peer").unlink()
            save()


def peers(
    bundle: Path, files: Sequence[str], cut: int, work: Path, known: Facts, save: Callable[[], None]
) -> None:
    for name in files:
        file = bundle / name
        if cut:
            file = work / "cut.safetensors"
            cut_file(bundle / name, file, cut * 1_000_000)
        key = f"{name}, first {cut} MB" if cut else name
        digest = sha256_file(file)
        if known.get(key, {}).get("sha256") != digest:
            known[key] = {"sha256": digest, "original_bytes": file.stat().st_size}
        file_sizes(file, work, known[key], save)
        print(bundle.name, key, {p: known[key][p]["bytes"] for p in ("sdcompress", *PEERS)})
        if cut:
            file.unlink()


def row(name: str, rounds: Sequence[Facts]) -> Facts:
    """The line of results.csv for one bundle: medians over its rounds."""
    sizes = rounds[0]["sizes"]
    tensors = {
        key: sum(f[f"{key}_bytes"] for f in sizes["files"])
        for key in ("original", "packed", "entropy")
    }
    mb = sizes["original_bytes"] / 1e6

    def speeds(what: str, key: str = "seconds", factor: float = 1) -> list[float]:
        return [factor * mb / r[what][key] for r in rounds]

    return {
        "bundle": name,
        "rounds": len(rounds),
        "original_mb": round(mb, 1),
        "packed_mb": round(sizes["packed_bytes"] / 1e6, 1),
        "ratio": round(sizes["ratio"], 4),
        "tensors_to_entropy": round(tensors["packed"] / tensors["entropy"], 4),
        "pack_mb_per_s": round(statistics.median(speeds("pack"))),
        "unpack_mb_per_s": round(statistics.median(speeds("unpack"))),
        "unpack_lowest": round(min(speeds("unpack"))),
        "unpack_highest": round(max(speeds("unpack"))),
        "pack_mb_per_2_cpu_s": round(statistics.median(speeds("pack", "cpu_seconds", 2))),
        "unpack_mb_per_2_cpu_s": round(statistics.median(speeds("unpack", "cpu_seconds", 2))),
        "cp_mb_per_s": round(statistics.median(speeds("cp"))),
        "pack_peak_mb": max(r["pack"]["peak_mb"] for r in rounds),
        "unpack_peak_mb": max(r["unpack"]["peak_mb"] for r in rounds),
    }


def tables(rows: Sequence[Facts], answers: Facts) -> str:
    """What README.md shows of it."""
    lines: list[str] = []
    cells: list[Any]
    if rows:
        lines += [
            "| | files | packed | of it | over the entropy of the tensors | unpack, MB/s of output "
            "| per 2 cpu s | pack, MB/s | `cp`, MB/s | peak memory, pack and unpack |",
            "|" + "---|" * 10,
        ]
    for r in rows:
        cells = [
            r["bundle"],
            f"{r['original_mb']:.0f} MB",
            f"{r['packed_mb']:.0f} MB",
            f"{r['ratio']:.1%}",
            f"{r['tensors_to_entropy'] - 1:.2%}",
            f"**{r['unpack_mb_per_s']}** ({r['unpack_lowest']}-{r['unpack_highest']})",
            r["unpack_mb_per_2_cpu_s"],
            r["pack_mb_per_s"],
            r["cp_mb_per_s"],
            f"{r['pack_peak_mb']} and {r['unpack_peak_mb']} MB",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    compared = []
    for name, facts in answers.items():
        for file, known in facts.get("peers", {}).items():
            if any(peer not in known for peer in ("sdcompress", *PEERS)):
                continue
            ours = known["sdcompress"]["bytes"]
            cells = [
                f"{name}: {file}",
                *(f"{n / 1e6:.1f} MB" for n in (known["original_bytes"], ours)),
            ]
            for peer in PEERS:
                found = known[peer]
                less = f"{1 - ours / found['bytes']:.1%} smaller"
                took = f"{found['cpu_seconds']:.0f} CPU s"
                cells.append(f"{found['bytes'] / 1e6:.1f} MB: {less} ({took})")
            compared.append("| " + " | ".join(cells) + " |")
    if compared:
        head = f"| one file | as it is | packed | {' | '.join(PEERS)} |"
        lines += ["", head, "|" + "---|" * (3 + len(PEERS)), *compared]
    return "\n".join(lines)


def write_results(out: Path, answers: Facts, load: float) -> None:
    rows = [row(name, facts["rounds"]) for name, facts in answers.items() if facts.get("rounds")]
    if rows:
        with (out / "results.csv").open("w", newline="") as f:
            writer = csv.DictWriter(f, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    machine = environment(load).model_dump(mode="json")
    write_json(out / "results.json", {"environment": machine, "bundles": answers})
    if (readme := out / "README.md").is_file():
        before, _, rest = readme.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        readme.write_text(f"{before}{BEGIN}\n{tables(rows, answers)}\n{END}{after}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundles", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--work", type=Path, required=True, help="where answers and outputs go")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=["rounds"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--file", nargs="+", default=FILES, help="what the peers get")
    parser.add_argument("--cut", type=int, default=0, metavar="MB", help="of each; 0: all of it")
    parser.add_argument("--out", type=Path, default=HERE, help="where results are written")
    args = parser.parse_args(argv)

    args.work.mkdir(parents=True, exist_ok=True)
    load, kept = os.getloadavg()[0], args.work / "answers.json"
    known: Facts = json.loads(kept.read_text()) if kept.exists() else {}
    bundles = {name: Path(folder) for name, _, folder in (b.partition("=") for b in args.bundles)}
    answers: Facts = {name: {"rounds": [], "peers": {}} for name in bundles} | known

    def save() -> None:
        write_json(kept, answers)
        write_results(args.out, answers, load)

    if "rounds" in args.part:
        for number in range(args.rounds):
            for name, bundle in bundles.items():
                done = answers[name]["rounds"]
                if len(done) <= number:
                    done.append(one_round(bundle, args.work))
                    save()
                    print(json.dumps(row(name, done[-1:])), flush=True)
    if "peers" in args.part:
        for name, bundle in bundles.items():
            peers(bundle, args.file, args.cut, args.work, answers[name]["peers"], save)
    save()


if __name__ == "__main__":
    main()
