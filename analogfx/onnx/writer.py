"""Writing nodes of standard and analog ops, as function calls or spelled out.

An analog op is an :class:`Operator`: its name, attributes, and a body of other ops. A
:class:`Writer` either emits a node that calls an ONNX function with that body, or the body
itself. Which of the two, for which op, is all that the levels of an export differ in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

DOMAIN = "ai.analogfx"
VERSION = 2
"""Of the domain: 2 since sites multiply codes, told by an input ``code_scale``."""


class Operator(Protocol):
    """An op of domain ``ai.analogfx``: a frozen dataclass; equal ones share a function."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        ...

    def attributes(self) -> dict[str, Any]:
        """What a node of this op says about itself; the body is written for these values."""
        ...

    def body(self, w: Writer, *inputs: ir.Value | None) -> ir.Value:
        """Write the op's meaning and return its output. Optional inputs may be None."""
        ...


class Writer:
    """Emits nodes for one graph or one function body.

    Args:
        opset: version of the standard ops.
        keep: names of the analog ops that become function calls.
        functions: collects the functions; shared by all writers of a model.
        scope: prefix of node names, usually the path of a module.
    """

    def __init__(
        self,
        opset: int,
        keep: Collection[str],
        functions: dict[Any, ir.Function],
        scope: str = "",
    ) -> None:
        self.opset = opset
        self.keep = keep
        self.functions = functions
        self.scope = scope
        self.tape = Tape()

    def _name(self, op_type: str) -> str:
        return f"{self.scope or 'node'}/{op_type}_{len(self.tape.nodes)}"

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """A node of a standard op with one output."""
        return self.tape.op(op_type, inputs, attributes, name=self._name(op_type))

    def split(self, x: ir.Value, sizes: Sequence[int], axis: int) -> Sequence[ir.Value]:
        """``x`` cut along an axis; ``x`` itself for one size."""
        if len(sizes) == 1:
            return [x]
        inputs = (x, self.ints(*sizes))
        name = self._name("Split")
        return self.tape.op_multi_out(
            "Split", inputs, {"axis": axis}, num_outputs=len(sizes), name=name
        )

    def ints(self, *values: int) -> ir.Value:
        """A constant int64 vector."""
        return self.op("Constant", value=ir.tensor(np.array(values, np.int64)))

    def scalar(self, value: float, dtype: ir.DataType) -> ir.Value:
        """A constant scalar."""
        return self.op("Constant", value=ir.tensor(np.array(value, dtype.numpy())))

    def call(
        self, operator: Operator, *inputs: ir.Value | None, name: str | None = None
    ) -> ir.Value:
        """An analog op: a function call if its name is kept, else its body right here.

        Args:
            inputs: values by position; None for an optional input that is absent.
            name: of the node; made from the scope if None.
        """
        kind = type(operator).__name__
        if kind not in self.keep:
            return operator.body(self, *inputs)
        present = tuple(value is not None for value in inputs)
        function = self.functions.get((operator, present))
        if function is None:
            function = self._function(operator, present)
            self.functions[operator, present] = function
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        return self.tape.op(
            kind,
            inputs,
            operator.attributes(),
            domain=DOMAIN,
            overload=function.overload,
            name=name or self._name(kind),
        )

    def _function(self, operator: Operator, present: tuple[bool, ...]) -> ir.Function:
        """The op's body as a function whose overload is told apart by a number."""
        kind = type(operator).__name__
        parameters = [ir.Value(name=n) for n in operator.inputs[: len(present)]]
        given = [p if there else None for p, there in zip(parameters, present, strict=True)]
        inner = Writer(self.opset, self.keep, self.functions)
        output = operator.body(inner, *given)
        graph = ir.Graph(
            parameters,
            [output],
            nodes=inner.tape.nodes,
            opset_imports={"": self.opset, DOMAIN: VERSION},
        )
        attributes = [
            ir.Attr(attribute.name, attribute.type, None)
            for attribute in ir.convenience.convert_attributes(operator.attributes())
        ]
        number = sum(type(known).__name__ == kind for known, _ in self.functions)
        return ir.Function(DOMAIN, kind, str(number), graph=graph, attributes=attributes)
