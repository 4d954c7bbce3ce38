"""Dynamo's graph as the passes want it: which input is which weight, of which module.

Dynamo lifts parameters and buffers to inputs of the graph, and one graph serves every module
whose code and shapes are the same. So nothing here is tied to a module's identity: what belongs to
a weight is looked up by the weight that a call passes, and what was decided for one is guarded.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import convert_frame
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import AttrSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import Guard, TracingContext
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import arg_tree_leaves

from analogfx.errors import CaptureError
from analogfx.passes import harmless
from analogfx.passes.stationary import mark_stationary, propagate_stationary, sources


def editable(module: GraphModule) -> GraphModule:
    """A copy of Dynamo's graph to rewrite; Dynamo goes on reading its own."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    for node, copy in copies.items():
        if node.op == "placeholder":
            _note_source(copy, getattr(node, "_dynamo_source", None))
    made = GraphModule(module, graph)
    made.meta = module.meta
    if hasattr(module, "_param_name_to_source"):
        made._param_name_to_source = module._param_name_to_source
    return made


def _note_source(placeholder: Node, source: Any) -> None:
    # AOT autograd asks every input of a graph from Dynamo where it comes from.
    placeholder._dynamo_source = source


def add_input(graph: Graph, name: str, value: Tensor) -> Node:
    """One more input of a graph, after those there are.

    Args:
        value: a fake tensor of its shape.
    """
    last = graph.find_nodes(op="placeholder")[-1:]
    with graph.inserting_after(last[0]) if last else graph.inserting_before():
        node = graph.placeholder(name)
    node.meta["example_value"] = value
    _note_source(node, None)
    return node


def example(node: Node) -> Any:
    """The real value that an input had when Dynamo traced the graph."""
    argument = node.meta.get("grapharg")
    return None if argument is None else argument.example


def mark_weights(graph: Graph, names: dict[int, str]) -> dict[str, Node]:
    """Mark the inputs that bring parameters and buffers in.

    Args:
        names: paths of parameters, by the parameter's id.

    Returns:
        The parameters' nodes, by their path.
    """
    found = {}
    for node in graph.find_nodes(op="placeholder"):
        value = example(node)
        is_parameter = isinstance(value, nn.Parameter)
        if not is_parameter and not (isinstance(value, Tensor) and "_buffers" in source_of(node)):
            continue
        stand_in = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device="meta"
        )
        path = names.get(id(value)) or _path(source_of(node)) or source_of(node)
        mark_stationary(node, stand_in, path if is_parameter else None)
        if is_parameter:
            found[path] = node
    propagate_stationary(graph)
    _unmark_activations(graph)
    return found


def _unmark_activations(graph: Graph) -> None:
    """Take products of a module with a parameter of another one for products of an activation.

    A layer that is called with a learned query multiplies it as it would any input; what a module
    computes of its own parameters alone is a weight.
    """
    again = True
    while again:
        again = False
        for node in graph.nodes:
            if "stationary" not in node.meta or not harmless.consumes(node):
                continue
            inside = [_is_inside(node, n) for n in node.all_input_nodes]
            if any(inside) and not all(inside):
                node.meta["activation"] = again = True
                _unmark(node)
                propagate_stationary(graph)
                break


def _is_inside(product: Node, operand: Node) -> bool:
    """Whether the module that multiplies holds all that an operand comes from."""
    parameters = (example(n) for n in sources(operand) if n.op == "placeholder")
    return all(module_of(product, p) is not None for p in parameters if isinstance(p, nn.Parameter))


def _unmark(node: Node) -> None:
    """Forget that a node, and what is computed from it, was computed from parameters alone."""
    for user in node.users:
        if "stationary" in user.meta:
            _unmark(user)
    for note in ("stationary", "parameter", "cast_of", "cut_from", "cut_why"):
        node.meta.pop(note, None)


def source_of(node: Node) -> str:
    """The Python expression that Dynamo knows an input by."""
    argument = node.meta.get("grapharg")
    return "" if argument is None else str(argument.source.name)


def _path(source: str) -> str:
    """A module path from Dynamo's expression, as far as it tells one."""
    names = re.findall(r"\['([^']+)'\]|\.([A-Za-z]\w*)", source)
    parts = [a or b for a, b in names][1:]
    return ".".join(p for p in parts if p not in ("_modules", "_parameters", "_buffers"))


# ------------------------------------------------------------------------------------ modules


@dataclass(frozen=True)
class Owner:
    """The module that holds a parameter, and where Dynamo finds it."""

    module: nn.Module
    source: Any


def module_of(product: Node, parameter: Tensor) -> nn.Module | None:
    """The module whose own code multiplies by a parameter of it or of its children, if known.

    Of two modules that share a weight it tells which one multiplies.
    """
    if product.meta.get("from_fused"):
        return None
    stack = product.meta.get("nn_module_stack")
    module = _on_top(stack) if stack else _traced()
    if module is None or not any(p is parameter for p in module.parameters()):
        return None
    return module


def _on_top(stack: dict[str, Any]) -> nn.Module | None:
    """The innermost module of Dynamo's notes on a node."""
    base, _, path = str([*stack.values()][-1][0]).partition("]")
    module = _evaluate(f"{base}]")
    try:
        return module.get_submodule(path.lstrip("."))
    except AttributeError:
        return None


