"""Reads a published EpiGRAF snapshot, a pickle, without running anything that stands in it.

A pickle is a program that may call any function by name. Here only the names of `GLOBALS` are known, each met by a
stand-in that keeps what it is given and does nothing; any other name is refused. The source text that the snapshots
carry is dropped. What comes out are tensors, in the order of the networks' parameters, and plain settings: references
among them, as `${training.patch}`, are followed through the stand-ins.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError


class _Fixed(type):
    """Classes that a pickle cannot change: a pickle may set attributes of whatever it has got hold of."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"a pickle may not change {cls.__name__}")


class Record(metaclass=_Fixed):
    """An object that is not rebuilt: its class by name, and the state that it had."""

    __slots__ = ("state",)
    kind = ""

    def __new__(cls, *args: object, **kwargs: object) -> Record:
        record = super().__new__(cls)
        object.__setattr__(record, "state", None)
        return record

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"a pickle may not change {self.kind}")

    def __setstate__(self, state: object) -> None:
        object.__setattr__(self, "state", state)


class _Dict(dict, metaclass=_Fixed):
    """Stands for every kind of dict: the pairs, without defaults or attributes."""

    __slots__ = ()

    def __init__(self, *args: object) -> None:
        super().__init__(*(arg for arg in args if isinstance(arg, (dict, list))))

    def __setstate__(self, state: object) -> None:
        pass


class _Function:
    """A function that a pickle may call, and not change."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., object]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: object) -> object:
        return self._call(*args)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError("a pickle may not change a function")

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a pickle may not change a function")


def _record(kind: str) -> type[Record]:
    return _Fixed(kind.rpartition(".")[2], (Record,), {"__slots__": (), "kind": kind})


PERSISTENT = _record("persistent object")


def _persistent(meta: dict[str, Any]) -> Record:
    """A network: type, version, source text, class name and state, of which the last is kept."""
    record = PERSISTENT()
    record.__setstate__(meta["state"])
    return record


def _load_storage(content: bytes) -> torch.TypedStorage | torch.UntypedStorage:
    """The numbers of a tensor: a file of torch.save inside the pickle, read by torch without running code."""
    storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(storage, (torch.TypedStorage, torch.UntypedStorage)):
        raise pickle.UnpicklingError(f"a tensor's storage is a {type(storage).__name__}")
    return storage


def _rebuild_tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    """A tensor on a storage, after a check that it lies inside."""
    if not isinstance(storage, torch.TypedStorage):
        raise pickle.UnpicklingError("a tensor has no storage")
    numbers = (offset, *size, *stride)
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or len(size) != len(stride):
        raise pickle.UnpicklingError(f"a tensor has offset {offset}, size {size} and stride {stride}")
    length = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    if 0 not in size and offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) >= length:
        raise pickle.UnpicklingError(f"a tensor of size {size} reaches beyond its storage of {length}")
    return torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage, offset, size, stride)


def _rebuild_parameter(tensor: Tensor, *_: object) -> Tensor:
    return tensor


def _globals() -> dict[tuple[str, str], object]:
    reconstruct = _Function(_persistent)
    known: dict[tuple[str, str], object] = {
        ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
        ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
        ("torch.storage", "_load_from_bytes"): _Function(_load_storage),
        ("collections", "OrderedDict"): _Dict,
        ("collections", "defaultdict"): _Dict,
        ("builtins", "dict"): _Dict,
    }
    for prefix in ("", "src."):
        known[f"{prefix}torch_utils.persistence", "_reconstruct_persistent_obj"] = reconstruct
        known[f"{prefix}dnnlib.util", "EasyDict"] = _Dict
    records = ["torch.optim.adam.Adam", "torch.nn.modules.container.Sequential", "torch.nn.modules.sparse.Embedding"]
    records += ["torch.nn.modules.container.ModuleList", "builtins.list", "builtins.int", "typing.Any"]
    records += ["numpy.dtype", "numpy.ndarray", "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"]
    for module in ("omegaconf", "omegaconf.base"):
        records += [f"{module}.Metadata", f"{module}.ContainerMetadata"]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        records += [f"{module}.scalar", f"{module}._reconstruct"]
    for name in records:
        module, _, attribute = name.rpartition(".")
        known[module, attribute] = _record(name)
    return known


GLOBALS = _globals()
NODES = "omegaconf.nodes"  # its classes, which hold one value each


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == NODES and re.fullmatch(r"[A-Z][A-Za-z]*", name):
            return _record(f"{NODES}.{name}")
        found = GLOBALS.get((module, name))
        if found is None:
            raise UserError(f"it asks for {module}.{name}, which no published snapshot needs: refused, nothing was run")
        return found


@dataclass(frozen=True)
class Optimizer:
    """Adam's averages, one entry a parameter in the network's order; None where a parameter never got a gradient."""

    states: list[dict[str, Any] | None]


@dataclass(frozen=True)
class Snapshot:
    """What a snapshot holds."""

    networks: dict[str, dict[str, Tensor]]  # G_ema, G, D -> name -> tensor
    parameters: dict[str, list[str]]  # network -> the names that are no buffers, in order
    optimizers: dict[str, Optimizer]  # G, D
    augment_p: float | None  # None where the file holds no augmentation
    settings: dict[str, Any]  # by dotted name, see `_settings`


def read_snapshot(path: Path) -> Snapshot:
    """Reads a published pickle.

    Raises:
        UserError: Missing, damaged, not a snapshot, or asking for anything but `GLOBALS`.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file).load()
        return _snapshot(content)
    except Exception as error:  # a damaged or hostile pickle trips in every possible way
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        inside = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch's own words
        if inside:
            reason = f"a tensor's storage asks for {inside[1]}: refused, nothing was run"
        raise UserError(f"{path}: {reason[:200]}") from None


