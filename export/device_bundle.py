"""One tar that builds, checks and measures on the device itself, and its results read back here.

The tar holds the ONNX files of both twins, seeded inputs with the outputs onnxruntime gives for
them, the target, a manifest with the digest of every file, and one script that needs Python and
TensorRT only. The same inputs give the same bytes. `export.device_results` reads back what it
measured.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.comparison import kept_in_fp32, narrowed_components
from export.device.preflight import estimate
from export.device_results import TOLERANCE
from export.device_results import is_device_results as is_device_results
from export.device_results import read_results as read_results
from export.specs import COMPONENTS, Sizes, component_spec, make_inputs
from sdcompress.bundle import Bundle, refuse_existing, to_json
from sdcompress.errors import InputError, UsageError, VerificationError
from sdcompress.plan import account

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from export.targets import Target

SCRIPT = "sdcompress_device.pyz"
PACKAGE = "sdcompress_device"  # what export.device is called inside the script
KIND, VERSION = "sdcompress device bundle", 1  # as export.device.contents expects them
TWINS = ("dense", "sparse")
GUIDANCE = 7.5
SAME = ("dtype", "opset", "upcast_attention")  # of the details of both twins
Progress = Callable[[str], None]

README = f"""\
Engines for {{title}}, built and measured on the device itself.

  mkdir engines && tar xf bundle.tar -C engines && cd engines
  python3 {SCRIPT}

It checks this bundle, builds the dense and the sparse engines ({{model}}), compares both with
what the host computed, measures them against each other and writes results.json. Finished engines
are kept, so an interrupted run goes on where it was. Take results.json back to the host:

  sdcompress gate results.json …        sdcompress report DIRECTORY

It needs Python 3.10 or newer and
  {{needs}}
and by our estimate about {{memory}} MiB of free memory and {{disk}} MiB of disk. Of several modules
the first that is installed is used; --module takes another. Where only trtexec is there:

  python3 {SCRIPT} --trtexec /usr/src/tensorrt/bin/trtexec

