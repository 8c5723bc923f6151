"""The call signature of a module: from its own arguments to the flat inputs of a graph, and back for the results.

Structures are PyTorch's pytrees. A file holds them as plain JSON; reading it imports nothing: a container type that this
process does not know comes back as a dict or a tuple, with a warning.
"""

from __future__ import annotations

import json
import logging
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

from torch_rtx.errors import EngineFormatError, InputError, RtxError

log = logging.getLogger(__name__)
Json = Any
LEAF = pytree.tree_flatten(0)[1]
MAX_DEPTH = 64


@dataclass(frozen=True)
class Fixed:
    """An argument that the capture specialized to a constant."""

    name: str
    value: None | bool | int | float | str


class Signature:
    """How a module is called.

    Args:
        names: the parameter names of the module's forward, in order, as far as they are known.
        in_spec: the structure of `(args, kwargs)` at capture; `out_spec` that of the result.
        leaves: per flat argument, its position among the graph's inputs, or the constant it was specialized to.
    """

    def __init__(
        self,
        names: Sequence[str],
        in_spec: pytree.TreeSpec,
        out_spec: pytree.TreeSpec,
        leaves: Sequence[int | Fixed],
    ) -> None:
        self.names, self.in_spec, self.out_spec, self.leaves = tuple(names), in_spec, out_spec, tuple(leaves)
        args, kwargs = in_spec.children()
        self._count, self._keywords = args.num_children, tuple(kwargs.context)
        # Known once, so that a call with plain tensors needs no walk through its structure.
        self._flat = all(child.is_leaf() for child in (*args.children(), *kwargs.children()))
        self._straight = all(leaf == index for index, leaf in enumerate(leaves))
        self._build: Callable[[list[Any]], Any] | None = None

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        """The graph's inputs for a call.

        Raises:
            InputError: arguments are missing, unexpected or of another structure than at capture, or differ from a
                constant that the capture fixed.
        """
        if len(args) != self._count or kwargs.keys() != set(self._keywords):
            args, kwargs = self._as_captured(args, kwargs)
        if self._flat:
            leaves = [*args, *[kwargs[name] for name in self._keywords]]
        else:
            leaves, spec = pytree.tree_flatten((tuple(args), {name: kwargs[name] for name in self._keywords}))
            if spec != self.in_spec:
                raise InputError(f"the arguments are structured as {spec}, the engine was built for {self.in_spec}")
        if self._straight:
            return leaves
        inputs = []
        for leaf, given in zip(self.leaves, leaves, strict=True):
            if isinstance(leaf, int):
                inputs.append(given)
            elif type(given) is not type(leaf.value) or given != leaf.value:
                raise InputError(f"argument {leaf.name} is {given!r}, the engine was built for {leaf.value!r}")
        return inputs

    def _as_captured(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with arguments by position and by name as they were at capture."""
        if len(args) > len(self.names):
            raise InputError(f"got {len(args)} positional arguments, the engine was built for {len(self.names)}")
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        wanted = (*self.names[: self._count], *self._keywords)
        missing, extra = [n for n in wanted if n not in given], [n for n in given if n not in wanted]
        extra = [name for name in extra if given[name] is not None]
        if missing or extra:
            parts = [f"missing argument {name}" for name in missing] + [f"unexpected argument {name}" for name in extra]
            raise InputError(f"{', '.join(parts)}; the engine was built for ({', '.join(wanted)})")
        return tuple(given[name] for name in wanted[: self._count]), given

    def unflatten(self, outputs: list[Any]) -> Any:
        """The module's result from the graph's outputs."""
        if self._build is None:
            tree = pytree.tree_unflatten(outputs, self.out_spec)
            self._build = _builder(self.out_spec, outputs, tree)
            return tree
        return self._build(outputs)

    def to_json(self) -> Json:
        """The signature as plain JSON.

        Raises:
            RtxError: a container whose type has no registered serialized name.
        """
        leaves = [leaf if isinstance(leaf, int) else {"name": leaf.name, "value": leaf.value} for leaf in self.leaves]
        specs = {"in": _encode(self.in_spec), "out": _encode(self.out_spec)}
        return {"names": list(self.names), "leaves": leaves, **specs}

    @staticmethod
    def from_json(tree: Json) -> Signature:
        """Inverse of `to_json`.

        Raises:
            EngineFormatError: not such a tree.
        """
        try:
            leaves = tuple(leaf if type(leaf) is int else Fixed(str(leaf["name"]), leaf["value"]) for leaf in tree["leaves"])
            names = tuple(map(str, tree["names"]))
            in_spec, out_spec = _decode(tree["in"], 0), _decode(tree["out"], 0)
            if in_spec.num_leaves != len(leaves) or in_spec.type is not tuple or in_spec.num_children != 2:
                raise EngineFormatError("the signature does not fit its own structure")
            return Signature(names, in_spec, out_spec, leaves)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise EngineFormatError(f"damaged call signature: {error}") from None


def _builder(spec: pytree.TreeSpec, outputs: list[Any], tree: Any) -> Callable[[list[Any]], Any]:
    """A way to build results of the structure `spec`, faster than pytree's where one is known that builds an equal `tree`.

    A dictionary with attributes, as transformers returns, takes 12 us to make by its own constructor, as long as the rest
    of a replayed call.
    """
    kind, keys = spec.type, spec.context
    if spec.is_leaf():
        return operator.itemgetter(0)
    if not all(child.is_leaf() for child in spec.children()):
        return lambda values: pytree.tree_unflatten(values, spec)
    if kind in (tuple, list):
        return kind
    if kind is dict:
        return lambda values: dict(zip(keys, values, strict=True))
    if isinstance(tree, dict) and list(tree) == keys and all(map(operator.is_, tree.values(), outputs)):
        set_item = OrderedDict.__setitem__ if isinstance(tree, OrderedDict) else dict.__setitem__
        attributes = dict(vars(tree)) if hasattr(tree, "__dict__") else {}
        places = {id(value): index for index, value in enumerate(outputs)}
        varying = [(name, places[id(value)]) for name, value in attributes.items() if id(value) in places]
        if all(value is None or id(value) in places for value in attributes.values()):

            def build(values: list[Any]) -> Any:
                made = kind.__new__(kind)
                for key, value in zip(keys, values, strict=True):
                    set_item(made, key, value)
                vars(made).update(attributes)
                for name, index in varying:
                    vars(made)[name] = values[index]
                return made

            return build
    return lambda values: pytree.tree_unflatten(values, spec)


def _encode(spec: pytree.TreeSpec) -> Json:
    if spec.is_leaf():
        return None
    known = pytree.SUPPORTED_SERIALIZED_TYPES.get(spec.type)
    if known is None or known.serialized_type_name == pytree.NO_SERIALIZED_TYPE_NAME_FOUND:
        hint = "register it with torch.utils._pytree.register_pytree_node(..., serialized_type_name=...)"
        raise RtxError(f"the container {spec.type.__name__} can't be saved in an engine", hint=hint)
    context = known.to_dumpable_context(spec.context) if known.to_dumpable_context else spec.context
    json.dumps(context)
    return {"type": known.serialized_type_name, "context": context, "children": [_encode(c) for c in spec.children()]}


def _decode(tree: Json, depth: int) -> pytree.TreeSpec:
    if tree is None:
        return LEAF
    if depth > MAX_DEPTH:
        raise EngineFormatError("the call signature is nested too deep")
    children = [_decode(child, depth + 1) for child in tree["children"]]
    context, type_ = tree["context"], pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(tree["type"])
    if type_ is None:
        keyed = isinstance(context, list) and len(context) == len(children) and all(isinstance(k, str) for k in context)
        type_ = dict if keyed else tuple
        log.warning("container type %s is unknown here and becomes a %s; import it before load", tree["type"], type_.__name__)
        return pytree.TreeSpec(type_, context if keyed else None, children)
    known = pytree.SUPPORTED_SERIALIZED_TYPES[type_]
    if type_ in (dict, tuple, list) or known.from_dumpable_context is None:
        return pytree.TreeSpec(type_, context, children)
    return pytree.TreeSpec(type_, known.from_dumpable_context(context), children)