def _snapshot(content: object) -> Snapshot:
    if not isinstance(content, dict) or not isinstance(content.get("G_ema"), Record):
        raise UserError("it is no EpiGRAF snapshot: a dict with the network G_ema is expected")
    networks, parameters = {}, {}
    for name in ("G_ema", "G", "D"):
        if not isinstance(content.get(name), Record):
            continue
        found = list(_tensors(content[name]))
        networks[name] = {key: tensor for key, tensor, _ in found}
        parameters[name] = [key for key, _, trained in found if trained]
    augment = content.get("augment_pipe")
    p = augment.state["_buffers"].get("p") if isinstance(augment, Record) else None
    optimizers = {}
    for name in ("G", "D"):
        stored = content.get(f"{name}_opt")
        if isinstance(stored, Record) and isinstance(stored.state, dict):
            keys = [key for group in stored.state["param_groups"] for key in group["params"]]
            optimizers[name] = Optimizer([stored.state["state"].get(key) for key in keys])
    p = float(p) if isinstance(p, Tensor) else None
    return Snapshot(networks, parameters, optimizers, p, _settings(content))


def _tensors(module: Record, prefix: str = "") -> Iterator[tuple[str, Tensor, bool]]:
    """Name, tensor and whether it is trained, in the order of the modules."""
    state = module.state
    for part, trained in (("_parameters", True), ("_buffers", False)):
        for name, tensor in state[part].items():
            if isinstance(tensor, Tensor):
                yield prefix + name, tensor, trained
    for name, child in state["_modules"].items():
        if isinstance(child, Record):
            yield from _tensors(child, f"{prefix}{name}.")


# Settings. A node of omegaconf keeps what it holds as _content (a dict or list of nodes) or _val, and the container
# that it stands in as _parent; an interpolation is a text that holds ${...}.


@dataclass(frozen=True)
class Unresolved:
    """A setting that the file does not tell: missing, or an interpolation that asks for something elsewhere."""

    text: str


class _NotHere(Exception):
    """An interpolation leads out of the file."""


INTERPOLATION = re.compile(r"(?<!\\)\$\{([^${}]*)\}")  # an innermost one
MISSING = "???"
MOST_STEPS = 100_000  # a real snapshot takes some hundreds
DEEPEST = 30
LONGEST = 1000


def _settings(content: dict[str, Any]) -> dict[str, Any]:
    """Every number, word, truth and None of the settings that a snapshot keeps, by dotted name.

    model.generator and model.discriminator are what the networks were built from, G and D their other arguments; then
    come all settings of the run (model, training, dataset ...), where the networks' refer to them, training_set_kwargs
    and stats. Entries of a list are numbered. What cannot be followed is `Unresolved`.
    """
    walk, settings, runs = _Walk(), {}, []
    for name, letter, part in (
        ("G_ema", "G", "model.generator"),
        ("G", "G", "model.generator"),
        ("D", "D", "model.discriminator"),
    ):
        state = content[name].state if isinstance(content.get(name), Record) else {}
        arguments = dict(state.get("_init_kwargs") or {})
        # The first argument, if it has no name.
        config = arguments.pop("cfg", next(iter(state.get("_init_args") or ()), None))
        above = _above(config)
        runs += above[:1]
        _join(settings, (*walk.flat(config, above, part), *walk.flat(arguments, (), letter)))
    for run in runs:
        _join(settings, walk.flat(run, (), ""))
    for name in ("training_set_kwargs", "stats"):
        settings |= dict(walk.flat(content.get(name), (), name))
    return settings


