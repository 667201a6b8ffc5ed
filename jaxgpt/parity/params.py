"""JAX parameters of any framework as named arrays, and back: pytrees, Linen variables, Equinox modules, NNX modules."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch

from jaxgpt.parity.pair import PairError, blamed

Path = tuple[str | int, ...]
Flat = dict[Path, Any]


def path_name(path: Path) -> str:
    """ "layers.0.norm.scale"."""
    return ".".join(map(str, path))


@dataclass(frozen=True)
class Structure:
    """The form of a pair's parameters: what rebuilds them from arrays by path.

    Attributes:
        tree: for an NNX module its graph definition, else the tree definition with the leaves that are no floats.
    """

    tree: Any
    others: dict[Path, Any]
    order: tuple[Path, ...]
    is_nnx: bool

    def build(self, flat: Flat) -> Any:
        """The parameters as the pair's functions take them."""
        leaves = [flat[path] if path in flat else self.others[path] for path in self.order]
        if self.is_nnx:
            from flax import nnx

            graph, treedef = self.tree
            return nnx.merge(graph, jax.tree.unflatten(treedef, leaves))
        return jax.tree.unflatten(self.tree, leaves)

    def split(self, params: Any) -> Flat:
        """The arrays of parameters of this form, by path. Their inverse is `build`."""
        return {path: leaf for path, leaf in _leaves(params)[0] if path not in self.others}

    def only(self, flat: Flat) -> Any:
        """A pytree of some of the arrays, for optax: the pair's own form with None for the others."""
        leaves = [flat.get(path) for path in self.order]
        treedef = self.tree[1] if self.is_nnx else self.tree
        return jax.tree.unflatten(treedef, leaves)

    def leaves(self, tree: Any) -> list[tuple[Path, Any]]:
        """The arrays of a tree that `only` has made, by path."""
        keyed, _ = jax.tree_util.tree_flatten_with_path(tree)
        return [(_path(keys), leaf) for keys, leaf in keyed]


def split(params: Any, name: str) -> tuple[Structure, dict[Path, np.ndarray]]:
    """The structure of parameters, and their floating-point arrays as numpy, by path.

    Args:
        name: of the function that gave them, for messages.

    Raises:
        PairError: no floating-point array in it.
    """
    with blamed(name):
        leaves, tree = _leaves(params)
    flat, others = {}, {}
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if isinstance(leaf, torch.Tensor):
            raise PairError(f"Pair {name}: {path_name(path)} is a torch tensor; return numpy or JAX arrays")
        if dtype is not None and jax.numpy.issubdtype(dtype, jax.numpy.floating):
            is_shape = isinstance(leaf, jax.ShapeDtypeStruct)  # of jax.eval_shape
            flat[path] = np.zeros(leaf.shape) if is_shape else np.asarray(leaf).astype(np.float64)
        else:
            others[path] = leaf
    if not flat:
        raise PairError(f"Pair {name}: gives {type(params).__name__} without an array of floats; return the parameters")
    return Structure(tree, others, tuple(path for path, _ in leaves), _is_nnx(params)), flat


def _leaves(params: Any) -> tuple[list[tuple[Path, Any]], Any]:
    if _is_nnx(params):
        from flax import nnx

        graph, state = nnx.split(params)
        keyed, treedef = jax.tree_util.tree_flatten_with_path(state)
        return [(_path(keys), leaf) for keys, leaf in keyed], (graph, treedef)
    keyed, treedef = jax.tree_util.tree_flatten_with_path(params)
    return [(_path(keys), leaf) for keys, leaf in keyed], treedef


def _path(keys: Any) -> Path:
    """The keys of a leaf as names and indices; the `value` that an NNX variable keeps its array under is left out."""
    path = []
    for key in keys:
        for attribute in ("key", "idx", "name"):
            if hasattr(key, attribute):
                part = getattr(key, attribute)
                path.append(part if isinstance(part, int) else str(part))
                break
        else:
            path.append(str(key))
    return tuple(path[:-1] if path and path[-1] == "value" else path)


def _is_nnx(params: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(params, nnx.Module)


def nested(flat: Mapping[Path, Any]) -> Any:
    """Nested dicts of arrays by path."""
    tree: dict[Any, Any] = {}
    for path, array in flat.items():
        at = tree
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = array
    return tree
