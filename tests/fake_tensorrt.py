"""A `tensorrt` made from the true API surface of one version, for machines without the library.

Whatever the version lacks is not there: classes, enum members, properties, methods, argument names
and counts. Read-only properties cannot be set, and enum values are shuffled, so that nobody can
rely on them. Behind the names is just enough behaviour to build, load, refit and run: a plan holds
where its ONNX file lies, what it was built with and the digest of every weight.

    trt = fake_tensorrt("10.3.0", sm="8.7")
    trt = fake_tensorrt("10.3.0", without={"IBuilderConfig.progress_monitor"})
    install(folder, "10.3.0")    # `import tensorrt` finds it, in child processes too (PYTHONPATH)
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

SURFACES = Path(__file__).parent / "data" / "tensorrt_api"
VERSIONS = ("10.3.0", "10.13.3", "10.16.1", "11.4.0")
MAGIC = b"FAKE TENSORRT PLAN\n"
CACHE_MAGIC = b"FAKE TIMING CACHE\n"
SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
# Synthetic: written by hand after the wording of public logs, not taken from one.
SKIPPED = "UNSUPPORTED_STATE: Skipping tactic 7 due to insufficient memory on requested size of "
OUT_OF_MEMORY = "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)"


@dataclass
class Behaviour:
    """What the fake does; with `install` everything must be JSON.

    `needs`: the most it can do, such as {"workspace_mb": 512, "level": 2, "pixels": 32}: a build
    that may use more (or that says nothing) runs out of memory, in the way of `out_of_memory`.
    `log`: (severity, message) pairs of a build. `layers`: what the inspector shows; with DETAILED
    verbosity only. `execute`: "onnxruntime" computes what the ONNX file says, "zeros" nothing, and
    a function gets the path of the model and the inputs (bytes by name) and gives the outputs.
    """

    log: Sequence[tuple[str, str]] = ()
    layers: Sequence[Mapping[str, Any]] = (
        {"Name": "conv_in", "LayerType": "CaskConvolution", "TacticName": "sm80_xmma_fprop"},
    )
    needs: Mapping[str, int] = field(default_factory=dict)
    out_of_memory: str = "fail"  # "fail", "raise", "skip" or "kill"
    execute: str | Callable[[str, dict[str, bytes]], dict[str, bytes]] = "onnxruntime"
    flag_changes_plan: bool = True
    noisy: bool = False  # every build gives other bytes
    parses: bool = True
    loads: bool = True
    context_bytes: int = 1 << 20


@functools.cache
def _surface(version: str) -> str:
    return (SURFACES / f"{version}.json").read_text()


def fake_tensorrt(
    version: str,
    *,
    sm: str = "8.7",
    without: Iterable[str] = (),
    name: str = "tensorrt",
    seed: int = 0,
    **behaviour: Any,
) -> FakeModule:
    """The module. `without` takes away "Class", "Class.member", "Enum.MEMBER" or a function.

    `seed` decides the values of the enums. `touched` of the module is the set of all names used.
    """
    surface = json.loads(_surface(version))
    for path in without:
        _remove(surface, path)
    return FakeModule(name, surface, sm, Behaviour(**behaviour), seed)


def install(folder: Path, version: str, name: str = "tensorrt", **behaviour: Any) -> Path:
    """Write a module that becomes the fake when it is imported; put `folder` on the path."""
    arguments = json.dumps({"version": version, "name": name, **behaviour})
    path = folder / f"{name}.py"
    path.write_text(
        "import json, sys\n"
        f"sys.path.append({str(Path(__file__).parents[1])!r})\n"
        "from tests.fake_tensorrt import fake_tensorrt\n"
        f"sys.modules[__name__] = fake_tensorrt(**json.loads({arguments!r}))\n"
    )
    return path


def _remove(surface: dict[str, Any], path: str) -> None:
    owner, _, member = path.rpartition(".")
    for kind in ("classes", "enums", "functions"):
        if not owner and path in surface[kind]:
            del surface[kind][path]
            return
    if owner in surface["enums"] and member in surface["enums"][owner]:
        surface["enums"][owner].remove(member)
        return
    for part in ("methods", "properties"):
        if member in surface["classes"].get(owner, {}).get(part, {}):
            del surface["classes"][owner][part][member]
            return
    raise ValueError(f"there is no {path} to take away")


class FakeModule(ModuleType):
    """Looks its names up in the surface, and remembers which were asked for."""

    def __init__(
        self, name: str, surface: dict[str, Any], sm: str, behaviour: Behaviour, seed: int
    ) -> None:
        super().__init__(name)
        self.touched: set[str] = set()
        self.behaviour, self.sm, self.seed = behaviour, sm, seed
        self.__version__ = surface["version"]
        self.made = _Made(self, surface)

    def __getattr__(self, name: str) -> Any:
        if name not in self.__dict__.get("made", ()):
            raise AttributeError(
                f"module {self.__name__!r} {self.__dict__.get('__version__')} has no {name!r}",
                name=name,
                obj=self,
            )
        self.touched.add(name)
        return self.made[name]


class _Made(dict[str, Any]):
    """The module's enums, classes and functions, each made when it is first needed."""

    def __init__(self, module: FakeModule, surface: dict[str, Any]) -> None:
        super().__init__()
        self._module, self._surface = module, surface

    def __contains__(self, name: object) -> bool:
        return any(name in self._surface[kind] for kind in ("enums", "classes", "functions"))

    def __missing__(self, name: str) -> Any:
        if name in self._surface["enums"]:
            made: Any = _make_enum(self._module, name, self._surface["enums"][name])
        elif name in self._surface["classes"]:
            made = _make_class(self._module, name, self._surface["classes"])
        elif name in self._surface["functions"]:
            made = _missing_behaviour(name)
        else:
            raise KeyError(name)
        self[name] = made
        if name == "ILogger":
            made.Severity = _make_enum(self._module, "ILogger.Severity", SEVERITIES)
        return made


