"""What a device bundle holds, and whether it still holds it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import DeviceError

MANIFEST = "manifest.json"
KIND = "sdcompress device bundle"
VERSION = 1
TWINS = ("dense", "sparse")
AGAIN = "unpack the tar again, or make it again with `sdcompress device`"


class Contents:
    """A device bundle that has been unpacked.

    manifest.json: `subject` (what is measured, copied into the results), `target`, `tolerance`,
    `files` (name → size, sha256), `components` and the `order` of a picture. A component has
    `calls` (how often a picture runs it), `inputs`, and for each of `twins` its `onnx`, the bytes
    of its `weights` and the `outputs` expected. Inputs and outputs have name, dtype, shape and the
    file of their little-endian values.
    """

    def __init__(self, root: Path) -> None:
        """Read manifest.json; raises DeviceError where it is missing or not of this version."""
        self.root = root
        file = root / MANIFEST
        try:
            raw = file.read_bytes()
            found = json.loads(raw)
        except OSError as e:
            raise DeviceError(
                f"{file}: cannot be read ({e.strerror}); run the script where the tar was unpacked"
            ) from e
        except ValueError as e:
            raise DeviceError(f"{file}: is damaged ({e}); {AGAIN}") from e
        if not isinstance(found, dict) or (found.get("kind"), found.get("version")) != (
            KIND,
            VERSION,
        ):
            raise DeviceError(f"{file}: expected a {KIND} of version {VERSION}; {AGAIN}")
        self.sha256 = hashlib.sha256(raw).hexdigest()
        try:
            self.subject: Mapping[str, Any] = found["subject"]
            self.target: Mapping[str, Any] = found["target"]
            self.tolerance: float = found["tolerance"]
            self.components: Mapping[str, Any] = {
                name: found["components"][name] for name in found["order"]
            }
            self.files: Mapping[str, Any] = found["files"]
            self._check_names()
        except (KeyError, TypeError, AttributeError) as e:
            raise DeviceError(f"{file}: is incomplete ({e}); {AGAIN}") from e

    def _check_names(self) -> None:
        """Nothing the manifest names lies outside the bundle or has no digest."""
        named = set(self.files)
        for component in self.components.values():
            tensors = list(component["inputs"])
            for twin in TWINS:
                named.add(component["twins"][twin]["onnx"])
                tensors += component["twins"][twin]["outputs"]
            named.update(tensor["file"] for tensor in tensors)
        for name in sorted(named):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or name not in self.files:
                raise DeviceError(f"{self.root / MANIFEST}: names {name!r}; {AGAIN}")

    def check(self) -> None:
        """Hash every file.

        Raises:
            DeviceError: a file is missing (exit code 1) or is not what was packed (3).
        """
        for name, record in self.files.items():
            path = self.root / name
            if not path.is_file() or path.is_symlink():
                raise DeviceError(f"{path}: is missing; {AGAIN}")
            if path.stat().st_size != record["size"] or sha256_file(path) != record["sha256"]:
                raise DeviceError(
                    f"{path}: is not the file that was packed (its sha256 differs); {AGAIN}",
                    exit_code=3,
                )

    def onnx_digest(self, component: str, twin: str) -> str:
        """One digest for all files of a component's graph, equal for twins that are the same."""
        folder = PurePosixPath(self.components[component]["twins"][twin]["onnx"]).parent
        digests = {
            PurePosixPath(name).name: record["sha256"]
            for name, record in self.files.items()
            if PurePosixPath(name).parent == folder
        }
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, data: object) -> None:
    """Write a file whole or not at all."""
    work = path.with_name(f".{path.name}.partial")
    try:
        with work.open("w", encoding="utf-8") as file:
            file.write(json.dumps(data, indent=1, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)
    except OSError as e:
        raise DeviceError(f"{path}: cannot be written ({e.strerror}); free some space") from e
    finally:
        work.unlink(missing_ok=True)
