"""`sdcompress list`: what there is to choose from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from pydantic import BaseModel

from sdcompress.commands._common import emit, json_option

if TYPE_CHECKING:
    from rich.console import Console

KINDS = (
    "criteria",
    "allocations",
    "tuning",
    "metrics",
    "backends",
    "targets",
    "recipes",
    "models",
)

MODELS = {
    "mini-sd2": "the small trained Stable Diffusion 2 in this package, 64×64 pixels, no download",
    "DIRECTORY": "a diffusers directory, or a bundle made by sdcompress",
    "HUB-ID@REVISION": "a model on the hub; the resolved commit goes into the manifest",
    "FILE.safetensors": "a single-file checkpoint; imported once with the configs shipped here",
}


class Item(BaseModel):
    """`problem` says why it does not work on this machine; None if it does."""

    name: str
    summary: str
    problem: str | None = None


class Output(BaseModel):
    """`list --json`."""

    kind: str
    items: list[Item]


@click.command()
@click.argument("kind", type=click.Choice(KINDS))
@json_option
def command(kind: str, as_json: bool) -> None:
    """List criteria, allocations, tuning methods, metrics, backends, targets, recipes or models.

    \b
    Example:
      sdcompress list recipes
    """
    output = Output(kind=kind, items=_items(kind))
    emit(output, as_json, lambda console: _show(console, output))


def _items(kind: str) -> list[Item]:
    from sdcompress import registry

    if kind == "models":
        return [Item(name=name, summary=summary) for name, summary in MODELS.items()]
    if kind == "recipes":
        from sdcompress.recipe import recipe_names, recipe_summary

        return [Item(name=name, summary=recipe_summary(name)) for name in recipe_names()]
    if kind == "targets":
        from export.targets import load_target
        from export.targets import names as target_names

        return [Item(name=t.name, summary=t.summary) for t in map(load_target, target_names())]
    if kind == "backends":
        from export.backends import load_backend, names

        return [
            Item(
                name=name,
                summary=registry.summary("backends", name, "export"),
                problem=load_backend(name).available(),
            )
            for name in names()
        ]
    if kind == "metrics":
        from sdcompress.evaluation.metrics import FOLDER, load_metric, metric_names

        return [
            Item(
                name=name,
                summary=registry.summary(FOLDER, name),
                problem=load_metric(name).missing(),
            )
            for name in metric_names()
        ]
    folder = "allocation" if kind == "allocations" else kind
    return [
        Item(name=name, summary=registry.summary(folder, name)) for name in registry.names(folder)
    ]


def _show(console: Console, output: Output) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for item in output.items:
        state = "" if item.problem is None else f"not here: {item.problem}"
        table.add_row(Text(item.name, "bold"), item.summary, Text(state, "yellow"))
    console.print(table)
