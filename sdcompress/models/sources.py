"""From what a person calls a model to a checked diffusers directory on this disk.

    mini-sd2                    the model that ships with sdcompress
    DIRECTORY                   a diffusers directory or an sdcompress weight bundle
    OWNER/NAME[@REVISION]       a model on the hub; the resolved commit is recorded
    FILE.safetensors            a single-file checkpoint, imported once into the cache

Imports and merges lie in the cache, `$SDCOMPRESS_CACHE` or `~/.cache/sdcompress`, under names made
of the digests of what they were made from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdcompress.bundle import (
    MANIFEST,
    Bundle,
    SourceRecord,
    is_pack,
    sha256_file,
    staging,
    unpack_first,
)
from sdcompress.cache import cache_folder
from sdcompress.catalog import CARRIED
from sdcompress.errors import InputError, UsageError
from sdcompress.models.checks import PICKLED, check_sd2_like

MINI_SD2 = "mini-sd2"
FORMS = (
    "mini-sd2, a diffusers directory, a bundle, OWNER/NAME@REVISION on the hub, or a .safetensors "
    "checkpoint"
)
_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|ema|non_ema)(?=[.-])")


@dataclass(frozen=True)
class ResolvedModel:
    """A diffusers directory that passed `check_sd2_like`, and where it comes from."""

    directory: Path
    source: SourceRecord


def resolve(
    model: str,
    *,
    loras: Sequence[str] = (),
    cache: Path | None = None,
    allow_pickle: bool = False,
    offline: bool | None = None,
    config: str | None = None,
    variant: str | None = None,
) -> ResolvedModel:
    """Find, fetch or import `model`, check it, and merge `loras` ("FILE:scale") into it.

    `config` is one of `sd2.CONFIGS` and concerns single-file checkpoints, whose weights cannot
    tell. `variant` ("fp16") picks among the weight files a repository offers; without it, the plain
    files are taken, and a variant only where there are no plain ones. `offline` uses what the hub's
    cache has; without it, HF_HUB_OFFLINE decides.

    Raises:
        InputError: there is no such model, or it is not a usable Stable Diffusion 2.
        UsageError: `config` is unknown or missing, or a LoRA's scale is not a number.
    """
    from sdcompress.models.lora import merge, parse_lora

    cache = cache or cache_folder()
    wanted = [parse_lora(text, allow_pickle=allow_pickle) for text in loras]
    found = _find(model, cache, allow_pickle, offline, config, variant)
    check_sd2_like(found.directory)
    if not wanted:
        return found
    records = tuple(lora.record() for lora in wanted)
    digest = Bundle.of_source(found.directory, found.source).digest
    key = hashlib.sha256("\n".join((digest, *records)).encode()).hexdigest()[:32]
    directory = _cached(cache / "merged" / key, lambda work: merge(found.directory, wanted, work))
    source = found.source.model_copy(update={"loras": (*found.source.loras, *records)})
    return ResolvedModel(directory, source)


def carried_files(directory: Path) -> list[Path]:
    """The model card and licence files that travel with everything made from this model."""
    return sorted({f for glob in CARRIED for f in directory.glob(glob) if f.is_file()})


def licence_of(directory: Path) -> str | None:
    """The licence the model card's front matter names, else the first line of a licence file."""
    for file in carried_files(directory):
        text = file.read_text(encoding="utf-8", errors="replace")
        if file.name.upper().startswith("README"):
            front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
            fields = dict(re.findall(r"^(license\w*):\s*(\S+)", front[1], re.M)) if front else {}
            if name := fields.get("license_name") or fields.get("license"):
                return str(name).strip("\"'")
    for file in carried_files(directory):
        if file.name.upper().startswith("LICEN"):
            lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
            return next((line.strip() for line in lines if line.strip()), None)
    return None


def _find(
    model: str,
    cache: Path,
    allow_pickle: bool,
    offline: bool | None,
    config: str | None,
    variant: str | None,
) -> ResolvedModel:
    path = Path(model).expanduser()
    if config is not None and (model == MINI_SD2 or not path.is_file()):
        raise UsageError(
            f"--config says what a single-file checkpoint is, found {model}, which is none and has "
            "its own configs; leave --config out"
        )
    if model == MINI_SD2:
        return _described(_mini_sd2(), MINI_SD2, "mini-sd2")
    if path.is_file():
        if is_pack(path):
            raise unpack_first(path, FORMS)
        return _single_file(path, cache, allow_pickle, config)
    if path.is_dir():
        return _directory(path, cache, allow_pickle, variant)
    hub = _HUB_ID.fullmatch(model)
    if hub and path.suffix not in (".safetensors", *PICKLED):
        return _hub(hub["id"], hub["revision"], cache, offline, variant)
    raise InputError(f"{model}: no such file or directory; expected {FORMS}")


