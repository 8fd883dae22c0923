"""The YAML a person writes, checked in full before any slow work: unknown keys are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sdcompress.catalog import COMPONENTS
from sdcompress.errors import SdcompressError, UsageError
from sdcompress.patterns import parse_pattern
from sdcompress.registry import names

SHIPPED = Path(__file__).parent / "recipes"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rule(_Part):
    """One rule: the layers it speaks of, and what becomes of them.

    `layers` is a glob on state-dict keys ("down_blocks.*.attentions.*"; `.weight` may be left off).
    `sparsity` is the fraction of zeros; an N:M pattern brings its own. `min_sparsity` and
    `max_sparsity` bound what an allocation may ask of any one layer.
    """

    layers: str = "*"
    scope: Literal["linear", "conv", "all"] = "all"
    keep: Literal["dense"] | None = None
    reason: str | None = None
    criterion: str = "magnitude"
    pattern: str = "unstructured"
    sparsity: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    min_sparsity: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    max_sparsity: float = Field(default=1.0, ge=0, le=1, allow_inf_nan=False)

    @field_validator("criterion")
    @classmethod
    def _known(cls, value: str) -> str:
        return _one_of(value, "criteria")

    @model_validator(mode="after")
    def _complete(self) -> Rule:
        if self.keep:
            # By value: a recipe that was written out again names every key.
            fields = type(self).model_fields
            ways = ("criterion", "pattern", "sparsity", "min_sparsity", "max_sparsity")
            if extra := [w for w in ways if getattr(self, w) != fields[w].default]:
                raise ValueError(f"'keep: dense' takes no {', '.join(extra)}")
            if not self.reason:
                raise ValueError("'keep: dense' needs a 'reason'")
            return self
        fixed = _pattern_sparsity(self.pattern)
        if fixed is None and self.sparsity is None:
            raise ValueError("an unstructured rule needs a 'sparsity' between 0 and 1")
        if fixed is not None and self.sparsity is not None and abs(fixed - self.sparsity) > 1e-9:
            raise ValueError(
                f"pattern {self.pattern} means sparsity {fixed:g}, found {self.sparsity:g}; "
                "leave 'sparsity' out"
            )
        if fixed is not None and (self.min_sparsity, self.max_sparsity) != (0, 1):
            raise ValueError(
                f"pattern {self.pattern} gives every layer the same sparsity; leave "
                "'min_sparsity' and 'max_sparsity' out"
            )
        if self.min_sparsity > self.max_sparsity:
            raise ValueError(
                f"expected a min_sparsity of no more than max_sparsity, found "
                f"{self.min_sparsity:g} and {self.max_sparsity:g}"
            )
        asked = self.sparsity if fixed is None else fixed
        if asked is not None and not self.min_sparsity <= asked <= self.max_sparsity:
            raise ValueError(
                f"expected a sparsity from min_sparsity to max_sparsity ({self.min_sparsity:g} to "
                f"{self.max_sparsity:g}), found {asked:g}; layers within these limits cannot come "
                "to it together"
            )
        return self


class StructureRule(_Part):
    """One rule about blocks that lose neurons, heads or channels as a whole (see `structure`).

    `blocks` is a glob on their names ("down_blocks.*.ff"); `ratio` is the share that goes, left out
    where a budget decides, of which `max_ratio` is the most. What stays is a multiple of `multiple`
    channels. With `refit`, what stays of the layer behind a
    block is fitted anew by least squares, to inputs recorded while the model paints.
    """

    blocks: str = "*"
    kind: Literal["neurons", "heads", "channels", "all"] = "all"
    keep: Literal["dense"] | None = None
    reason: str | None = None
    criterion: str = "magnitude"
    refit: bool = False
    ratio: float | None = Field(default=None, ge=0, lt=1, allow_inf_nan=False)
    multiple: int = Field(default=8, ge=1, le=256)
    max_ratio: float = Field(default=0.75, ge=0, lt=1, allow_inf_nan=False)

    @field_validator("criterion")
    @classmethod
    def _known(cls, value: str) -> str:
        return _one_of(value, "criteria")

    @model_validator(mode="after")
    def _complete(self) -> StructureRule:
        if self.keep:
            fields = type(self).model_fields
            ways = ("criterion", "refit", "ratio", "multiple", "max_ratio")
            if extra := [w for w in ways if getattr(self, w) != fields[w].default]:
                raise ValueError(f"'keep: dense' takes no {', '.join(extra)}")
            if not self.reason:
                raise ValueError("'keep: dense' needs a 'reason'")
        return self


class Budget(_Part):
    """What a component may still cost, as a share of the dense one; exactly one of the three.

    `macs` and `latency` are of one denoising step, or of one run of another component.
    """

    macs: float | None = Field(default=None, gt=0, lt=1, allow_inf_nan=False)
    params: float | None = Field(default=None, gt=0, lt=1, allow_inf_nan=False)
    latency: float | None = Field(default=None, gt=0, lt=1, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError(
                f"expected one of macs, params and latency, found {', '.join(given) or 'none'}"
            )
        return self

    @property
    def what(self) -> str:
        """macs, params or latency."""
        return next(iter(self.model_dump(exclude_none=True)))

    @property
    def share(self) -> float:
        share = getattr(self, self.what)
        assert isinstance(share, float)
        return share


class Structure(_Part):
    """Blocks that become narrower, before single weights are pruned.

    Either every rule names its `ratio`, or one `budget` for the component is spent where it costs
    least. `table` is a file of `sdcompress latency`, for a budget of latency.
    """

    budget: Budget | None = None
    table: str | None = None
    rules: tuple[StructureRule, ...] = Field(default=(StructureRule(),), min_length=1)

    @model_validator(mode="after")
    def _fit_together(self) -> Structure:
        rules = [rule for rule in self.rules if not rule.keep]
        if self.budget and any(rule.ratio is not None for rule in rules):
            raise ValueError("a budget decides on the ratios; leave out 'ratio', or 'budget'")
        if not self.budget and any(rule.ratio is None for rule in rules):
            raise ValueError("expected a 'ratio' in every rule, or one 'budget' for all of them")
        if self.table is not None and not (self.budget and self.budget.latency):
            raise ValueError("'table' belongs to a budget of latency; leave it out")
        return self


class ComponentRecipe(_Part):
    """Ordered rules for one component; the last that matches a layer wins.

    `structure` says what goes as a whole before that; with it, there need be no rules.
    `allocation` spreads what a rule asks for over its layers. `spread` belongs to owl: by how much
    a layer's sparsity may differ from the one asked for.
    """

    structure: Structure | None = None
    allocation: str = "uniform"
    spread: float = Field(default=0.08, ge=0, le=1, allow_inf_nan=False)
    rules: tuple[Rule, ...] = ()

    @field_validator("allocation")
    @classmethod
    def _known(cls, value: str) -> str:
        return _one_of(value, "allocation")

    @model_validator(mode="after")
    def _something(self) -> ComponentRecipe:
        if not self.rules and not self.structure:
            raise ValueError("expected 'rules', 'structure' or both, found neither")
        return self

    @model_validator(mode="after")
    def _of_owl(self) -> ComponentRecipe:
        default = type(self).model_fields["spread"].default
        if self.allocation != "owl" and self.spread != default:
            raise ValueError(
                f"'spread' belongs to 'allocation: owl', found {self.allocation}; leave it out"
            )
        return self


class Calibration(_Part):
    """The denoising trajectories that statistics are recorded on, where a criterion needs any.

    `prompts` empty: the first `count` of those that come with the model (see `models.prompts`);
    else all of them, whatever `count` is. Picture i uses seed `seed + i`; steps and guidance left
    out are the model's own.

    `images`: a folder of pictures and captions that gradients are taken on; by default the pictures
    that the dense model makes of the prompts. `packages`: the layers are calibrated and pruned in
    so many parts, one after the other, each seeing the parts before it pruned; more of them take
    more passes and less memory. `max_hessian`: a Conv of more columns (channels times kernel
    positions) has one Hessian for each kernel position.
    """

    prompts: tuple[str, ...] = ()
    count: int = Field(default=128, ge=1, le=100_000)
    seed: int = 0
    steps: int | None = Field(default=None, ge=1, le=1000)
    guidance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    images: str | None = None
    packages: int = Field(default=1, ge=1)
    max_hessian: int = Field(default=8192, ge=1)


class Tune(_Part):
    """Tuning of what stays, after pruning.

    `steps` are optimiser steps over `batch` samples each, in `accumulate` parts. `components`
    empty: those that are pruned. `prompts` empty: those that come with the model. `images`: the
    folder of pictures and captions that the diffusion loss learns from. Paths are taken from where
    the command is run. `features` is distill's weight of what the blocks put out, beside the noise
    prediction; `decay` belongs to sr_ste and `cycles` to dsnot. `on_divergence: keep` makes a
    bundle of the last good weights where the loss leaves all bounds.
    """

    method: str = "distill"
    components: tuple[str, ...] = ()
    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=8, ge=1)
    accumulate: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=3e-4, gt=0, allow_inf_nan=False)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    ema: float | None = Field(default=None, gt=0, lt=1)
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    lora_rank: int | None = Field(default=None, ge=1)
    features: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    decay: float = Field(default=2e-4, ge=0, allow_inf_nan=False)
    cycles: int = Field(default=50, ge=1)
    prompts: tuple[str, ...] = ()
    images: str | None = None
    broken_images: Literal["refuse", "skip"] = "refuse"
    sampling_steps: int | None = Field(default=None, ge=1, le=1000)
    guidance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    seed: int = 0
    checkpoint_every: int = Field(default=100, ge=1)
    on_divergence: Literal["stop", "keep"] = "stop"
    log: Literal["csv", "tensorboard"] = "csv"

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        return _one_of(value, "tuning")

    @field_validator("components")
    @classmethod
    def _there(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _check_components(value)

    @model_validator(mode="after")
    def _fit_together(self) -> Tune:
        if self.method == "finetune" and self.images is None:
            raise ValueError(
                "finetune learns from pictures with captions; name their folder as 'images', or "
                "use distill, which needs prompts only"
            )
        if self.method in ("distill", "dsnot") and self.images is not None:
            raise ValueError(
                f"{self.method} learns from prompts; leave out 'images', or use finetune"
            )
        if self.method in ("sr_ste", "dsnot") and self.lora_rank is not None:
            raise ValueError(
                f"{self.method} changes weights one by one, which adapters cannot; leave out "
                "'lora_rank', or use distill or finetune"
            )
        if self.batch % self.accumulate:
            raise ValueError(
                f"a batch of {self.batch} cannot be cut into {self.accumulate} equal parts; "
                "change 'batch' or 'accumulate'"
            )
        return self

    def decides(self) -> dict[str, Any]:
        """What a checkpoint must have been made by, to be gone on from."""
        free = {"checkpoint_every", "log", "on_divergence"}
        return self.model_dump(mode="json", exclude=free)


class Schedule(_Part):
    """Pruning in several rounds, each on what the last one left.

    Sparsity grows from `initial` to what the rules ask for, fast at first: s_t = s + (s_0 - s) *
    (1 - t/T)**3; an N:M pattern comes down to its N by way of (M-1):M. Scores are computed anew in
    every round, and so are statistics if `recalibrate` says so. `tune` is what happens between two
    rounds, after all but the last.
    """

    rounds: int = Field(default=1, ge=1)
    initial: float = Field(default=0.0, ge=0, lt=1, allow_inf_nan=False)
    recalibrate: bool = True
    tune: Tune | None = None


class Export(_Part):
    """How the graph is written.

    `upcast_attention`: attention scores in fp32; `auto` where the model's config asks for it.
    `calibrate`: how many of the recipe's prompts are painted, before an fp16 export, to find the
    layers whose numbers leave the range of fp16; those are computed in fp32.
    """

    dtype: Literal["fp16", "fp32"] = "fp16"
    upcast_attention: Literal["auto", "on", "off"] = "auto"
    calibrate: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _needed(self) -> Export:
        if self.calibrate and self.dtype == "fp32":
            raise ValueError("fp32 has range enough; leave out 'calibrate', or use dtype fp16")
        return self


class Engine(_Part):
    """Which backend builds the engines; `options` are the backend's own."""

    backend: str = "onnxruntime"
    options: dict[str, str | int | float | bool | list[str]] = {}


