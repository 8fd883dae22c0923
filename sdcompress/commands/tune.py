"""`sdcompress tune`: pruned bundle + dense model → tuned bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel

from sdcompress.commands._common import (
    GUIDANCE,
    Finite,
    Stopwatch,
    emit,
    json_option,
    model_options,
    open_model,
    output_option,
    told_progress,
)
from sdcompress.plan import Accounting

if TYPE_CHECKING:
    from sdcompress.bundle import Bundle
    from sdcompress.recipe import Tune


class Output(BaseModel):
    """`tune --json`. The losses are means over the first and the last tenth of the steps, and None
    for methods that do not train."""

    bundle: str
    digest: str
    parent: str
    method: str
    steps: int | None
    first_loss: float | None
    final_loss: float | None
    accounting: Accounting
    seconds: float


POSITIVE = Finite(min=0, min_open=True)


@click.command()
@click.argument("pruned")
@output_option
@click.option(
    "--dense",
    metavar="MODEL",
    help="The model that was pruned; needed where the manifest does not lead to it.",
)
@click.option("--recipe", help="Take the settings from this recipe's 'tune'; options go before it.")
@click.option("--method", help="One of `sdcompress list tuning`; distill by default.")
@click.option(
    "--component", "components", multiple=True, help="What to tune; by default all that is pruned."
)
@click.option("--steps", type=click.IntRange(min=1), help="Optimiser steps.")
@click.option("--batch", type=click.IntRange(min=1), help="Samples a step, of all processes.")
@click.option(
    "--accumulate", type=click.IntRange(min=1), help="Parts a process makes of its share."
)
@click.option(
    "--learning-rate", type=POSITIVE, help="The highest; a small model such as mini-sd2 takes 1e-3."
)
@click.option(
    "--schedule",
    type=click.Choice(["constant", "linear", "cosine"]),
    help="How the rate falls over the steps.",
)
@click.option("--warmup", type=click.IntRange(min=0), help="Steps until the rate is reached.")
@click.option("--weight-decay", type=Finite(min=0), help="AdamW's.")
@click.option("--max-grad-norm", type=POSITIVE, help="Gradients are clipped to this length.")
@click.option(
    "--ema",
    type=Finite(min=0, max=1, min_open=True, max_open=True),
    help="Decay of the moving average that is kept; none by default.",
)
@click.option(
    "--mixed-precision",
    type=click.Choice(["no", "fp16", "bf16"]),
    help="What is computed in; weights are fp32 while they are tuned.",
)
@click.option(
    "--gradient-checkpointing", is_flag=True, default=None, help="Less memory, more time."
)
@click.option("--lora-rank", type=click.IntRange(min=1), help="Train adapters of this rank only.")
@click.option("--features", type=Finite(min=0), help="distill: weight of the blocks' outputs.")
@click.option("--decay", type=Finite(min=0), help="sr_ste: pull of pruned weights towards zero.")
@click.option("--cycles", type=click.IntRange(min=1), help="dsnot: how often weights may swap.")
@click.option("--prompts", type=click.Path(path_type=Path), help="Learn from these, one a line.")
@click.option(
    "--images", metavar="DIR", help="finetune, sr_ste: pictures, with metadata.jsonl or .csv."
)
@click.option(
    "--broken-images",
    type=click.Choice(["refuse", "skip"]),
    help="finetune: what to do with pictures that cannot be read or have no caption.",
)
@click.option("--sampling-steps", type=click.IntRange(1, 1000), help="Steps of a trajectory.")
@click.option("--guidance", type=GUIDANCE, help="Of the trajectories.")
@click.option("--seed", type=int, help="Of all that is random.")
@click.option("--checkpoint-every", type=click.IntRange(min=1), help="Steps between checkpoints.")
@click.option(
    "--on-divergence",
    type=click.Choice(["stop", "keep"]),
    help="A loss out of bounds: an error, or a bundle of the last good weights.",
)
@click.option("--log", type=click.Choice(["csv", "tensorboard"]), help="Written beside the output.")
@click.option("--fresh", is_flag=True, help="Begin anew, whatever an earlier call has left.")
@model_options
@json_option
def command(
    pruned: str,
    output: Path,
    dense: str | None,
    recipe: str | None,
    prompts: Path | None,
    fresh: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Tune the weights that PRUNED, a bundle of `sdcompress prune`, has kept; its zeros stay.

    The settings are those of `tune:` in a recipe. A call that was killed goes on from its last
    checkpoint when it is repeated. The loss goes to OUTPUT.csv.

    \b
    Examples:
      sdcompress prune mini-sd2 --recipe demo -o pruned
      sdcompress tune pruned --steps 200 -o tuned
      accelerate launch -m sdcompress tune pruned --steps 200 -o tuned
    """
    from sdcompress.bundle import refuse_existing
    from sdcompress.evaluation.processes import processes
    from sdcompress.models.prompts import read_prompts
    from sdcompress.plan import account
    from sdcompress.tuning import find_dense, tune

    watch = Stopwatch()
    how = {name: options.pop(name) for name in ("config", "variant", "allow_pickle", "loras")}
    asked = {name: value for name, value in options.items() if value not in (None, ())}
    if prompts:
        asked["prompts"] = read_prompts(prompts)
    settings = _settings(recipe, asked)
    _refuse_unused(asked, settings.method)
    refuse_existing(output)
    parent = _open(pruned)
    source = open_model(dense, **how) if dense else find_dense(parent)
    with told_progress("loading") as progress:
        bundle = tune(parent, settings, output, dense=source, fresh=fresh, progress=progress)
    if not processes().is_main_process:
        return
    assert bundle.manifest.plan
    details = bundle.manifest.details
    result = Output(
        bundle=str(output),
        digest=bundle.digest,
        parent=parent.digest,
        method=settings.method,
        steps=details.get("steps"),
        first_loss=details.get("first_loss"),
        final_loss=details.get("final_loss"),
        accounting=account(bundle.manifest.plan),
        seconds=watch.seconds,
    )

    from sdcompress.commands._tables import accounting_table

    def show(console: Any) -> None:
        if result.steps is not None:
            console.print(
                f"{result.steps} steps: loss {result.first_loss:.4g} → {result.final_loss:.4g}"
            )
        console.print(accounting_table(result.accounting))

    emit(result, as_json, show)
    _remark(details)