class _EnumMeta(type):
    members: dict[str, Any]

    def __getattr__(cls, name: str) -> Any:
        if name not in cls.__dict__.get("__members__", {}):
            raise AttributeError(f"enum {cls.__name__} has no {name}", name=name, obj=cls)
        cls.module.touched.add(f"{cls.__name__}.{name}")
        return cls.__members__[name]


def _make_enum(module: FakeModule, name: str, members: Sequence[str]) -> Any:
    cls = _EnumMeta(name, (), {"module": module, "__members__": {}})
    values = list(range(len(members)))
    random.Random(f"{module.__version__}{name}{module.seed}").shuffle(values)

    def init(self: Any, member: str, value: int) -> None:
        self.name, self.value = member, value

    cls.__init__ = init
    cls.__int__ = cls.__index__ = lambda self: self.value
    cls.__repr__ = lambda self: f"<{name}.{self.name}: {self.value}>"
    cls.__members__.update({m: cls(m, v) for m, v in zip(members, values, strict=True)})
    return cls


def _missing_behaviour(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"the fake does not know what {name} does")

    return call


def _make_class(module: FakeModule, name: str, surface: Mapping[str, Any]) -> Any:
    api, behaviour = surface[name], _BEHAVIOUR.get(name, object)
    parents = [module.made[base] for base in api["bases"] if base in surface]
    bases = (*parents, behaviour) if behaviour is not object else (*parents,)
    body: dict[str, Any] = {"module": module, "_surface": name}

    def set_attribute(self: Any, attribute: str, value: Any) -> None:
        known = any(attribute in vars(c) for c in type(self).__mro__)
        if not known and "_surface" in vars(type(self)) and not attribute.startswith("_"):
            raise AttributeError(f"{name!r} object has no attribute {attribute!r}", name=attribute)
        object.__setattr__(self, attribute, value)

    body["__setattr__"] = set_attribute

    def derive(cls: Any) -> None:
        if "_surface" not in vars(cls):  # somebody's own: what it overrides, it relies on
            module.touched |= {f"{name}.{m}" for m in api["methods"] if m in vars(cls)}

    body["__init_subclass__"] = classmethod(derive)
    for method, signatures in api["methods"].items():
        body[method] = _method(module, name, method, signatures, behaviour)
    for attribute, access in api["properties"].items():
        body[attribute] = _property(module, name, attribute, access, behaviour)
    # What behaviour has and this version lacks must not shine through.
    for extra in vars(behaviour):
        if not extra.startswith("_") and extra not in body:
            body[extra] = _Absent(name, extra)
    if "__init__" not in api["methods"]:
        body["__init__"] = _method(module, name, "__init__", [], behaviour)
    return type(name, bases, body)


