"""Tuning what stays after pruning. One file a method; the file name is its name in recipes.

A method changes the students of its `Job` in place and leaves zero what the masks say. All else is
done here: finding out whether the models belong together, loading them, and writing the result in
the parent's files and number formats, where the zeros are counted again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sdcompress import registry
from sdcompress.bundle import Bundle, locked, refuse_existing
from sdcompress.catalog import read_catalog
from sdcompress.errors import InputError, UsageError
from sdcompress.evaluation.processes import processes
from sdcompress.models.captioned import require_folder
from sdcompress.plan import SparsityPlan
from sdcompress.recipe import Tune
from sdcompress.structure import read_record
from sdcompress.tuning._job import TUNABLE, Job, Progress, load_models, silent, state_key
from sdcompress.tuning._lineage import check_lineage, find_dense, lost_blocks
from sdcompress.tuning._log import log_path, require_tensorboard
from sdcompress.tuning._write import moves_masks, write_bundle

__all__ = ["check", "check_lineage", "find_dense", "tune"]

CHECKPOINT = "checkpoint.pt"

if TYPE_CHECKING:
    from accelerate import Accelerator


def tune(
    parent: Bundle,
    settings: Tune,
    out: Path,
    *,
    dense: Bundle,
    replace: bool = False,
    fresh: bool = False,
    progress: Progress = silent,
    checkpoints: Path | None = None,
) -> Bundle:
    """Tune a pruned (or tuned) bundle of weights into a new bundle at `out`.

    `dense` is the model that was pruned. The state of the training lies in the folder `checkpoints`
    (by default hidden, beside `out`): a process that was killed goes on from there, unless `fresh`
    says to begin anew. The losses go beside `out`. Under `accelerate launch` every process calls
    this, and the main one writes.

    Raises:
        UsageError: the settings do not fit the bundle or this machine.
        InputError: the models do not belong together, the loss diverges, or `out` exists.
        SdcompressError: a zero did not hold.
    """
    out = out.resolve()
    if not replace:
        refuse_existing(out)
    plan = parent.manifest.plan
    if parent.manifest.stage not in ("pruned", "tuned") or plan is None:
        raise UsageError(
            f"{parent.path}: expected a pruned bundle, found stage {parent.manifest.stage}; "
            "run `sdcompress prune` first"
        )
    components = check(plan, settings, _narrower(parent))
    check_lineage(parent, dense)
    accelerator = _accelerator(settings)
    main = accelerator.is_main_process
    folder = checkpoints or out.with_name(f".{out.name}.tuning")
    with _checkpoint_folder(folder, fresh=fresh) if main else nullcontext():
        accelerator.wait_for_everyone()
        start = time.perf_counter()
        job = _make_job(parent, dense, settings, plan, components, accelerator)
        job.checkpoint, job.log = folder / CHECKPOINT, log_path(out, settings.log)
        job.progress = progress if main else silent
        registry.load("tuning", settings.method).tune(job)
        if main:
            log = {
                "seconds": round(time.perf_counter() - start, 3),
                "processes": accelerator.num_processes,
                "device": str(accelerator.device),
            }
            write_bundle(job, out, replace=replace, log=log)
            shutil.rmtree(folder, ignore_errors=True)
        accelerator.wait_for_everyone()
    return Bundle.open(out)


def check(plan: SparsityPlan, settings: Tune, narrower: Collection[str] = ()) -> tuple[str, ...]:
    """The components to tune: those asked for, else all that are pruned and can be tuned.

    `narrower` are those that lose whole blocks, with or without single weights beside.

    Raises:
        UsageError: the settings do not fit the plan, or something is not there that they need.
    """
    if settings.log == "tensorboard":
        require_tensorboard()
    if settings.images is not None:
        require_folder(Path(settings.images))
    pruned = {p.component for p in plan.layers if p.pruned}
    if not moves_masks(settings.method):
        pruned |= {*narrower}
    elif narrower and not pruned:
        raise UsageError(
            f"tune: {settings.method} moves zeros, and here whole neurons, heads and channels go "
            "and no single weight; use distill or finetune"
        )
    for component in settings.components:
        if component not in pruned & set(TUNABLE):
            why = "is not pruned" if component in TUNABLE else "cannot be tuned"
            raise UsageError(
                f"tune: component {component} {why}; choose among "
                f"{', '.join(sorted(pruned & set(TUNABLE))) or 'none, for this bundle'}"
            )
    chosen = tuple(c for c in TUNABLE if c in (settings.components or pruned))
    if not chosen:
        raise UsageError(
            f"tune: expected a pruned {' or '.join(TUNABLE)}, found {', '.join(sorted(pruned))} "
            "only; prune one of them first"
        )
    return chosen


def _narrower(parent: Bundle) -> set[str]:
    """The components of which blocks have become narrower."""
    return {
        component
        for component, record in read_record(parent.manifest.details).items()
        if any(block.kept < block.width for block in record.blocks.values())
    }


def _accelerator(settings: Tune) -> Accelerator:
    """Raises UsageError for what this machine or way of launching cannot do."""
    from accelerate import Accelerator, DistributedType
    from accelerate.state import AcceleratorState

    # accelerate keeps one precision for the life of a process; a sweep tunes more than once in it.
    AcceleratorState._reset_state()
    cpu = processes().device.type == "cpu"
    if settings.mixed_precision == "fp16" and cpu:
        raise UsageError("tune: mixed_precision fp16 needs a GPU; take bf16, or no")
    accelerator = Accelerator(mixed_precision=settings.mixed_precision, cpu=cpu)
    plain = {t for t in DistributedType if t == "NO" or t.startswith("MULTI_")}
    if accelerator.distributed_type not in plain:
        raise UsageError(
            f"tune: cannot keep masks under {accelerator.distributed_type}; launch with plain data "
            "parallelism (`accelerate launch` without DeepSpeed, FSDP or Megatron)"
        )
    return accelerator


@contextmanager
def _checkpoint_folder(folder: Path, *, fresh: bool) -> Iterator[None]:
    """The folder, made if need be, and nobody else's meanwhile; left behind only with a checkpoint
    in it.

    Raises:
        InputError: another process is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, wait=False):
            if fresh:  # only now: it may have been another's
                (folder / CHECKPOINT).unlink(missing_ok=True)
            yield
    except BlockingIOError as e:
        raise InputError(f"{folder}: another tuning is at work there; wait for it to end") from e
    finally:
        with suppress(OSError):
            folder.rmdir()


def _make_job(
    parent: Bundle,
    dense: Bundle,
    settings: Tune,
    plan: SparsityPlan,
    components: tuple[str, ...],
    accelerator: Accelerator,
) -> Job:
    students = load_models(parent.path, accelerator.device)
    layers, masks = {}, {}
    for component in components:
        students[component].requires_grad_(True)
        state = students[component].state_dict()
        layers[component] = {
            state_key(component, p.name, state): p for p in plan.of(component) if p.pruned
        }
        masks[component] = {key: state[key] != 0 for key in layers[component]}
    lost = lost_blocks(parent, read_catalog(dense.path))
    remains = {
        component: {
            state_key(component, name, students[component].state_dict()): what
            for name, what in lost.get(component, {}).items()
        }
        for component in components
    }
    return Job(
        settings,
        parent,
        dense,
        plan,
        components,
        students,
        layers,
        masks,
        accelerator,
        remains=remains,
    )