def _traced() -> nn.Module | None:
    """The module whose forward Dynamo traces: on code of its own there is no note."""
    scope = InstructionTranslator.current_tx().output.local_scope
    # Behind a graph break the frame starts with values that Dynamo has put there.
    own = (value for name, value in scope.items() if not name.startswith("__"))
    first = next(own, None)
    return first if isinstance(first, nn.Module) else None


def owner_of(node: Node) -> Owner:
    """The module that holds the parameter of an input.

    Raises:
        CaptureError: Dynamo reached the parameter by another way than through its module.
    """
    for owner in _holders(node):
        return owner
    raise CaptureError(
        f"{source_of(node)}: cannot tell which module holds this parameter, so not whether it "
        "is in training mode: reach it through its module, or use analogize()"
    )


def models_of(weights: Mapping[str, Node]) -> list[nn.Module]:
    """The outermost modules that a function reaches its parameters through."""
    found = {[*holders][-1].module: None for w in weights.values() if (holders := [*_holders(w)])}
    return [*found]


def _holders(node: Node) -> Iterator[Owner]:
    """The modules that hold the parameter of an input, the innermost first."""
    source = node.meta["grapharg"].source
    while (source := getattr(source, "base", None)) is not None:
        value = _evaluate(str(source.name))
        if isinstance(value, nn.Module):
            yield Owner(value, source)


def _evaluate(expression: str) -> Any:
    """The value of one of Dynamo's expressions in the frame that it traces."""
    output = InstructionTranslator.current_tx().output
    scope = {"L": output.local_scope, "G": output.global_scope, "torch": torch}
    try:
        return eval(expression, scope)
    except Exception:  # an expression with helpers that exist in guards alone
        return None


def compiled_root() -> nn.Module | None:
    """The model whose call is running, or being compiled; None for a bare function."""
    found = None
    for called in _locals(nn.Module.__call__.__code__, OptimizedModule.__call__.__code__):
        owner = called["self"]
        if isinstance(owner, OptimizedModule):
            found = owner._orig_mod
        elif owner._compiled_call_impl is not None:
            found = owner
    return found


def warn_of_last_graph() -> None:
    """Warn where Dynamo will run, without a word, what the next call needs digitally."""
    limit = torch._dynamo.config.recompile_limit
    for compiling in itertools.islice(_locals(convert_frame._compile.__code__), 1):
        try:
            count, name = compiling["cache_size"].num_cache_entries, compiling["code"].co_name
        except (KeyError, AttributeError):  # they have other names in this torch
            return
        if count + 1 >= limit:
            warnings.warn(
                f"{name} is compiled for the last time (graph {limit} of {limit} that "
                "torch._dynamo.config.recompile_limit allows): calls that none of its graphs fits "
                "will run digitally. Raise the limit, or let fullgraph=True raise an error",
                stacklevel=2,
            )


def _locals(*functions: CodeType) -> Iterator[dict[str, Any]]:
    """Local variables of the running calls of some functions, the innermost first.

    Of no others: a frame that was asked keeps its variables alive until it returns.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code in functions:
            yield frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]


# ------------------------------------------------------------------------------------- guards


def guard_training(owner: Owner) -> None:
    """Compile again when a module changes its mode; Dynamo asks for it only where code reads it."""
    _add(AttrSource(owner.source, "training").make_guard(GuardBuilder.BOOL_MATCH))


def guard(node: Node, holds: Callable[[Any], bool], text: str) -> None:
    """Compile again when a condition on an input's value no longer holds."""

    def create(builder: Any, guard: Guard) -> None:
        parts = [f"analogfx: {text}"]
        builder.get_guard_manager(guard).add_lambda_guard(holds, parts, guard.user_stack)

    _add(node.meta["grapharg"].source.make_guard(create))


def _add(made: Guard) -> None:
    context = TracingContext.try_get()
    assert context is not None
    context.guards_context.dynamo_guards.add(made)


# ------------------------------------------------------------------------- graphs inside graphs


def inner_graphs(module: GraphModule) -> Iterator[tuple[str, Graph]]:
    """Copies of graphs that an op of this one runs: a checkpointed block, a branch, a loop's body.

    Yields:
        The op's name, and the graph with its weights marked.
    """
    for node in module.graph.find_nodes(op="get_attr"):
        body: Any = functools.reduce(getattr, str(node.target).split("."), module)
        if not isinstance(body, GraphModule):
            continue
        for user in node.users:
            graph = Graph()
            graph.output(graph.graph_copy(body.graph, {}))
            inputs = graph.find_nodes(op="placeholder")
            # What its inputs take comes last, behind graphs and conditions.
            operands = arg_tree_leaves(*user.args)[-len(inputs) :] if inputs else []
            for inner, outer in zip(inputs, operands, strict=True):
                if isinstance(outer, Node) and "stationary" in outer.meta:
                    mark_stationary(inner, outer.meta["stationary"], outer.meta["parameter"])
            yield getattr(user.target, "__name__", str(user.target)), graph
