"""A bundle: a directory other tools already load, plus `manifest.json` that says what it is.

Every stage is bundle in, new bundle out. A bundle is written beside its place, sealed with the
digest of every file, and renamed: a process killed at any moment leaves the old state or the new.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sdcompress import __version__
from sdcompress.catalog import model_files
from sdcompress.errors import InputError, UsageError, VerificationError
from sdcompress.parallel import beside, in_order, leaving
from sdcompress.plan import SparsityPlan

MANIFEST = "manifest.json"
PACK = b"\x89SDZ\r\n\x1a\n"  # how a bundle in one file begins; after PNG's
LOG = "log.json"  # times and host facts: outside the digests
Stage = Literal["source", "pruned", "tuned", "onnx", "engine"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """`size` in bytes."""

    size: int
    sha256: str


class TensorRecord(_Record):
    """What a tensor must be, in the state dict's layout and the bundle's dtype.

    blake3: of the raw little-endian bytes; it is as hard to forge as the sha256 of files, and made
    for processors with wide vectors. zeros and zero_mask_blake3 (of numpy.packbits(w == 0), C
    order) are set for pruned tensors only.
    """

    dtype: str
    shape: tuple[int, ...]
    blake3: str
    zeros: int | None = None
    zero_mask_blake3: str | None = None


class SourceRecord(_Record):
    """Where the model came from. `revision` is a resolved commit, `loras` are "FILE:scale"."""

    id: str
    kind: Literal["mini-sd2", "directory", "hub", "single-file", "bundle"]
    revision: str | None = None
    licence: str | None = None
    loras: tuple[str, ...] = ()


class Manifest(_Record):
    """The contents of `manifest.json`; `details` holds facts of one stage only."""

    schema_version: Literal[2] = 2
    stage: Stage
    parent: str | None
    source: SourceRecord
    recipe: dict[str, Any] | None = None
    tools: dict[str, str]
    plan: SparsityPlan | None = None
    tensors: dict[str, dict[str, TensorRecord]] = {}
    files: dict[str, FileRecord] = {}
    details: dict[str, Any] = {}


class Bundle:
    """An opened bundle: its directory, its manifest and the digest of that manifest.

    `outline` is what is known at once: the manifest, but of a source without `files`, which are to
    be hashed first. That takes as long as reading the model, and is done when `manifest` or
    `digest` are first asked for (see `proving`). So is the check of a bundle opened with `check`.
    """

    def __init__(
        self, path: Path, outline: Manifest, digest: str | None = None, *, checked: bool = True
    ) -> None:
        self.path, self.outline = path, outline
        self._digest, self._proven = digest, digest is not None and checked
        self._proving = threading.Lock()

    @property
    def manifest(self) -> Manifest:
        self.prove()
        return self.outline

    @property
    def digest(self) -> str:
        self.prove()
        assert self._digest is not None
        return self._digest

    def __reduce__(self) -> tuple[Any, ...]:  # to other processes it goes with its digests
        return Bundle, (self.path, self.manifest, self.digest)

    def prove(self) -> None:
        """Hash or check the files, unless that has been done.

        Raises:
            VerificationError: a file is missing, changed or not in the manifest.
        """
        with self._proving:
            if self._proven:
                return
            if self._digest is None:
                names = [f.relative_to(self.path).as_posix() for f in model_files(self.path)]
                files = _records(self.path, names)
                self.outline = self.outline.model_copy(update={"files": files})
                self._digest = hashlib.sha256(_manifest_bytes(self.outline)).hexdigest()
            else:
                self._compare()
            self._proven = True

    @classmethod
    def open(cls, path: Path, stages: Sequence[Stage] = (), *, check: bool = False) -> Bundle:
        """Read the manifest; the files are checked by `check_files` or `verify`, or with `check`
        before `manifest` or `digest` are given out.

        Raises:
            InputError: no bundle, a manifest of another version, or not one of `stages`.
        """
        file = path / MANIFEST
        try:
            raw = file.read_bytes()
            manifest = Manifest.model_validate_json(raw)
        except OSError as e:
            if is_pack(path):
                raise unpack_first(path, "an sdcompress bundle") from e
            what = f"no readable {MANIFEST}" if path.exists() else "no such file or directory"
            raise InputError(
                f"{path}: expected an sdcompress bundle, found {what}; "
                "bundles are made by `sdcompress prune`, `export` and `build`"
            ) from e
        except ValidationError as e:
            first = e.errors(include_url=False)[0]
            where = ".".join(str(p) for p in first["loc"])
            raise InputError(
                f"{file}: not a manifest this version understands ({where}: {first['msg']}); "
                "make the bundle again"
            ) from e
        if stages and manifest.stage not in stages:
            raise InputError(
                f"{path}: expected a bundle of stage {' or '.join(stages)}, found "
                f"{manifest.stage}; {_next(manifest.stage, stages)}"
            )
        return cls(path, manifest, hashlib.sha256(raw).hexdigest(), checked=not check)

    @classmethod
    def of_source(cls, directory: Path, source: SourceRecord) -> Bundle:
        """Describe a diffusers directory as the bundle every other one descends from.

        Nothing is written: the manifest exists in memory only, with the digest of each file the
        pipeline needs.
        """
        model_files(directory)  # what is no pipeline is refused here
        return cls(directory, Manifest(stage="source", parent=None, source=source, tools={}))

    def check_listing(self) -> None:
        """Compare the names of files, and their sizes, with the manifest.

        Raises:
            VerificationError: a file is missing, longer or shorter, or not in the manifest.
        """
        found, named = set(_relative_files(self.path)), set(self.outline.files)
        if missing := sorted(named - found):
            raise VerificationError(f"{self.path}: {missing[0]} is missing; make the bundle again")
        if extra := sorted(found - named):
            raise VerificationError(
                f"{self.path}: {extra[0]} is not in the manifest; remove the file"
            )
        for name, record in self.outline.files.items():
            if (self.path / name).stat().st_size != record.size:
                raise self._changed(name)

    def check_files(self) -> None:
        """Hash every file and compare with the manifest.

        Raises:
            VerificationError: a file is missing, changed or not in the manifest.
        """
        if self._proven:
            self._compare()
        self.prove()

    def _compare(self) -> None:
        self.check_listing()
        found = _records(self.path, list(self.outline.files))
        for name, record in self.outline.files.items():
            if found[name] != record:
                raise self._changed(name)

    def _changed(self, name: str) -> VerificationError:
        return VerificationError(
            f"{self.path}: {name} is not the file the manifest describes; make the bundle again"
        )


@contextmanager
def proving(source: Bundle) -> Iterator[None]:
    """Hash or check the files of `source` beside the block, which has to ask for its digest before
    it finishes anything.

    Files of a bundle that were damaged are said to be so, whatever else came of them in the block.
    """
    try:
        with beside(lambda: source.digest):
            yield
    except Exception:
        if source.outline.files:  # there is something to hold them against
            source.prove()
        raise


_ORDER: tuple[Stage, ...] = ("source", "pruned", "tuned", "onnx", "engine")


def _next(found: Stage, wanted: Sequence[Stage]) -> str:
    """What to do about a bundle of another stage than is wanted."""
    if _ORDER.index(found) > max(map(_ORDER.index, wanted)):
        return "give the bundle it was made from"
    return f"run `sdcompress {'build' if found == 'onnx' else 'export'}` on it"


@contextmanager
def staging(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A fresh directory beside `target`, renamed to it when the block ends well, else removed.

    What an earlier, killed process left behind is removed first; what a living one is writing
    is not, because its owner holds a lock on the directory.

    Raises:
        InputError: `target` exists and `replace` is not given, or cannot be created.
    """
    target = target.resolve()  # where a link points, so that the link stays one
    if not replace:
        refuse_existing(target)
    prefix = f".{target.name}.partial-"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent, prefix)
        work, lock = _make_locked(target.parent, prefix)
    except OSError as e:
        raise InputError(f"{target}: cannot be created ({e.strerror}); check the path") from e
    try:
        work.chmod(0o755)  # mkdtemp's 0700 is for secrets
        yield work
        _sync_tree(work)
        _move_into_place(work, target, replace)
    finally:
        os.close(lock)
        shutil.rmtree(work, ignore_errors=True)