class _Absent:
    """Stands where the surface has nothing."""

    def __init__(self, owner: str, name: str) -> None:
        self._owner, self._name = owner, name

    def __get__(self, instance: Any, owner: Any) -> Any:
        raise AttributeError(
            f"{self._owner!r} object has no attribute {self._name!r}", name=self._name, obj=instance
        )

    def __set__(self, instance: Any, value: Any) -> None:
        self.__get__(instance, None)


def _method(
    module: FakeModule, owner: str, name: str, signatures: Sequence[str], behaviour: Any
) -> Any:
    does = vars(behaviour).get(name) or _missing_behaviour(f"{owner}.{name}")

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module.touched.add(f"{owner}.{name}")
        if not signatures:
            raise TypeError(f"{owner}.{name}: no constructor is offered")
        _check_arguments(module, signatures, args, kwargs)
        if name == "__init__":
            object.__setattr__(self, "_ready", True)
            return vars(behaviour).get("__init__", lambda *a, **k: None)(self, *args, **kwargs)
        return does(self, *args, **kwargs)

    call.__name__ = name
    return call


def _property(module: FakeModule, owner: str, name: str, access: str, behaviour: Any) -> property:
    getter = vars(behaviour).get(f"_get_{name}")
    setter = vars(behaviour).get(f"_set_{name}")

    def get(self: Any) -> Any:
        module.touched.add(f"{owner}.{name}")
        return getter(self) if getter else self.__dict__.get(f"_{name}")

    def put(self: Any, value: Any) -> None:
        module.touched.add(f"{owner}.{name}")
        if setter:
            setter(self, value)
        else:
            self.__dict__[f"_{name}"] = value

    return property(get, put if access == "rw" else None)