class Sampling(_Part):
    """How pictures are made; what is left out is the model's own default.

    `height` and `width` are in pixels.
    """

    steps: int | None = Field(default=None, ge=1, le=1000)
    guidance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    height: int | None = Field(default=None, ge=8, multiple_of=8)
    width: int | None = Field(default=None, ge=8, multiple_of=8)


class Bench(_Part):
    """Each engine runs in `rounds` fresh processes of about `budget` seconds of timed work.

    `residency`: all components loaded at once, or one after the other for small devices.
    """

    rounds: int = Field(default=10, ge=2)
    budget: float = Field(default=1.2, gt=0, allow_inf_nan=False)
    residency: Literal["resident", "sequential"] = "resident"


class Gates(_Part):
    """Limits for `sdcompress gate`; what is left out is not looked at.

    Ratios are sparse ÷ dense. `psnr` is in dB, the median over the pictures, sparse against dense.
    `sparse_layers` is how many layers must run on sparse kernels.
    """

    latency: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    memory: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    size: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    psnr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    sparse_layers: int | None = Field(default=None, ge=0)


class Pictures(_Part):
    """The pictures shown dense beside sparse; picture i uses seed `seed + i`."""

    prompts: tuple[str, ...] = ()
    seed: int = 0


class Quality(_Part):
    """Pictures of the weights, dense and sparse from the same seeds, held against each other.

    `prompts` empty: those that come with the model. `metrics` empty: all of `sdcompress list
    metrics` that can run for it. `clip` is the CLIP model that scores, by name or path.
    """

    samples: int = Field(default=400, ge=2)
    prompts: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0)
    clip: str | None = None

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_one_of(metric, "evaluation/metrics") for metric in value)