def seal(
    directory: Path, manifest: Manifest, *, known: Mapping[str, FileRecord] | None = None
) -> Manifest:
    """Write the manifest of a finished directory, with the digest of every file in it.

    `known` holds the records of files that need not be read again: those that `link_files` took
    over unchanged, and those that were hashed while they were written.
    """
    known = known or {}
    names = sorted(_relative_files(directory))
    found = _records(directory, [name for name in names if name not in known])
    files = {name: found.get(name) or known[name] for name in names}
    sealed = manifest.model_copy(update={"files": files})
    (directory / MANIFEST).write_bytes(_manifest_bytes(sealed))
    return sealed


def _records(directory: Path, names: Sequence[str]) -> dict[str, FileRecord]:
    """The records of these files, in this order; read by several threads, large ones first."""
    files = {name: directory / name for name in names}
    order = sorted(names, key=lambda name: -files[name].stat().st_size)
    found = dict(zip(order, in_order(partial(_record, files[n]) for n in order), strict=True))
    return {name: found[name] for name in names}


def _record(file: Path) -> FileRecord:
    return FileRecord(size=file.stat().st_size, sha256=sha256_file(file))


def _manifest_bytes(manifest: Manifest) -> bytes:
    return to_json(manifest.model_dump(mode="json")).encode()