def _mini_sd2() -> Path:
    return Path(__file__).parent / "mini_sd2/weights"


def _described(directory: Path, name: str, kind: str, revision: str | None = None) -> ResolvedModel:
    licence = licence_of(directory) if directory.is_dir() else None
    record = {"id": name, "kind": kind, "revision": revision, "licence": licence}
    return ResolvedModel(directory, SourceRecord.model_validate(record))


def _directory(path: Path, cache: Path, allow_pickle: bool, variant: str | None) -> ResolvedModel:
    if (path / MANIFEST).is_file():
        bundle = Bundle.open(path, ("source", "pruned", "tuned"))
        return ResolvedModel(path, bundle.manifest.source)
    name = path.resolve().name  # not the path: manifests must not depend on where things lie
    listing = [f.relative_to(path).as_posix() for f in path.glob("*/*") if f.is_file()]
    if allow_pickle and _pickled_components(listing):
        path = _unpickled_directory(path, listing, cache)
        listing = [f.relative_to(path).as_posix() for f in path.glob("*/*")]
    chosen = choose_weights(listing, variant)
    if any(plain != file for plain, file in chosen.items()):
        path = _plain_names(path, chosen, cache)
    return _described(path, name, "directory")


def choose_weights(listing: Iterable[str], variant: str | None) -> dict[str, str]:
    """Plain name → file for the safetensors files and shard indices of each component.

    `listing` holds paths such as "unet/diffusion_pytorch_model.fp16.safetensors". Plain files win
    unless `variant` is given; a component that lacks the wanted kind uses what it has.
    """
    kinds: dict[str, dict[str, dict[str, str]]] = {}
    for file in sorted(listing):
        if not re.search(r"/.*\.safetensors(\.index.*\.json)?$", file):
            continue
        component, _, name = file.partition("/")
        match = _VARIANT.search(name)
        plain = f"{component}/{_VARIANT.sub('', name)}"
        kinds.setdefault(component, {}).setdefault(match[1] if match else "", {})[plain] = file
    chosen = {}
    for found in kinds.values():
        kind = next(k for k in (variant or "", "", *found) if k in found)
        chosen.update(found[kind])
    return chosen


def _plain_names(model: Path, chosen: dict[str, str], cache: Path) -> Path:
    """A directory of links in which the chosen weights have the names every tool loads."""
    described = "\n".join((str(model.resolve()), *(f"{a} {b}" for a, b in chosen.items())))
    key = hashlib.sha256(described.encode()).hexdigest()[:32]
    others = [f.relative_to(model).as_posix() for f in model.glob("**/*") if f.is_file()]
    kept = {f: f for f in others if not _is_weight(f)} | chosen

    def link(work: Path) -> None:
        for plain, file in kept.items():
            target = work / plain
            target.parent.mkdir(parents=True, exist_ok=True)
            if plain != file and plain.endswith(".json"):  # a shard index names its shards
                index = json.loads((model / file).read_text(encoding="utf-8"))
                names = index["weight_map"].items()
                index["weight_map"] = {k: _VARIANT.sub("", v) for k, v in names}
                target.write_text(json.dumps(index), encoding="utf-8")
            else:
                target.symlink_to((model / file).resolve())

    with staging(cache / "views" / key, replace=True) as work:
        link(work)
    return cache / "views" / key


def _is_weight(file: str) -> bool:
    return bool(re.search(r"\.safetensors(\.index.*\.json)?$", file)) or file.endswith(PICKLED)


def _cached(directory: Path, make: Callable[[Path], None]) -> Path:
    """`directory`, made first if it is not there; two processes making it do no harm."""
    if not directory.is_dir():
        with staging(directory, replace=True) as work:
            make(work)
    return directory


# Single files ---------------------------------------------------------------------------------


def _single_file(path: Path, cache: Path, allow_pickle: bool, config: str | None) -> ResolvedModel:
    from sdcompress.models.checkpoint import config_name, import_checkpoint, unpickle
    from sdcompress.models.sd2 import component_configs
    from sdcompress.safetensors_io import read_header

    pickled = path.suffix in PICKLED
    if pickled and not allow_pickle:
        raise InputError(
            f"{path}: expected a safetensors checkpoint, found a pickled one, which can run code "
            "when opened; convert it, or say --allow-pickle if you trust it"
        )
    digest = sha256_file(path)
    if pickled:
        made = _cached(
            cache / "unpickled" / digest[:32], lambda work: _unpickle_into(unpickle, path, work)
        )
        header = read_header(made / "model.safetensors")
    else:
        header = read_header(path)
    name = config_name(header, config)
    licence = header.metadata.get("modelspec.license")

    def make(work: Path) -> None:
        import_checkpoint(header, component_configs(name), work)
        (work / "README.md").write_text(_card(path.name, digest, name, licence), encoding="utf-8")

    directory = _cached(cache / "imported" / f"{digest[:32]}-{name}", make)
    found = _described(directory, path.name, "single-file", f"sha256:{digest}")
    return found