def _join(settings: dict[str, Any], more: Iterable[tuple[str, object]]) -> None:
    """Adds what another network tells; where two differ, neither holds."""
    for name, value in more:
        known = settings.setdefault(name, value)
        if known != value and not isinstance(known, Unresolved):
            settings[name] = Unresolved(f"{known!r} here and {value!r} there"[:LONGEST])


def _content(node: object) -> object:
    """What a node holds, as it stands; anything but a node as it is."""
    if isinstance(node, Record) and isinstance(node.state, dict):
        return node.state.get("_content", node.state.get("_val"))
    return node


def _above(node: object) -> tuple[object, ...]:
    """The containers that a node stands in, outermost first."""
    above: list[object] = []
    while isinstance(node, Record) and isinstance(node.state, dict):
        node = node.state.get("_parent")
        if node is None or any(node is other for other in above):
            break
        above.insert(0, node)
    return tuple(above)


class _Walk:
    """Follows settings and the references among them, for a bounded number of steps."""

    def __init__(self) -> None:
        self.steps = 0

    def flat(self, node: object, above: tuple[object, ...], name: str) -> Iterator[tuple[str, object]]:
        """Names and values below a node that stands in the containers `above`."""
        self.step()
        try:
            node, content, above = self.follow(node, above)
        except _NotHere as reference:
            yield name, Unresolved(str(reference))
            return
        parts: Iterable[tuple[object, object]] = ()
        if isinstance(content, dict):
            parts = content.items()
        elif isinstance(content, list):
            parts = enumerate(content)
        elif content is None or isinstance(content, (bool, int, float, str)):
            yield name, content
        if name.count(".") > DEEPEST:
            raise UserError(f"its settings hold each other: {name[:60]}...")
        for key, part in parts:
            yield from self.flat(part, (*above, node), f"{name}.{key}" if name else str(key))

    def follow(self, node: object, above: tuple[object, ...]) -> tuple[object, object, tuple[object, ...]]:
        """The node at the end of interpolations, what it holds, and the containers that it stands in."""
        content, rounds = _content(node), 0
        text = content[:LONGEST] if isinstance(content, str) else ""
        while isinstance(content, str) and "${" in content:
            self.step()
            rounds += 1
            inner = INTERPOLATION.search(content)
            if inner is None or len(content) > LONGEST or rounds > DEEPEST:
                raise _NotHere(text)
            try:
                target, where = self.select(inner[1].strip(), above)
                if inner[0] == content:
                    node, above, content = target, where, _content(target)
                    continue
                value = self.follow(target, where)[1]
            except (LookupError, RecursionError, _NotHere):
                raise _NotHere(text) from None
            if value is not None and not isinstance(value, (bool, int, float, str)):
                raise _NotHere(text)
            content = content.replace(inner[0], str(value), 1)
        if content == MISSING:
            raise _NotHere(MISSING)
        return node, content, above

    def select(self, reference: str, above: tuple[object, ...]) -> tuple[object, tuple[object, ...]]:
        """The node that `a.b`, `a[b]`, or, from the container of the one that refers to it, `.b` or `..b` names.

        Raises:
            LookupError: It is not there, or asks for a resolver, as `oc.env:HOME`.
        """
        if ":" in reference:
            raise LookupError(reference)
        keys = [key for key in re.split(r"[.\[\]]+", reference) if key]
        dots = len(reference) - len(reference.lstrip("."))
        start = len(above) - dots if dots else 0
        if not 0 <= start < len(above):
            raise LookupError(reference)
        node, above = above[start], above[:start]
        for key in keys:
            self.step()
            node, content, above = self.follow(node, above)
            above = (*above, node)
            if isinstance(content, dict):
                node = content[key]
            elif isinstance(content, list) and key.isdecimal():
                node = content[int(key)]
            else:
                raise LookupError(reference)
        return node, above

    def step(self) -> None:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise UserError("its settings refer to each other without end")