def _check_arguments(
    module: FakeModule, signatures: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """TypeError unless the call fits one of the signatures: names, count and types."""
    if not any(_fits(module, s, args, kwargs) for s in signatures):
        raise TypeError(
            f"incompatible arguments {tuple(type(a).__name__ for a in args)} "
            f"{sorted(kwargs)}; there is: {' or '.join(signatures)}"
        )


def _fits(
    module: FakeModule, signature: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    inside = signature[signature.index("(") + 1 : signature.rindex(") ->")]
    wanted = [p for p in _split(inside) if p][1:]  # without self
    names = [p.split(":")[0].split("=")[0].strip() for p in wanted]
    if len(args) > len(names) or any(k not in names[len(args) :] for k in kwargs):
        return False
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    for name, parameter in zip(names, wanted, strict=True):
        kind, _, default = parameter.partition(":")[2].partition("=")
        if name not in given:
            if not default:
                return False
        elif not _is_a(module, given[name], kind.strip(), default.strip()):
            return False
    return True


def _split(inside: str) -> list[str]:
    """Cut at the commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in inside:
        depth += (letter in "([<{") - (letter in ")]>}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _is_a(module: FakeModule, value: Any, kind: str, default: str) -> bool:
    if value is None:
        return default == "None"
    plain = {"str": str, "bool": bool, "tuple": tuple, "list": list}
    if kind in plain:
        return isinstance(value, plain[kind])
    if kind in ("int", "typing.SupportsInt"):
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in ("buffer", "typing_extensions.Buffer"):
        return isinstance(value, bytes | bytearray | memoryview)
    if kind == "Dims":
        return isinstance(value, tuple | list)
    name = kind.rpartition("::")[2]
    return name not in module.made or isinstance(value, module.made[name])


# ---------------------------------------------------------------------------------------------
# Behaviour: one class for each class of the surface, holding what its methods do. A property of
# the surface is read by `_get_NAME` and written by `_set_NAME`, or simply kept.


def _new(module: FakeModule, cls: str, *args: Any, **state: Any) -> Any:
    made = module.made[cls]
    instance = made.__new__(made, *args)
    vars(instance).update(state)
    return instance


def _say(logger: Any, severity: str, message: str) -> None:
    members = logger.module.made["ILogger"].Severity.__members__
    if "log" in vars(logger.module.made["ILogger"]):
        if not vars(logger).get("_ready"):
            raise TypeError("ILogger.__init__ was not called by the class derived from it")
        type(logger).log(logger, members[severity], message)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


class _ILogger:
    def log(self, severity: Any, msg: str) -> None: ...


class _Logger:
    def __init__(self, min_severity: Any = None) -> None: ...
    def log(self, severity: Any, msg: str) -> None: ...


class _IProgressMonitor:
    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...
    def step_complete(self, phase_name: str, step: int) -> bool:
        return True

    def phase_finish(self, phase_name: str) -> None: ...


class _IHostMemory(bytes):
    def _get_nbytes(self) -> int:
        return len(self)


class _ITensor:
    def _get_name(self) -> Any:
        return self._name

    def _get_shape(self) -> Any:
        return self._shape

    def _set_shape(self, shape: Any) -> None:
        if len(shape) != len(self._shape):
            raise ValueError("the number of dimensions cannot change")
        self._shape = tuple(shape)


class _INetworkDefinition:
    def _get_num_inputs(self) -> int:
        return len(self._inputs)

    def _get_num_outputs(self) -> int:
        return len(self._outputs)

    def _get_num_layers(self) -> int:
        return self._layers

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_output(self, index: int) -> Any:
        return self._outputs[index]

    def mark_weights_refittable(self, name: str) -> bool:
        return name in self._weights


class _ParserError:
    def desc(self) -> str:
        return str(self._text)

    def node_name(self) -> str:
        return str(self._node)

    def node_operator(self) -> str:
        return str(self._operator)

    def node(self) -> int:
        return -1

    def code(self) -> Any:
        return self.module.made["ErrorCode"].__members__[self._code]


class _OnnxParser:
    def __init__(self, network: Any, logger: Any) -> None:
        self._network, self._log, self._errors = network, logger, []

    def _get_num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()

    def parse_from_file(self, model: str) -> bool:
        try:
            found = _read_onnx(model)
        except _BadModelError as error:
            _say(self._log, "ERROR", error.logged)
            self._errors.append(_parser_error(self.module, error.text, code=error.code))
            return False
        if not self.module.behaviour.parses:
            self._errors.append(
                _parser_error(self.module, "Plugin not found", "node_3", "Frobnicate")
            )
            return False
        network = self._network
        network._model = str(Path(model).resolve())
        network._weights, network._layers = found["weights"], found["nodes"]
        network._inputs = [_tensor(self.module, *t) for t in found["inputs"]]
        network._outputs = [_tensor(self.module, *t) for t in found["outputs"]]
        network._symbols = {"inputs": found["inputs"], "outputs": found["outputs"]}
        return True


class _BadModelError(Exception):
    def __init__(self, text: str, code: str, logged: str = "") -> None:
        self.text, self.code, self.logged = text, code, logged or text


def _parser_error(
    module: FakeModule,
    text: str,
    node: str = "",
    operator: str = "",
    code: str = "UNSUPPORTED_NODE",
) -> Any:
    return _new(module, "ParserError", _text=text, _node=node, _operator=operator, _code=code)


_TYPES = {1: "FLOAT", 6: "INT32", 7: "INT64", 10: "HALF"}
_BYTES = {"FLOAT": 4, "INT32": 4, "INT64": 8, "HALF": 2}


def _read_onnx(model: str) -> dict[str, Any]:
    """Inputs, outputs and the digest of every weight of an ONNX file and its data file."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

    try:
        graph = onnx.load(model, load_external_data=False).graph
    except Exception as error:
        raise _BadModelError(
            "Failed to parse the ONNX model.", "MODEL_DESERIALIZE_FAILED"
        ) from error
    folder = Path(model).parent
    weights = {}
    for tensor in graph.initializer:
        if uses_external_data(tensor):
            where = next(e.value for e in tensor.external_data if e.key == "location")
            if not (folder / where).is_file():
                text = f"Failed to import initializer: {tensor.name}"
                raise _BadModelError(
                    text, "INVALID_GRAPH", f"Failed to open file: {folder / where}"
                )
            load_external_data_for_tensor(tensor, str(folder))
        weights[tensor.name] = hashlib.sha256(tensor.SerializeToString()).hexdigest()[:12]

    def described(values: Any) -> list[tuple[str, str, list[Any]]]:
        return [
            (
                v.name,
                _TYPES[v.type.tensor_type.elem_type],
                [
                    d.dim_value if d.HasField("dim_value") else d.dim_param
                    for d in v.type.tensor_type.shape.dim
                ],
            )
            for v in values
        ]

    return {
        "inputs": described(graph.input),
        "outputs": described(graph.output),
        "weights": weights,
        "nodes": len(graph.node),
    }


def _tensor(module: FakeModule, name: str, dtype: str, dims: Sequence[Any]) -> Any:
    return _new(
        module,
        "ITensor",
        _name=name,
        _dtype=module.made["DataType"].__members__[dtype],
        _shape=tuple(d if isinstance(d, int) else -1 for d in dims),
    )


class _IOptimizationProfile:
    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
        if not all(low <= o <= high for low, o, high in zip(min, opt, max, strict=True)):
            raise ValueError("min, opt and max must not fall")
        self.__dict__.setdefault("_shapes", {})[input] = [list(min), list(opt), list(max)]

    def get_shape(self, input: str) -> Any:  # noqa: A002
        return [tuple(s) for s in self.__dict__.get("_shapes", {}).get(input, [])]


class _ITimingCache:
    def serialize(self) -> Any:
        head = f"{self.module.__version__} {self.module.sm} {self._hits}"
        return _new(self.module, "IHostMemory", CACHE_MAGIC + head.encode())

    def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
        return True


class _IBuilderConfig:
    def _setup(self) -> None:
        self._flags: set[str] = set()
        self._pools: dict[str, int] = {}
        self._profiles: list[Any] = []
        self._builder_optimization_level = 3
        self._cache: Any = None
        self._profiling_verbosity: Any = None

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag.name)

    def get_flag(self, flag: Any) -> bool:
        return flag.name in self._flags

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[pool.name] = pool_size

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._pools.get(pool.name, 8 << 30)

    def add_optimization_profile(self, profile: Any) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def _get_num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
        raw = bytes(serialized_timing_cache)
        if raw and not raw.startswith(CACHE_MAGIC):
            _say(self._log, "WARNING", "Failed to deserialize timing cache.")
            return None
        made_by = raw[len(CACHE_MAGIC) :].decode().split()[:2] if raw else None
        return _new(self.module, "ITimingCache", _made_by=made_by, _hits=len(raw))

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        here = [self.module.__version__, self.module.sm]
        if cache._made_by not in (None, here) and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache


class _Builder:
    def __init__(self, logger: Any) -> None:
        self._log = logger
        if not vars(logger).get("_ready"):
            raise TypeError("ILogger.__init__ was not called by the class derived from it")

    def create_network(self, flags: int = 0) -> Any:
        known = self.module.made
        kind = "NetworkDefinitionCreationFlag"
        members = known[kind].__members__ if kind in known else {}
        typed = "STRONGLY_TYPED" in members and flags >> int(members["STRONGLY_TYPED"]) & 1
        always = _numbers(self.module.__version__)[0] >= 11
        return _new(
            self.module, "INetworkDefinition", _inputs=[], _outputs=[], _typed=typed or always
        )

    def create_builder_config(self) -> Any:
        config = _new(self.module, "IBuilderConfig", _log=self._log)
        type(config)._setup(config)
        return config

    def create_optimization_profile(self) -> Any:
        return _new(self.module, "IOptimizationProfile")

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        behaviour, say = self.module.behaviour, lambda s, m: _say(self._log, s, m)
        self._progress(config)
        say("VERBOSE", "Graph construction completed in 0.01 seconds.")
        free = [t._name for t in network._inputs if -1 in t._shape]
        covered = all(
            set(free) <= set(p.__dict__.get("_shapes", {})) for p in config._profiles
        ) and (config._profiles or not free)
        if not covered:
            say("ERROR", "Network has dynamic inputs, but no optimization profile fits them.")
            return None
        if not network._typed:
            say("ERROR", "The network is not strongly typed and its types were ignored.")
            return None
        if {"STRIP_PLAN", "SPARSE_WEIGHTS"} <= config._flags:
            say("ERROR", "kSTRIP_PLAN and kSPARSE_WEIGHTS exclude each other.")
            return None
        skipped = False
        if _too_much(behaviour.needs, network, config):
            if behaviour.out_of_memory == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if behaviour.out_of_memory == "raise":
                raise MemoryError("std::bad_alloc")
            if behaviour.out_of_memory == "fail":
                say("ERROR", OUT_OF_MEMORY)
                return None
            skipped = True
        if skipped:
            say("WARNING", f"{SKIPPED}{64 << 20} detected for tactic 0x0000000000000007.")
        for severity, message in behaviour.log:
            say(severity, message)
        say("INFO", f"Total Activation Memory: {behaviour.context_bytes} bytes")
        return _new(self.module, "IHostMemory", self._plan(network, config))

    def _progress(self, config: Any) -> None:
        monitor = vars(config).get("_progress_monitor")
        if monitor is None:
            return
        if not vars(monitor).get("_ready"):
            raise TypeError("IProgressMonitor.__init__ was not called")
        base = vars(self.module.made["IProgressMonitor"])
        if "phase_start" in base:
            monitor.phase_start("Building engine", None, 2)
        if "step_complete" in base:
            for step in range(2):
                monitor.step_complete("Building engine", step)
        if "phase_finish" in base:
            monitor.phase_finish("Building engine")

    def _plan(self, network: Any, config: Any) -> bytes:
        flags = set(config._flags)
        if not self.module.behaviour.flag_changes_plan:
            flags.discard("SPARSE_WEIGHTS")
        stripped = "STRIP_PLAN" in flags
        level = config.__dict__.get("_hardware_compatibility_level")
        head = {
            "version": self.module.__version__,
            "sm": self.module.sm,
            "model": network._model,
            "flags": sorted(flags),
            "detailed": config._profiling_verbosity is not None
            and config._profiling_verbosity.name == "DETAILED",
            "hardware": level.name if level else "NONE",
            "inputs": [
                [t._name, t._dtype.name, list(t._shape), s[2]]
                for t, s in zip(network._inputs, network._symbols["inputs"], strict=True)
            ],
            "outputs": [list(o) for o in network._symbols["outputs"]],
            "profiles": [p.__dict__.get("_shapes", {}) for p in config._profiles],
            "weights": dict.fromkeys(network._weights, "") if stripped else network._weights,
            "originals": network._weights,
        }
        if self.module.behaviour.noisy:
            head["noise"] = os.urandom(8).hex()
        return MAGIC + json.dumps(head, sort_keys=True).encode()


def _too_much(needs: Mapping[str, int], network: Any, config: Any) -> bool:
    """Whether a build asks for more than there is; enough that one of the needs is met."""
    if not needs:
        return False
    asked = {
        "workspace_mb": config._pools.get("WORKSPACE", 1 << 40) >> 20,
        "level": config._builder_optimization_level,
        "pixels": max((t._shape[2] for t in network._inputs if len(t._shape) == 4), default=0),
    }
    return not any(asked[kind] <= limit for kind, limit in needs.items())


class _Runtime:
    def __init__(self, logger: Any) -> None:
        self._log = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        raw, module = bytes(serialized_engine), self.module
        if not module.behaviour.loads:
            _say(self._log, "ERROR", OUT_OF_MEMORY)
            return None
        if not raw.startswith(MAGIC):
            _say(self._log, "ERROR", "Serialization (magicTag assertion failed)")
            return None
        plan = json.loads(raw[len(MAGIC) :])
        if plan["version"] != module.__version__:
            lean = "VERSION_COMPATIBLE" in plan["flags"]
            if not (lean and vars(self).get("_engine_host_code_allowed")):
                _say(self._log, "ERROR", "Serialization (version mismatch)")
                return None
        if plan["sm"] != module.sm and plan["hardware"] == "NONE":
            _say(self._log, "ERROR", "The engine plan file is for another compute capability.")
            return None
        return _new(module, "ICudaEngine", _plan=plan, _log=self._log)


class _ICudaEngine:
    def _io(self) -> list[tuple[str, str, str]]:
        return [("INPUT", i[0], i[1]) for i in self._plan["inputs"]] + [
            ("OUTPUT", o[0], o[1]) for o in self._plan["outputs"]
        ]

    def _find(self, name: str) -> tuple[str, str, str]:
        return next(t for t in _ICudaEngine._io(self) if t[1] == name)

    def _get_num_io_tensors(self) -> int:
        return len(_ICudaEngine._io(self))

    def _get_num_layers(self) -> int:
        return len(self.module.behaviour.layers)

    def _get_num_optimization_profiles(self) -> int:
        return max(1, len(self._plan["profiles"]))

    def _get_device_memory_size_v2(self) -> int:
        return int(self.module.behaviour.context_bytes)

    _get_device_memory_size = _get_device_memory_size_v2

    def _get_refittable(self) -> bool:
        return any(flag.startswith("REFIT") for flag in self._plan["flags"])

    def _get_streamable_weights_size(self) -> int:
        return 1 << 16 if "WEIGHT_STREAMING" in self._plan["flags"] else 0

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return int(self.module.behaviour.context_bytes)

    def get_tensor_name(self, index: int) -> str:
        return _ICudaEngine._io(self)[index][1]

    def get_tensor_mode(self, name: str) -> Any:
        return self.module.made["TensorIOMode"].__members__[_ICudaEngine._find(self, name)[0]]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.module.made["DataType"].__members__[_ICudaEngine._find(self, name)[2]]

    def get_tensor_location(self, name: str) -> Any:
        return self.module.made["TensorLocation"].__members__["DEVICE"]

    def get_tensor_shape(self, name: str) -> Any:
        return _shape(self._plan, name, {})

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
        shapes = self._plan["profiles"][profile_index].get(name)
        return [tuple(s) for s in shapes or [_shape(self._plan, name, {})] * 3]

    def create_execution_context(self, *args: Any, **kwargs: Any) -> Any:
        return _new(
            self.module, "IExecutionContext", _engine=self, _feeds={}, _addresses={}, _profile=0
        )

    def create_engine_inspector(self) -> Any:
        return _new(self.module, "EngineInspector", _plan=self._plan)

    def create_serialization_config(self) -> Any:
        return _new(self.module, "ISerializationConfig", _flags=set())

    def serialize(self) -> Any:
        raw = MAGIC + json.dumps(self._plan, sort_keys=True).encode()
        return _new(self.module, "IHostMemory", raw)

    def serialize_with_config(self, config: Any) -> Any:
        if "EXCLUDE_WEIGHTS" in config._flags:
            raise NotImplementedError("the fake keeps the weights")
        return _ICudaEngine.serialize(self)


class _ISerializationConfig:
    def set_flag(self, flag: Any) -> bool:
        self._flags.add(flag.name)
        return True

    def clear_flag(self, flag: Any) -> bool:
        self._flags.discard(flag.name)
        return True


class _EngineInspector:
    def get_engine_information(self, format: Any) -> str:  # noqa: A002
        layers = list(self.module.behaviour.layers)
        if not self._plan["detailed"]:
            layers = [layer["Name"] for layer in layers]
        if format.name == "ONELINE":
            return "\n".join(str(layer) for layer in layers)
        return json.dumps({"Layers": layers, "Bindings": []})


def _shape(plan: Mapping[str, Any], name: str, feeds: Mapping[str, Sequence[int]]) -> Any:
    """The shape of an input or output, -1 where it depends on inputs not given yet."""
    symbols: dict[str, int] = {}
    for known, _, pinned, dims in plan["inputs"]:
        actual = tuple(feeds.get(known, pinned))
        if known == name:
            return actual
        symbols.update(
            {d: a for d, a in zip(dims, actual, strict=True) if isinstance(d, str) and a >= 0}
        )
    dims = next(o[2] for o in plan["outputs"] if o[0] == name)
    if {"image_height", "image_width"} & set(dims) and "height" in symbols:
        config = json.loads(Path(plan["model"]).with_name("config.json").read_text())
        scale = 2 ** (len(config["block_out_channels"]) - 1)
        symbols["image_height"] = symbols["height"] * scale
        symbols["image_width"] = symbols["width"] * scale
    return tuple(d if isinstance(d, int) else symbols.get(d, -1) for d in dims)


class _IExecutionContext:
    def _get_engine(self) -> Any:
        return self._engine

    def _get_active_optimization_profile(self) -> int:
        return int(self._profile)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return 0 <= profile_index < max(1, len(self._engine._plan["profiles"]))

    def set_input_shape(self, name: str, shape: Any) -> bool:
        plan = self._engine._plan
        shape = tuple(shape)
        pinned = next(tuple(i[2]) for i in plan["inputs"] if i[0] == name)
        limits = plan["profiles"][self._profile].get(name) if plan["profiles"] else None
        low, high = (limits[0], limits[2]) if limits else (pinned, pinned)
        fits = len(shape) == len(low) and all(
            a <= s <= b for a, s, b in zip(low, shape, high, strict=True)
        )
        if fits:
            self._feeds[name] = shape
        return fits

    def get_tensor_shape(self, name: str) -> Any:
        return _shape(self._engine._plan, name, self._feeds)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def get_tensor_address(self, name: str) -> int:
        return int(self._addresses.get(name, 0))

    def infer_shapes(self) -> list[str]:
        names = [i[0] for i in self._engine._plan["inputs"]]
        return [n for n in names if -1 in _shape(self._engine._plan, n, self._feeds)]

    def update_device_memory_size_for_shapes(self) -> int:
        return int(self.module.behaviour.context_bytes)

    def execute_async_v3(self, stream_handle: int) -> bool:
        plan, behaviour = self._engine._plan, self.module.behaviour
        if "" in plan["weights"].values():
            _say(self._engine._log, "ERROR", "The engine is stripped and was not refitted.")
            return False
        if any(self._addresses.get(t[1]) is None for t in _ICudaEngine._io(self._engine)):
            _say(self._engine._log, "ERROR", "An address is not set.")
            return False
        shapes = {t[1]: _shape(plan, t[1], self._feeds) for t in _ICudaEngine._io(self._engine)}
        sizes = {t[1]: _count(shapes[t[1]]) * _BYTES[t[2]] for t in _ICudaEngine._io(self._engine)}
        feeds = {i[0]: ctypes.string_at(self._addresses[i[0]], sizes[i[0]]) for i in plan["inputs"]}
        if callable(behaviour.execute):
            results = behaviour.execute(plan["model"], feeds)
        elif behaviour.execute == "zeros":
            results = {o[0]: bytes(sizes[o[0]]) for o in plan["outputs"]}
        else:
            results = _compute(plan, feeds, shapes)
        for name, data in results.items():
            if len(data) != sizes[name]:
                raise ValueError(f"{name}: {len(data)} bytes do not fill {shapes[name]}")
            ctypes.memmove(self._addresses[name], data, len(data))
        return True


def _count(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _compute(
    plan: Mapping[str, Any], feeds: Mapping[str, bytes], shapes: Mapping[str, Any]
) -> dict[str, bytes]:
    import numpy as np
    import onnxruntime as ort

    kinds = {"FLOAT": "float32", "INT32": "int32", "INT64": "int64", "HALF": "float16"}
    session = _SESSIONS.get(plan["model"])
    if session is None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = _SESSIONS[plan["model"]] = ort.InferenceSession(
            plan["model"], options, providers=["CPUExecutionProvider"]
        )
    arrays = {
        i[0]: np.frombuffer(feeds[i[0]], kinds[i[1]]).reshape(shapes[i[0]]) for i in plan["inputs"]
    }
    names = [o[0] for o in plan["outputs"]]
    return {
        n: np.ascontiguousarray(a).tobytes()
        for n, a in zip(names, session.run(names, arrays), strict=True)
    }


_SESSIONS: dict[str, Any] = {}


class _Refitter:
    def __init__(self, engine: Any, logger: Any) -> None:
        self._engine, self._log, self._new = engine, logger, {}
        if not any(flag.startswith("REFIT") for flag in engine._plan["flags"]):
            _say(logger, "ERROR", "The engine is not refittable.")
            raise RuntimeError("the engine is not refittable")

    def get_all_weights(self) -> list[str]:
        return list(self._engine._plan["weights"])

    def get_missing_weights(self) -> list[str]:
        weights = self._engine._plan["weights"]
        return [n for n, digest in weights.items() if not digest and n not in self._new]

    def refit_cuda_engine(self) -> bool:
        plan = self._engine._plan
        if _Refitter.get_missing_weights(self):
            return False
        changed = any(plan["originals"][n] != d for n, d in self._new.items())
        if changed and "REFIT" not in plan["flags"]:
            _say(self._log, "ERROR", "Other weights than those it was built with (identical).")
            return False
        plan["weights"] = plan["weights"] | self._new
        return True


class _OnnxParserRefitter:
    def __init__(self, refitter: Any, logger: Any) -> None:
        self._refitter, self._log, self._errors = refitter, logger, []

    def _get_num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()

    def refit_from_file(self, model: str) -> bool:
        weights = _read_onnx(model)["weights"]
        known = self._refitter._engine._plan["weights"]
        if missing := sorted(set(known) - set(weights)):
            self._errors.append(_parser_error(self.module, f"no weights {missing[0]}"))
            return False
        self._refitter._new = {n: d for n, d in weights.items() if n in known}
        return True


_BEHAVIOUR: dict[str, Any] = {
    name.removeprefix("_"): value
    for name, value in list(vars(sys.modules[__name__]).items())
    if isinstance(value, type)
    and name.startswith("_")
    and name not in ("_EnumMeta", "_Absent", "_BadModelError")
}