class Recipe(_Part):
    """Everything `run` needs to know.

    `target` is the device it is for: a name of `sdcompress list targets`, or a YAML file.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str | None = None
    target: str | None = None
    seed: int = 0
    prune: dict[str, ComponentRecipe] = Field(min_length=1)
    calibration: Calibration = Calibration()
    schedule: Schedule = Schedule()
    tune: Tune | None = None
    export: Export = Export()
    engine: Engine = Engine()
    sampling: Sampling = Sampling()
    bench: Bench = Bench()
    pictures: Pictures = Pictures()
    quality: Quality | None = None
    gates: Gates = Gates()

    @field_validator("prune")
    @classmethod
    def _components(cls, value: dict[str, ComponentRecipe]) -> dict[str, ComponentRecipe]:
        _check_components(tuple(value))
        return value


def load_recipe(name_or_path: str) -> Recipe:
    """Load a shipped recipe by name, or any YAML file by path.

    Raises:
        UsageError: there is no such recipe, or it is not valid; the message names the key.
    """
    path = Path(name_or_path)
    shipped = SHIPPED / f"{name_or_path}.yaml"
    if not path.is_file():
        if not shipped.is_file():
            known = ", ".join(recipe_names())
            raise UsageError(
                f"no recipe {name_or_path!r}: expected a YAML file or one of {known}; "
                "`sdcompress list recipes` describes them"
            )
        path = shipped
    data = read_yaml(path, "'name' and 'prune'")
    try:
        return Recipe.model_validate(data)
    except ValidationError as e:
        raise UsageError(f"{path}: {describe_first(e)}") from e


def read_yaml(path: Path, keys: str) -> dict[Any, Any]:
    """The mapping in a YAML file; `keys` says which it should at least have.

    Raises:
        UsageError: it cannot be read, is not valid YAML, or is not a mapping.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: cannot be read as text ({e}); check the file") from e
    except (yaml.YAMLError, RecursionError) as e:
        where = getattr(e, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        problem = getattr(e, "problem", None) or "not valid YAML"
        raise UsageError(f"{path}{line}: {problem}; correct the YAML") from e
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected a mapping with {keys}, found {data!r:.40}")
    return data


def read_value(text: str) -> Any:
    """One value as a recipe would hold it; raises yaml.YAMLError where it is none."""
    return yaml.load(text, _StrictLoader)


def recipe_names() -> list[str]:
    return sorted(p.stem for p in SHIPPED.glob("*.yaml"))


def recipe_summary(name: str) -> str:
    """The first sentence of a shipped recipe's opening comment, after its launch command."""
    lines = (SHIPPED / f"{name}.yaml").read_text("utf-8").splitlines()
    comment = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    text = " ".join(comment[1:]).strip()
    return text.split(". ")[0].rstrip(".")


def model_of(recipe: Recipe, override: str | None) -> str:
    """The model to work on.

    Raises:
        UsageError: neither the recipe nor the command line names one.
    """
    if model := override or recipe.model:
        return model
    raise UsageError(
        f"recipe {recipe.name} names no model; give one with --model "
        "(mini-sd2, a diffusers directory, a hub id or a .safetensors file)"
    )


# What a value should have been, by pydantic's name for what is wrong with it.
_EXPECTED = {
    "literal_error": "{expected}",
    "string_type": "text",
    "string_too_short": "some text",
    "string_too_long": "{max_length} characters or fewer",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "finite_number": "a finite number",
    "greater_than": "more than {gt:.10g}",
    "greater_than_equal": "{ge:.10g} or more",
    "less_than": "less than {lt:.10g}",
    "less_than_equal": "{le:.10g} or less",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "{min_length} or more entries",
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type"), "a mapping"),
}
_FORMS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "a name of letters, digits, '.', '_' and '-'",
    r"^\d+\.\d$": "a number such as 8.7",
    r"^\d+(\.\d+)*$": "a version such as 10.3",
}
_ALTERNATIVES = ("str", "int", "float", "bool", "list[str]")  # of an option in a recipe