python3 {SCRIPT} --help lists the rest. The host printed the tar's sha256: compare it before
unpacking, because everything in here is checked against manifest.json only.
"""


@dataclass(frozen=True)
class Written:
    """A finished tar."""

    path: Path
    sha256: str
    bytes: int
    files: int


def write_device_bundle(
    dense: Bundle,
    sparse: Bundle,
    out: Path,
    *,
    target: Target,
    sizes: Sizes | None = None,
    steps: int = 20,
    guidance: float | None = None,
    seed: int = 0,
    replace: bool = False,
    progress: Progress = lambda what: None,
) -> Written:
    """Write the tar of two ONNX bundles of the same model for one device.

    `steps` is how often a picture calls the UNet. `progress` hears what is being done.

    Raises:
        UsageError: the bundles cannot be compared, or the target cannot read them.
        InputError: `out` exists, or a file is missing.
        VerificationError: a file is not what its bundle's manifest says, or a graph gives NaN.
    """
    from export.pipeline import Geometry

    sizes = sizes or Sizes()
    if not replace:
        refuse_existing(out)
    _check_twins(dense, sparse, target)
    geometry = Geometry.read(dense.path)
    _, height, width = geometry.latent_shape(sizes.height, sizes.width)
    content = _Content()
    components = {}
    for component in COMPONENTS:
        progress(f"computing what {component} should give")
        components[component] = {
            "calls": steps if component == "unet" else 1,
            **_component(content, dense, sparse, component, sizes, (height, width), seed),
        }
    subject = {
        "model": dense.manifest.source.id,
        "recipe": (sparse.manifest.recipe or {}).get("name"),
        "dtype": dense.manifest.details["dtype"],
        "steps": steps,
        "guidance": guidance if guidance is not None else GUIDANCE if sizes.guided else 1.0,
        "height": height * geometry.scale,
        "width": width * geometry.scale,
        "images": sizes.images,
        "onnx": {"dense": dense.digest, "sparse": sparse.digest},
        "pruned_layers": _pruned(sparse),
        "sparsity": account(sparse.manifest.plan).model_dump(mode="json")
        if sparse.manifest.plan
        else None,
    }
    for name in dense.manifest.files:
        if "/" not in name and name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")):
            content.take(name, dense, name)
    content.add(SCRIPT, make_script())
    memory, disk = estimate(components, target.model_dump())
    readme = README.format(
        title=target.title,
        model=subject["model"],
        needs=_needs(target),
        memory=memory >> 20,
        disk=disk >> 20,
    )
    content.add("README.txt", readme.encode())
    manifest = {
        "kind": KIND,
        "version": VERSION,
        "subject": subject,
        "target": target.model_dump(mode="json"),
        "tolerance": TOLERANCE,
        # A list keeps the order of a picture, which sorted keys would not.
        "order": list(COMPONENTS),
        "components": components,
        "files": {
            name: {"size": part.size, "sha256": part.sha256}
            for name, part in sorted(content.parts.items())
        },
    }
    content.add("manifest.json", to_json(manifest).encode())
    progress("writing the tar")
    sha256 = _write_tar(out, content)
    return Written(out, sha256, out.stat().st_size, len(content.parts))


def _needs(target: Target) -> str:
    """What must be installed there, the first that the script looks for first."""
    jetpack = f" (JetPack {target.jetpack} brings it)" if target.jetpack else ""
    modules = {
        "tensorrt": f"TensorRT {target.tensorrt_min} or newer{jetpack}",
        "tensorrt_rtx": "TensorRT-RTX",
    }
    return "\n  or ".join(f"{modules[name]} (module {name})" for name in target.backends)


def make_script() -> bytes:
    """The one file that runs on the device: a zip of export.device that Python can execute."""
    start = (
        "import sys\n"
        "if sys.version_info < (3, 10):\n"
        f"    sys.exit('{SCRIPT}: needs Python 3.10 or newer, found %d.%d; JetPack 6.1 brings it'\n"
        "             % sys.version_info[:2])\n"
        f"from {PACKAGE}.__main__ import main\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(main())\n"
    )
    package = Path(__file__).with_name("device")
    files = {"__main__.py": start.encode()}
    files |= {f"{PACKAGE}/{f.name}": f.read_bytes() for f in sorted(package.glob("*.py"))}
    archive = io.BytesIO()
    archive.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(archive, "a") as zipped:
        for name, data in files.items():
            # Neither the time nor the compressor's version may show in the bytes.
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            info.create_system = 3  # Unix, wherever it is made
            zipped.writestr(info, data)
    return archive.getvalue()


@dataclass(frozen=True)
class _Part:
    """A member of the tar: bytes in hand, or a file of a known digest."""

    size: int
    sha256: str
    data: bytes | None = None
    file: Path | None = None

    def open(self) -> io.BufferedIOBase:
        if self.file is None:
            return io.BytesIO(self.data or b"")
        try:
            return self.file.open("rb")
        except OSError as e:
            raise InputError(f"{self.file}: is missing; export the model again") from e


@dataclass
class _Content:
    parts: dict[str, _Part] = field(default_factory=dict)

    def add(self, name: str, data: bytes) -> None:
        self.parts[name] = _Part(len(data), hashlib.sha256(data).hexdigest(), data=data)

    def take(self, name: str, bundle: Bundle, source: str) -> None:
        """A file of a bundle, under the digest of its manifest; it is read once, when written."""
        record = bundle.manifest.files[source]
        self.parts[name] = _Part(record.size, record.sha256, file=bundle.path / source)


def _component(
    content: _Content,
    dense: Bundle,
    sparse: Bundle,
    component: str,
    sizes: Sizes,
    latent: tuple[int, int],
    seed: int,
) -> dict[str, Any]:
    """Take in a component's files and golden values; its entry in the manifest."""
    spec_config = json.loads((dense.path / component / "config.json").read_text())
    inputs = make_inputs(
        component_spec(component, spec_config),
        spec_config,
        dense.manifest.details["dtype"],
        batch=sizes.batch(component),
        height=latent[0],
        width=latent[1],
        seed=seed,
    )
    twins: dict[str, Any] = {}
    files: dict[str, dict[str, str]] = {}
    for twin, bundle in zip(TWINS, (dense, sparse), strict=True):
        files[twin] = _files(bundle, component)
        if twin == "sparse" and files["sparse"] == files["dense"]:  # the same, so kept once
            twins[twin] = twins["dense"]
            continue
        for name in files[twin]:
            content.take(f"onnx/{twin}/{component}/{name}", bundle, f"{component}/{name}")
        outputs = _run(bundle, component, inputs)
        twins[twin] = {
            "onnx": f"onnx/{twin}/{component}/model.onnx",
            "weights": sum(
                bundle.manifest.files[f"{component}/{name}"].size
                for name in files[twin]
                if ".onnx" in name
            ),
            "outputs": _tensors(content, f"golden/{twin}/{component}", outputs),
        }
    return {"inputs": _tensors(content, f"golden/inputs/{component}", inputs), "twins": twins}


def _files(bundle: Bundle, component: str) -> dict[str, str]:
    """The files of a graph, and their digests."""
    found = {
        name.partition("/")[2]: record.sha256
        for name, record in bundle.manifest.files.items()
        if name.startswith(f"{component}/") and (".onnx" in name or name.endswith("config.json"))
    }
    if "model.onnx" not in found:
        raise InputError(f"{bundle.path}: has no {component}/model.onnx; export the model again")
    return found


def _tensors(
    content: _Content, folder: str, arrays: Mapping[str, NDArray[Any]]
) -> list[dict[str, Any]]:
    described = []
    for name, array in arrays.items():
        little = array.astype(array.dtype.newbyteorder("<"))
        content.add(f"{folder}/{name}.bin", little.tobytes())
        described.append(
            {
                "name": name,
                "dtype": array.dtype.name,
                "shape": list(array.shape),
                "file": f"{folder}/{name}.bin",
            }
        )
    return described


