"""The frozen part as a graph of its own, with layers that answer alike merged into one another.

A graph ends at the boundary, so that nothing behind it runs. Batch norm is folded into the
convolution before it; then convolution, sum and activation become one call of oneDNN, as Inductor
makes them, with weights in the order that it works on. The answers stay the same but for rounding.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.Hardswish: ("hardswish", []),
    nn.SiLU: ("swish", []),
}
"""Those that oneDNN applies to a convolution's results before they are written to memory."""


class FoldingError(ValueError):
    """A network cannot be turned into such a graph; it has to run as it is."""


def folded(body: nn.Module, at: str) -> fx.GraphModule:
    """Copy what leads to the module `at`, with batch norm folded into convolutions.

    Args:
        body: takes scaled pictures.
        at: the name of a module within it; the graph gives what it is given.

    Raises:
        FoldingError: it cannot be traced, or `at` does not run exactly once.
    """
    whole = copy.deepcopy(body).eval()
    tracer = _Tracer(at)
    try:
        graph = tracer.trace(whole)
        # what is traced as a constant or checked as a symbol may fail in any way
    except Exception as error:
        raise FoldingError(f"{type(body).__name__} cannot be traced: {error}") from error
    _end(graph, at)
    module = fx.GraphModule(whole, graph)
    module.graph.eliminate_dead_code()
    for node, layer in _once(module, nn.Conv2d):
        after = _follower(node)
        norm = None if after is None else _module(module, after)
        if isinstance(norm, _BatchNorm) and norm.track_running_stats:
            _set(module, node, fuse_conv_bn_eval(layer, norm))
            _absorb(module, cast("fx.Node", after), node)
    return _finished(module)


def packed(body: nn.Module, at: str, dtype: torch.dtype) -> fx.GraphModule:
    """Do likewise, with convolution, sum and activation in one call, at this precision.

    Raises:
        FoldingError: as `folded`, or this build of PyTorch has no oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        raise FoldingError("this build of PyTorch has no oneDNN")
    module = folded(body, at)
    places = {node: place for place, node in enumerate(module.graph.nodes)}
    for node, layer in _once(module, nn.Conv2d):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            continue
        after, summed = _follower(node), False
        if after is not None and after.target in {operator.add, operator.iadd, torch.add}:
            others = [one for one in after.args if one is not node]
            # of two convolutions that are summed, the later one takes the other's result
            if len(others) == 1 and isinstance(others[0], fx.Node):
                summed = places[others[0]] < places[node]
            if summed:
                node.args = (node.args[0], others[0])
                _absorb(module, after, node)
                after = _follower(node)
        name, scalars = "none", list[float]()
        kind = None if after is None else type(_module(module, after))
        if kind in ACTIVATIONS:
            name, scalars = ACTIVATIONS[kind]
            _absorb(module, cast("fx.Node", after), node)
        _set(module, node, PackedConvolution(layer, name, scalars, dtype))
    return _finished(module)


class PackedConvolution(nn.Module):
    """A convolution, a sum and an activation in one call of oneDNN; it cannot be trained.

    Its weights are brought into oneDNN's own order when the first pictures tell their shape.
    """

    def __init__(
        self, layer: nn.Conv2d, activation: str, scalars: list[float], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.weight: Tensor = layer.weight.detach().to(dtype).contiguous()
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.how = layer.padding, layer.stride, layer.dilation, layer.groups
        self.activation, self.scalars = activation, scalars
        self.dtype, self.shape = dtype, torch.Size()

    def forward(self, inputs: Tensor, other: Tensor | None = None) -> Tensor:
        """Give activation(convolution(inputs) + other)."""
        call = torch.ops.mkldnn
        inputs = inputs.to(self.dtype)
        if not self.shape:
            self.shape = inputs.shape
            self.weight = call._reorder_convolution_weight(self.weight, *self.how, self.shape)  # noqa: SLF001 - as Inductor calls it
        given = self.weight, self.bias, *self.how
        if other is None:
            done = call._convolution_pointwise(  # noqa: SLF001
                inputs, *given, self.activation, self.scalars, ""
            )
        else:
            after = None if self.activation == "none" else self.activation
            done = call._convolution_pointwise.binary(  # noqa: SLF001
                inputs, other.to(self.dtype), *given, "add", 1.0, after, self.scalars, None
            )
        return cast("Tensor", done)


class _Tracer(fx.Tracer):
    """Leaves the boundary whole, and every layer without parts: it may do what cannot be traced."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name == self.at
            or next(m.children(), None) is None
            or super().is_leaf_module(m, module_qualified_name)
        )


def _end(graph: fx.Graph, at: str) -> None:
    """Let the graph give what the module `at` is given, and take off all that follows."""
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == at]
    if len(calls) != 1 or not calls[0].args or not isinstance(calls[0].args[0], fx.Node):
        raise FoldingError(f"{at} runs {len(calls)} times in a pass: the graph cannot end there")
    given = calls[0].args[0]
    for node in reversed(list(graph.nodes)):
        graph.erase_node(node)
        if node is calls[0]:
            break
    graph.output(given)


def _once(module: fx.GraphModule, kind: type[nn.Conv2d]) -> list[tuple[fx.Node, nn.Conv2d]]:
    """Give the calls of layers of exactly this kind that are called once."""
    nodes = [node for node in module.graph.nodes if node.op == "call_module"]
    calls = Counter(node.target for node in nodes)
    pairs = [(node, module.get_submodule(str(node.target))) for node in nodes]
    return [
        (node, layer) for node, layer in pairs if type(layer) is kind and calls[node.target] == 1
    ]


def _follower(node: fx.Node) -> fx.Node | None:
    """Give the only one that takes a result."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _module(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _set(module: fx.GraphModule, node: fx.Node, layer: nn.Module) -> None:
    holder, _, name = str(node.target).rpartition(".")
    setattr(module.get_submodule(holder), name, layer)


def _absorb(module: fx.GraphModule, after: fx.Node, node: fx.Node) -> None:
    after.replace_all_uses_with(node)
    module.graph.erase_node(after)


def _finished(module: fx.GraphModule) -> fx.GraphModule:
    module.graph.lint()
    module.recompile()
    module.delete_all_unused_submodules()
    return module.requires_grad_(False)
