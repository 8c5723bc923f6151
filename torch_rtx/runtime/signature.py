"""The call signature of a module: flattens its arguments to the inputs of a graph and unflattens the results.

Structures are PyTorch's pytrees. A file holds them as plain JSON. Reading it imports nothing: a container type that
this process does not know becomes a dict or a tuple, with a warning.
"""

from __future__ import annotations

import json
import logging
import re
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

from torch_rtx.engine_header import names_of_sizes
from torch_rtx.errors import EngineFormatError, InputError, RtxError
from torch_rtx.runtime.result_builder import builder

log = logging.getLogger(__name__)
Json = Any
LEAF = pytree.tree_flatten(0)[1]
MAX_DEPTH = 64
# The only factories of a defaultdict that a file may name: this process calls them.
FACTORIES: dict[Any, Any] = {kind.__name__: kind for kind in (dict, float, int, list, set, str, tuple)}
KEYED, LISTED = (dict, OrderedDict, defaultdict, immutable_dict), (tuple, list, immutable_list)


Plain = None | bool | int | float | str
PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Fixed:
    """An argument that the capture specialized to a constant."""

    name: str
    value: Plain


class Signature:
    """How a module is called.

    Args:
        names: the parameter names of the module's forward, in order, as far as they are known.
        in_spec: the structure of `(args, kwargs)` at capture.
        out_spec: the structure of the result.
        leaves: per flat argument, its position among the graph's inputs, or the constant it was specialized to.
        defaults: by name, the defaults of forward's parameters that are plain. An argument that is its default may be
            left out of a call or be given, whatever the capture did.
        sizes: by symbol of the graph, the caller's name of that size.
    """

    def __init__(
        self,
        names: Sequence[str],
        in_spec: pytree.TreeSpec,
        out_spec: pytree.TreeSpec,
        leaves: Sequence[int | Fixed],
        defaults: Mapping[str, Plain] | None = None,
        sizes: Mapping[str, str] | None = None,
    ) -> None:
        self.names, self.in_spec, self.out_spec, self.leaves = tuple(names), in_spec, out_spec, tuple(leaves)
        args, kwargs = in_spec.children()
        self._count, self._keywords = args.num_children, tuple(kwargs.context)
        # Computed once: a call with plain tensors then needs no walk through its structure.
        self._specs = (*args.children(), *kwargs.children())
        self._flat = all(child.is_leaf() for child in self._specs)
        # Names of the arguments; those of `*args` can't be passed by name.
        unnamed = (f"#{index}" for index in range(len(self.names), self._count))
        self._positional = (*self.names, *unnamed)
        self._captured = (*self._positional[: self._count], *self._keywords)
        self._straight = all(leaf == index for index, leaf in enumerate(leaves))
        self._build: Callable[[list[Any]], Any] | None = None
        self.defaults, self.sizes = dict(defaults or {}), dict(sizes or {})
        # What the capture fixed to its default: a call may leave it out.
        self._optional: dict[str, Any] = {}
        start = 0
        for argument, spec in zip(self._captured, self._specs, strict=True):
            leaf = self.leaves[start] if spec.is_leaf() else None
            if isinstance(leaf, Fixed) and argument in self.defaults and _same(leaf.value, self.defaults[argument]):
                self._optional[argument] = leaf.value
            start += spec.num_leaves

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        """The graph's inputs for a call.

        Raises:
            InputError: arguments are missing, unexpected or of another structure than at capture, or differ from a
                constant that the capture fixed.
        """
        if len(args) != self._count or tuple(kwargs) != self._keywords:
            args, kwargs = self._as_captured(args, kwargs)
        leaves = [*args, *kwargs.values()]
        if not self._flat:
            leaves = self._flattened(leaves)
        if self._straight:
            return leaves
        inputs = []
        for leaf, given in zip(self.leaves, leaves, strict=True):
            if isinstance(leaf, int):
                inputs.append(given)
            elif type(given) is not type(leaf.value) or given != leaf.value:
                shown = f"a {type(given).__name__}" if isinstance(given, torch.Tensor) else repr(given)
                raise InputError(f"argument {leaf.name} is {shown}, the engine was built for {leaf.value!r}")
        return inputs

    def _flattened(self, given: Sequence[Any]) -> list[Any]:
        """The leaves of the arguments, in the order of the capture; a dictionary may have its entries in another."""
        leaves = []
        for name, spec, value in zip(self._captured, self._specs, given, strict=True):
            try:
                leaves += spec.flatten_up_to(value)
            except ValueError as error:
                problem = _other_entries(spec, value) or str(error)
                raise InputError(f"argument {name} has another structure than at capture: {problem}") from None
        return leaves

    def _as_captured(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with arguments passed by position or by name as at capture."""
        if len(args) > len(self._positional):
            raise InputError(f"got {len(args)} positional arguments, the engine was built for {len(self._positional)}")
        given = dict(zip(self._positional, args, strict=False))
        twice = given.keys() & kwargs.keys()
        if twice:
            raise InputError(f"argument {', '.join(sorted(twice))} is given twice, by position and by name")
        given = {**self._optional, **given, **kwargs}
        wanted = self._captured
        parts = [f"missing argument {name}" for name in wanted if name not in given]
        for name in (name for name in given if name not in wanted):
            default = self.defaults.get(name)  # None for any other argument: it is none
            if not _same(given[name], default):
                parts.append(f"unexpected argument {name}" + f", which is not {default!r}" * (name in self.defaults))
        if parts:
            raise InputError(f"{', '.join(parts)}; the engine was built for ({', '.join(wanted)})")
        return tuple(given[name] for name in wanted[: self._count]), {name: given[name] for name in self._keywords}

    def named(self, error: InputError) -> InputError:
        """The error with the caller's names of sizes in place of the graph's symbols."""
        if not self.sizes:
            return error
        symbols = re.compile(rf"\b({'|'.join(map(re.escape, self.sizes))})\b")
        message, hint = (symbols.sub(lambda match: self.sizes[match[0]], s or "") for s in (error.message, error.hint))
        return InputError(message, loc=error.loc, hint=hint)

    def unflatten(self, outputs: list[Any]) -> Any:
        """The module's result from the graph's outputs."""
        if self._build is None:
            tree = pytree.tree_unflatten(outputs, self.out_spec)
            self._build = builder(self.out_spec, outputs, tree)
            return tree
        return self._build(outputs)

    def to_json(self) -> Json:
        """The signature as plain JSON.

        Raises:
            RtxError: a container's type has no registered serialized name, or its keys are no JSON.
        """
        leaves = [leaf if isinstance(leaf, int) else {"name": leaf.name, "value": leaf.value} for leaf in self.leaves]
        specs = {"in": _encode(self.in_spec, 0), "out": _encode(self.out_spec, 0)}
        return {"names": list(self.names), "leaves": leaves, **specs, "defaults": self.defaults, "sizes": self.sizes}

    @staticmethod
    def from_json(tree: Json) -> Signature:
        """Inverse of `to_json`.

        Raises:
            EngineFormatError: `tree` is no signature.
        """
        try:
            leaves = tuple(
                leaf if type(leaf) is int else Fixed(str(leaf["name"]), leaf["value"]) for leaf in tree["leaves"]
            )
            names = tuple(map(str, tree["names"]))
            in_spec, out_spec = _decode(tree["in"], 0), _decode(tree["out"], 0)
            if in_spec.num_leaves != len(leaves) or [child.type for child in in_spec.children()] != [tuple, dict]:
                raise EngineFormatError("the signature does not fit its own structure")
            positions = [leaf for leaf in leaves if isinstance(leaf, int)]
            if positions != list(range(len(positions))) or not all(isinstance(name, str) for name in tree["names"]):
                raise EngineFormatError("the signature does not number its inputs one by one")
            if any(isinstance(leaf, Fixed) and isinstance(leaf.value, dict | list) for leaf in leaves):
                raise EngineFormatError("a fixed argument of the signature is no plain value")
            defaults = tree.get("defaults", {})
            if not isinstance(defaults, dict) or not all(isinstance(value, PLAIN) for value in defaults.values()):
                raise EngineFormatError("a default of the signature is no plain value")
            return Signature(names, in_spec, out_spec, leaves, defaults, names_of_sizes(tree))
        except EngineFormatError:
            raise
        # A registered container may raise anything on a context that it did not write; PyTorch's raise these.
        except (LookupError, TypeError, ValueError, AttributeError, AssertionError, NotImplementedError) as error:
            raise EngineFormatError(f"damaged call signature: {type(error).__name__}: {error}") from None

    def check(self, inputs: int, outputs: int) -> None:
        """Raises EngineFormatError unless the signature fits a graph with so many inputs and outputs."""
        taken = sum(isinstance(leaf, int) for leaf in self.leaves)
        if (taken, self.out_spec.num_leaves) != (inputs, outputs):
            raise EngineFormatError("the signature does not fit the graph")


def _other_entries(spec: pytree.TreeSpec, value: object) -> str:
    """Which entries a dictionary lacks, and which it has beside those of `spec`; "" for what is none."""
    if not isinstance(value, Mapping) or not isinstance(spec.context, list):
        return ""
    missing = [f"missing entry {key!r}" for key in spec.context if key not in value]
    return ", ".join([*missing, *(f"unexpected entry {key!r}" for key in value if key not in spec.context)])


def _same(a: object, b: Plain) -> bool:
    return type(a) is type(b) and a == b


def _encode(spec: pytree.TreeSpec, depth: int) -> Json:
    if spec.is_leaf():
        return None
    name = _serialized_name(spec.type)
    if name is None:
        hint = "register it with torch.utils._pytree.register_pytree_node(..., serialized_type_name=...)"
        raise RtxError(f"the container {spec.type.__name__} can't be saved in an engine", hint=hint)
    context = _plain_context(spec)
    try:
        same = json.loads(json.dumps(context)) == context
    except (TypeError, ValueError):
        same = False
    if not same or depth > MAX_DEPTH:
        problem = f"its keys {context!r} are not plain" if not same else f"it is nested deeper than {MAX_DEPTH}"
        raise RtxError(f"the container {spec.type.__name__} can't be saved in an engine: {problem}")
    return {"type": name, "context": context, "children": [_encode(child, depth + 1) for child in spec.children()]}


def _serialized_name(kind: type) -> str | None:
    if getattr(torch.return_types, kind.__name__, None) is kind:
        return f"torch.return_types.{kind.__name__}"
    known = pytree.SUPPORTED_SERIALIZED_TYPES.get(kind)
    name = None if known is None else known.serialized_type_name
    return None if name == pytree.NO_SERIALIZED_TYPE_NAME_FOUND else name


def _plain_context(spec: pytree.TreeSpec) -> Json:
    if spec.type is namedtuple:
        return {"name": spec.context.__name__, "fields": list(spec.context._fields)}
    if spec.type is defaultdict:
        factory, keys = spec.context
        name = getattr(factory, "__name__", None)
        return {"factory": name if FACTORIES.get(name) is factory else None, "keys": keys}
    known = pytree.SUPPORTED_SERIALIZED_TYPES.get(spec.type)
    dump = None if known is None or spec.type in (*LISTED, *KEYED, deque) else known.to_dumpable_context
    return spec.context if dump is None else dump(spec.context)


def _decode(tree: Json, depth: int) -> pytree.TreeSpec:
    if tree is None:
        return LEAF
    if depth > MAX_DEPTH:
        raise EngineFormatError("the call signature is nested too deep")
    if not isinstance(tree["children"], list) or not isinstance(tree["type"], str):
        raise EngineFormatError("damaged call signature: a container without type or children")
    children = [_decode(child, depth + 1) for child in tree["children"]]
    type_, context = _container(tree["type"], tree["context"], len(children))
    return pytree.TreeSpec(type_, context, children)


def _container(name: str, context: Json, count: int) -> tuple[Any, Any]:
    """Type and context of a container with `count` children, of a type that this process knows. PyTorch's own reader
    would import modules that `name` or `context` tell it to."""
    type_ = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(name) if name != pytree.NO_SERIALIZED_TYPE_NAME_FOUND else None
    if name.startswith("torch.return_types."):
        type_ = vars(torch.return_types).get(name.rpartition(".")[2])
        if not isinstance(type_, type) or getattr(type_, "n_fields", None) != count:
            raise EngineFormatError(f"no container {name} of {count}")
        return type_, None
    if type_ is namedtuple:
        return type_, _named_tuple(context["name"], context["fields"], count)
    if type_ is defaultdict:
        return type_, [FACTORIES.get(context["factory"]), _keys(context["keys"], count)]
    if type_ in KEYED:
        return type_, _keys(context, count)
    if type_ in LISTED:
        return type_, None
    if type_ is deque:
        if context is not None and (type(context) is not int or context < count):
            raise EngineFormatError(f"a deque can't hold {count} of at most {context}")
        return type_, context
    if type_ is None:
        keyed = isinstance(context, list) and len(context) == count and all(isinstance(key, str) for key in context)
        type_ = dict if keyed else tuple
        log.warning("container type %s is unknown here and becomes a %s; import it before load", name, type_.__name__)
        return type_, _keys(context, count) if keyed else None
    load = pytree.SUPPORTED_SERIALIZED_TYPES[type_].from_dumpable_context
    return type_, context if load is None else load(context)


def _keys(keys: Json, count: int) -> list[Any]:
    if not isinstance(keys, list) or len(keys) != count or len(set(keys)) != count:
        raise EngineFormatError(f"a dictionary of {count} entries has the keys {keys!r}")
    return keys


def _named_tuple(name: str, fields: list[str], count: int) -> type:
    """A class with these fields; Python checks that all are identifiers."""
    if not isinstance(fields, list) or len(fields) != count:
        raise EngineFormatError(f"a named tuple of {count} entries has the fields {fields!r}")
    return namedtuple(name, fields)