def to_json(data: object) -> str:
    """The one way JSON is written: sorted, indented, the same text for the same data."""
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside its place, then renamed."""
    work = path.with_name(f".{path.name}.partial")
    try:
        with work.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def write_json(path: Path, data: object) -> None:
    write_text(path, to_json(data))


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))  # bytes: what is read is hashed while in the cache
    with path.open("rb", buffering=0) as f:
        while n := f.readinto(buffer):
            digest.update(buffer[:n])
            if leaving():
                raise InterruptedError
    return digest.hexdigest()


def is_pack(path: Path) -> bool:
    """Whether it is a bundle in one file, which is no bundle to work with."""
    try:
        with path.open("rb") as f:
            return f.read(len(PACK)) == PACK
    except OSError:
        return False


def unpack_first(path: Path, expected: str) -> InputError:
    return InputError(
        f"{path}: expected {expected}, found a pack; run `sdcompress unpack` on it first"
    )


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link an unchanged file; copy it where the file system cannot link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()  # hub caches hold links; the bundle must hold the file
    try:
        os.link(source, target)
    except OSError as e:
        if e.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            raise
        shutil.copyfile(source, target)


def carry_over(source: Bundle, name: str, target: Path) -> None:
    """Take over an unchanged file: weights are linked between bundles, all else is copied.

    Small files get edited in place, and that must not reach another bundle; onnx refuses to read
    external data that has a second hard link. A model directory, a hub cache and the installed
    package belong to others: nothing of theirs is ever linked.
    """
    if source.manifest.stage != "source" and name.endswith(".safetensors"):
        link_or_copy(source.path / name, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source.path / name, target)


def link_files(source: Bundle, target: Path) -> dict[str, FileRecord]:
    """Carry over what is not yet in `target`; returns the records of those files for `seal`."""
    linked = {n: r for n, r in source.manifest.files.items() if not (target / n).exists()}
    for name in linked:
        carry_over(source, name, target / name)
    return linked


_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")


def tool_versions() -> dict[str, str]:
    """The versions that decide the bytes a stage writes."""
    return {"sdcompress": __version__, **_installed(_TOOLS)}


def runtime_versions() -> dict[str, str]:
    """The installed runtimes that engines are built and run with, and their versions."""
    return _installed(_RUNTIMES)


def _installed(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _relative_files(directory: Path) -> Iterator[str]:
    for path in directory.rglob("*"):
        relative = path.relative_to(directory)
        hidden = any(part.startswith(".") for part in relative.parts)
        if not hidden and relative.as_posix() not in (MANIFEST, LOG) and path.is_file():
            yield relative.as_posix()


def refuse_existing(target: Path) -> None:
    """Asked before slow work.

    Raises:
        InputError: there is something already, or nothing can be put there.
        UsageError: it lies in a bundle.
    """
    if target.exists():
        raise _taken(target)
    refuse_inside(target)
    there = next((place for place in target.resolve().parents if place.exists()), None)
    if there and not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise InputError(
            f"{target}: cannot be created, {there} is not a folder that can be written to; choose "
            "another --output"
        )


def refuse_inside(target: Path) -> None:
    """Raises UsageError: what is put at or into the target becomes part of a bundle."""
    place = target.resolve()
    for folder in (place, *place.parents):
        with suppress(InputError):  # no bundle
            bundle = Bundle.open(folder)
            raise UsageError(
                f"{target}: lies in the bundle {bundle.path}, which would then hold what its "
                "manifest does not name; choose another place"
            )


def _taken(target: Path) -> InputError:
    return InputError(f"{target}: already exists; choose another --output or remove it")


def _lock(directory: Path, *, wait: bool = True) -> int:
    """An open descriptor that holds the directory's lock until it is closed.

    Raises:
        BlockingIOError: somebody else holds it and `wait` is not set.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def locked(directory: Path, *, wait: bool = True) -> Iterator[None]:
    descriptor = _lock(directory, wait=wait)
    try:
        yield
    finally:
        os.close(descriptor)


def _make_locked(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new directory and the descriptor of its lock."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with suppress(FileNotFoundError):  # swept up by a peer before it was locked
            lock = _lock(work)
            if work.exists():
                return work, lock
            os.close(lock)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for left in parent.glob(f"{glob.escape(prefix)}*"):
        # Busy: its owner lives. Gone: its owner has just moved it into place.
        with suppress(BlockingIOError, FileNotFoundError), locked(left, wait=False):
            shutil.rmtree(left, ignore_errors=True)


def _sync_tree(directory: Path) -> None:
    for path in [directory, *directory.rglob("*")]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def _move_into_place(work: Path, target: Path, replace: bool) -> None:
    if not (replace and target.exists()):
        try:
            os.rename(work, target)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise _taken(target) from e  # somebody else was faster
        return
    # Swap the two names in one step; `work` then holds the old bundle and is removed.
    libc = ctypes.CDLL(None, use_errno=True)
    swapped = libc.renameat2(
        _AT_FDCWD, os.fsencode(work), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE
    )
    if swapped != 0:
        shutil.rmtree(target)  # a file system without exchange: gone is better than half
        os.rename(work, target)