def _settings(recipe: str | None, asked: dict[str, Any]) -> Tune:
    """The recipe's settings with what the command line says over them.

    Raises:
        UsageError: the recipe has none, or they are not valid.
    """
    from pydantic import ValidationError

    from sdcompress.errors import UsageError
    from sdcompress.recipe import Tune, describe_first, load_recipe

    base: dict[str, Any] = {}
    if recipe:
        found = load_recipe(recipe).tune
        if found is None:
            raise UsageError(f"recipe {recipe}: expected a 'tune' section, found none; add one")
        base = found.model_dump(mode="json")
    try:
        return Tune.model_validate({**base, **asked})
    except ValidationError as e:
        raise UsageError(f"tune: {describe_first(e, 'settings')}") from e


_ONLY = {
    "features": ("distill", "sr_ste"),
    "decay": ("sr_ste",),
    "cycles": ("dsnot",),
    "broken_images": ("finetune", "sr_ste"),
}


def _refuse_unused(asked: dict[str, Any], method: str) -> None:
    """Raise UsageError for an option on the command line that the method does not look at."""
    from sdcompress.errors import UsageError

    for name, methods in _ONLY.items():
        if name in asked and method not in methods:
            raise UsageError(
                f"--{name.replace('_', '-')} is for {' and '.join(methods)}, found {method}; "
                "leave it out or choose another --method"
            )


def _open(pruned: str) -> Bundle:
    from sdcompress.bundle import Bundle

    bundle = Bundle.open(Path(pruned), stages=("pruned", "tuned"))
    bundle.check_files()
    return bundle


def _remark(details: dict[str, Any]) -> None:
    import warnings

    if step := details.get("diverged_in_step"):
        warnings.warn(
            f"the loss left all bounds in step {step}; these are the weights of step "
            f"{details['steps']}, the last good ones",
            stacklevel=1,
        )
    elif details.get("final_loss", 0.0) > details.get("first_loss", 0.0):
        warnings.warn(
            "the loss rose while tuning; try a lower --learning-rate or more --steps", stacklevel=1
        )