def _run(
    bundle: Bundle, component: str, inputs: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """What onnxruntime gives on the CPU."""
    import numpy as np
    import onnxruntime

    model = bundle.path / component / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        outputs: list[np.ndarray[Any, Any]] = session.run(names, dict(inputs))
    except Exception as e:  # onnxruntime's own exceptions share no base class
        why = (str(e).splitlines() or ["no reason given"])[0]
        raise InputError(
            f"{model}: onnxruntime cannot run it ({why:.300}); export the model again"
        ) from e
    if not all(np.isfinite(output).all() for output in outputs):
        raise VerificationError(
            f"{model}: gives NaN or infinity already here; export with dtype fp32, or prune less"
        )
    return dict(zip(names, outputs, strict=True))


def _check_twins(dense: Bundle, sparse: Bundle, target: Target) -> None:
    for bundle in (dense, sparse):
        if bundle.manifest.stage != "onnx":
            raise InputError(
                f"{bundle.path}: expected an ONNX bundle, found one of stage "
                f"{bundle.manifest.stage}; `sdcompress export` makes them"
            )
        opset = bundle.manifest.details.get("opset", 0)
        if opset > target.opset_max:
            raise UsageError(
                f"{bundle.path}: has opset {opset}, {target.title} reads up to "
                f"{target.opset_max}; export the model again"
            )
    if dense.digest == sparse.digest:
        raise UsageError(
            f"{dense.path} and {sparse.path} are the same bundle, so there is nothing to compare; "
            "give the pruned one as SPARSE"
        )
    narrower = narrowed_components(sparse)
    alike = [c for c in COMPONENTS if c not in narrower | narrowed_components(dense)]
    others = _facts(sparse, alike)
    for fact, a in _facts(dense, alike).items():
        if a != (b := others[fact]):
            raise UsageError(
                f"the bundles differ in {fact} ({a!s:.60} and {b!s:.60}), so nothing could "
                "be put down to sparsity; export both from the same model with the same settings"
            )
    if _zeros(dense) > _zeros(sparse):
        raise UsageError(
            f"{dense.path} is given as the dense twin and has more zeros planned than "
            f"{sparse.path}; swap the two"
        )
    if first := sorted(narrowed_components(dense) - narrower):
        raise UsageError(
            f"{dense.path} is given as the dense twin and its {first[0]} has lost blocks that "
            f"{sparse.path} has; swap the two"
        )
    if not (_zeros(sparse) or narrower):
        raise UsageError(
            f"{sparse.path} is given as the sparse twin, lost no block and has no zeros planned; "
            "prune the model, and export what `sdcompress prune` wrote"
        )


def _facts(bundle: Bundle, alike: Sequence[str]) -> dict[str, object]:
    """What both twins must have in common; weights lie outside the graphs, so that those of the
    components `alike`, in which no block became narrower, are the same.
    """
    manifest, files = bundle.manifest, bundle.manifest.files
    graphs = {c: files.get(f"{c}/model.onnx") for c in alike}
    return {
        "model": (manifest.source.id, manifest.source.revision),
        **{name: manifest.details.get(name) for name in SAME},
        "kept_fp32": kept_in_fp32(bundle, alike),
        **{f"the graph of {c}": file and f"{file.sha256:.12}" for c, file in graphs.items()},
    }


def _zeros(bundle: Bundle) -> int:
    plan = bundle.manifest.plan
    return sum(layer.zeros or 0 for layer in plan.layers) if plan else 0


def _pruned(bundle: Bundle) -> int:
    plan = bundle.manifest.plan
    return sum(layer.pruned for layer in plan.layers) if plan else 0


def _write_tar(out: Path, content: _Content) -> str:
    """Stream the parts into a tar beside its place, then rename it; returns its sha256."""
    work = out.with_name(f".{out.name}.partial")
    try:
        with work.open("wb") as raw:
            writer = _Hashing(raw)
            with tarfile.open(fileobj=writer, mode="w|", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
                for name, part in sorted(content.parts.items()):
                    info = tarfile.TarInfo(name)  # owner 0, time 0
                    info.size, info.mode = part.size, 0o755 if name == SCRIPT else 0o644
                    with part.open() as source:
                        reader = _Hashing(source)
                        try:
                            tar.addfile(info, reader)
                        except OSError as e:
                            if e.errno is not None:
                                raise
                            reader.digest.update(b"ended too early")
                    if reader.digest.hexdigest() != part.sha256:
                        raise VerificationError(
                            f"{part.file}: is not the file its manifest describes; export the "
                            "model again"
                        )
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(work, out)
    except FileNotFoundError as e:
        raise InputError(f"{out.parent}: no such directory; create it first") from e
    finally:
        work.unlink(missing_ok=True)
    return writer.digest.hexdigest()


class _Hashing:
    """A file that keeps the digest of what goes through it."""

    def __init__(self, file: Any) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read(size)
        self.digest.update(data)
        return data

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return int(self._file.write(data))