def describe_first(error: ValidationError, document: str = "recipe") -> str:
    """The first problem of a pydantic error in one line, in words of our own.

    An unknown key comes before all else: misspelled, it is also why another one is missing.
    """
    errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    kind, found, context = first["type"], first["input"], first.get("ctx", {})
    path = [str(part) for part in first["loc"]]
    if kind == "string_pattern_mismatch":
        expected = _FORMS.get(context["pattern"], f"text of the form {context['pattern']}")
    elif len(errors) > 1 and len(path) > 1 and path[-1] == _ALTERNATIVES[0]:
        del path[-1]
        expected = "text, a number, true, false or a list of texts"
    else:
        expected = _EXPECTED.get(kind, "").format_map(context)
    where = ".".join(path) or document
    if kind == "extra_forbidden":
        return f"{where}: unknown key; correct its spelling or remove it"
    if kind == "missing":
        return f"{where}: is missing; add it"
    if kind in ("value_error", "assertion_error"):
        return f"{where}: {context['error']}"
    if not expected:
        return f"{where}: {first['msg']}"
    quotes = "; put it in quotes" if kind == "string_type" and _is_number(found) else ""
    return f"{where}: expected {expected}, found {_in_words(found)}{quotes}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _in_words(value: object) -> str:
    """A value of a YAML file as the person who wrote it would call it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple, dict)):
        kind = "mapping" if isinstance(value, dict) else "list"
        return f"a {kind}" if value else f"an empty {kind}"
    return f"{value!r:.60}"


def _one_of(value: str, folder: str) -> str:
    if value not in (known := names(folder)):
        raise ValueError(f"expected one of {', '.join(known)}, found {value!r}")
    return value


def _check_components(value: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := set(value) - set(COMPONENTS):
        raise ValueError(
            f"expected components among {', '.join(COMPONENTS)}, found {sorted(unknown)[0]!r}"
        )
    return value


def _pattern_sparsity(text: str) -> float | None:
    try:
        return parse_pattern(text).sparsity
    except SdcompressError as e:
        raise ValueError(str(e)) from e


_AS_IN_1_2 = {
    "tag:yaml.org,2002:bool": re.compile(r"(true|True|TRUE|false|False|FALSE)$"),
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9_]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9_]+)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$"
        r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
}


class _StrictLoader(yaml.SafeLoader):
    """Three habits of YAML 1.1 must not reach a recipe: a key that appears twice (the last one
    would win), `2:4` as a number (it would mean 124, in base 60), and words such as `on` and `no`
    as truth values, which YAML 1.2 writes `true` and `false`.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  # an attribute of PyYAML's
        first: [(tag, _AS_IN_1_2.get(tag, pattern)) for tag, pattern in resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Looks at keys as written, before `<<` brings in others that they may override."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(
                    None, None, f"the key {key.value!r} appears twice", key.start_mark
                )
            seen.add((key.tag, key.value))
        return node