def _card(file: str, digest: str, config: str, licence: str | None) -> str:
    front = f"---\nlicense: {licence}\n---\n" if licence else ""
    stated = f"The file states its licence as {licence}." if licence else "The file states none."
    return (
        f"{front}# {file}\n\nImported by sdcompress from a single-file checkpoint as {config}.\n"
        f"sha256 of the file: {digest}\n\n{stated}\n"
    )


def _unpickle_into(unpickle: Callable[[Path, Path], object], file: Path, work: Path) -> None:
    unpickle(file, work / "model.safetensors")


def _pickled_components(listing: Iterable[str]) -> list[str]:
    """Weight files of components that have pickled weights only."""
    files = list(listing)
    safe = {f.partition("/")[0] for f in files if f.endswith(".safetensors")}
    return [f for f in files if f.endswith(PICKLED) and f.partition("/")[0] not in safe]


def _unpickled_directory(model: Path, listing: Sequence[str], cache: Path) -> Path:
    """The same directory with each pickled component's weights as safetensors."""
    from sdcompress.models.checkpoint import WEIGHT_FILES, unpickle

    pickled = {f.partition("/")[0]: f for f in sorted(_pickled_components(listing), reverse=True)}
    digests = [f"{f} {sha256_file(model / f)}" for f in pickled.values()]
    key = hashlib.sha256("\n".join((str(model.resolve()), *digests)).encode()).hexdigest()[:32]

    def make(work: Path) -> None:
        for other in model.glob("**/*"):
            target = work / other.relative_to(model)
            if other.is_file() and other.suffix not in PICKLED:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(other.resolve())
        for component, file in pickled.items():
            if component in WEIGHT_FILES:
                unpickle(model / file, work / component / WEIGHT_FILES[component])

    return _cached(cache / "unpickled" / key, make)


# The hub --------------------------------------------------------------------------------------


def _hub(
    name: str, revision: str | None, cache: Path, offline: bool | None, variant: str | None
) -> ResolvedModel:
    """Fetch the files a pipeline needs, and no others, at one resolved commit."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if offline is None:
        offline = bool(constants.HF_HUB_OFFLINE)
    shown = f"{name}@{revision}" if revision else name
    try:
        if offline:
            path = Path(snapshot_download(name, revision=revision, local_files_only=True))
            listing = [f.relative_to(path).as_posix() for f in path.glob("**/*") if f.is_file()]
        else:
            info = HfApi().model_info(name, revision=revision)
            listing = [s.rfilename for s in info.siblings or []]
            files = hub_files(listing, variant)
            path = Path(snapshot_download(name, revision=info.sha, allow_patterns=files))
            listing = files
    except Exception as e:  # the client's, its HTTP library's and the system's errors alike
        raise _hub_error(shown, e, offline) from e
    commit = path.name
    chosen = choose_weights(listing, variant)
    stray = set(choose_weights(_listing(path), None).values()) - set(chosen.values())
    if stray or any(plain != file for plain, file in chosen.items()):
        path = _plain_names(path, chosen, cache)
    return _described(path, name, "hub", commit)


def _listing(path: Path) -> list[str]:
    return [f.relative_to(path).as_posix() for f in path.glob("*/*") if f.is_file()]


def hub_files(listing: Sequence[str], variant: str | None) -> list[str]:
    """What to fetch: each component's configs, texts and chosen weights, the card, the licence."""
    carried = [Path(f) for f in listing if "/" not in f]
    top = [f.name for f in carried if any(f.match(glob) for glob in ("model_index.json", *CARRIED))]
    small = [
        f
        for f in listing
        if f.count("/") == 1 and f.endswith((".json", ".txt")) and not _is_weight(f)
    ]
    return sorted({*top, *small, *choose_weights(listing, variant).values()})


def _hub_error(shown: str, error: Exception, offline: bool) -> InputError:
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return InputError(
            f"{shown}: the hub asks you to accept this model's terms; accept them on its page and "
            "log in with `hf auth login`"
        )
    if kind == "RepositoryNotFoundError":
        return InputError(
            f"{shown}: expected {FORMS}; there is no such path here and no such model on the hub "
            "(a private one needs `hf auth login`)"
        )
    if kind == "RevisionNotFoundError":
        return InputError(f"{shown}: the hub has this model, but no such revision; check it there")
    if offline:
        return InputError(
            f"{shown}: not in the hub's local cache, and offline mode is on; fetch it once online, "
            "or unset HF_HUB_OFFLINE"
        )
    reason = (str(error).strip() or kind).splitlines()[0]
    return InputError(
        f"{shown}: no such path here, and the hub cannot be reached ({kind}: {reason}); give a "
        "local directory, or set HF_HUB_OFFLINE=1 to use what was fetched before"
    )
