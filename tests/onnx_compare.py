"""A file held against its model, site by site.

Outputs of a whole network cannot be compared closely: where a converter rounds, a difference of
one bit becomes a step, and the next layers carry it on. So the model runs in eager mode with the
output of each site replaced by what the file's site gave. Then the digital parts between sites
must agree to rounding, and each site, from the very same input, must lie in the interval that its
docs page allows (see onnx_backend), whose ends are apart only by rounding or at a tie of the ADC.
"""

import json
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_backend
import onnxruntime
import torch
from onnx import inliner
from onnx.reference import ReferenceEvaluator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from analogfx import load_onnx_sites

_SITES = (torch.ops.analogfx.analog_linear.default, torch.ops.analogfx.analog_conv.default)

DIGITAL = 1e-5
"""Largest difference of digital values over the largest value: float32 in another order."""


@dataclass
class Found:
    """What a comparison saw."""

    values: int = 0
    """Outputs of all sites."""
    at_ties: int = 0
    """Of these, how many may be a step apart: their product is within rounding of an ADC's tie."""
    apart: int = 0
    """Of these, how many are apart by more than rounding."""

    def __add__(self, other):
        return Found(
            self.values + other.values, self.at_ties + other.at_ties, self.apart + other.apart
        )


SEEN: dict[str, Found] = {}
"""Sums over the tests of a session, by level."""


def onnx_runtime(model, feed):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, feed)


def reference_evaluator(model, feed):
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(inliner.inline_local_functions(model)).run(None, feed)


def backend(model, feed):
    """The reference evaluator with the ops of docs/onnx/ in NumPy instead of the functions."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.functions[:]
    return ReferenceEvaluator(bare, new_ops=onnx_backend.OPS).run(None, feed)


def compare(path, analog, inputs, run=onnx_runtime):
    """Hold a file against its model on some inputs.

    Returns:
        The counts; raises AssertionError where the two disagree.
    """
    model = onnx.load(path)
    calls = calls_of(model, load_onnx_sites(path).sites)
    ends = [name for _, x, y in calls for name in (x, y)]
    outputs = [o.name for o in model.graph.output]
    known = {*outputs, *(i.name for i in model.graph.input)}
    for name in dict.fromkeys(n for n in ends if n not in known):
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    names = [i.name for i in model.graph.input]
    feed = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
    values = feed | dict(zip((o.name for o in model.graph.output), run(model, feed), strict=True))
    forced = _Forced([(site, values[x], values[y]) for site, x, y in calls])
    with torch.no_grad(), forced:
        results = [t for t in tree_leaves(analog(*inputs)) if isinstance(t, torch.Tensor)]
    assert not forced.calls, "the file has more calls of sites than the model"
    for name, expected in zip(outputs, results, strict=True):
        _assert_digital(values[name], expected, name)
    return forced.found


class _Forced(TorchDispatchMode):
    """Checks every site of a model against the file's, and goes on with the file's output."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls
        self.found = Found()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in _SITES:
            return func(*args, **(kwargs or {}))
        (site, x, y), self.calls = self.calls[0], self.calls[1:]
        _assert_digital(x, args[0], f"input of {site.name}")
        given = torch.from_numpy(x.copy())
        expected, *rest = func(given, *args[1:], **(kwargs or {}))
        low, high = interval(site, x)
        for what, value in (("the file", y), ("the model", expected.numpy())):
            outside = (value < low) | (value > high)
            worst = np.maximum(low - value, value - high).max()
            assert not outside.any(), (
                f"{what} is outside at {site.name} {outside.sum()} times in {value.size}, "
                f"by up to {worst}"
            )
        tie = high - low > 1e-4 * np.abs(high).max()
        apart = np.abs(y - expected.numpy()) > 1e-4 * np.abs(high).max()
        self.found += Found(y.size, int(tie.sum()), int(apart.sum()))
        return (torch.from_numpy(y.copy()), *rest)


def interval(site, x):
    """The least and the largest value that a site may give for an input."""
    compute = {
        "AnalogLinear": onnx_backend.analog_linear,
        "AnalogConv": onnx_backend.analog_conv,
    }[site.op]
    attributes = site.spec._asdict()
    attributes["group"] = attributes.pop("groups")
    if site.window is not None:
        kernel, strides, pads, dilations = site.window
        attributes |= {"kernel_shape": kernel, "strides": strides, "pads": [*pads, *pads]}
        attributes["dilations"] = dilations
    constants = {name: site.array(name) for name in site.tensors}
    return (compute(x, **constants, **attributes, around=side) for side in (-1, 1))


def _assert_digital(found, expected, what):
    expected = expected.numpy()
    assert found.shape == expected.shape, what
    if not np.issubdtype(expected.dtype, np.floating):
        assert np.array_equal(found, expected), what
    elif expected.size:
        np.testing.assert_allclose(
            found, expected, rtol=0, atol=DIGITAL * np.abs(expected).max(), err_msg=what
        )


def calls_of(model, sites):
    """(site, name of its input, name of its output) of every call, in the order of the graph."""
    places = {}
    constants = {t.name for t in model.graph.initializer} | {""}
    for node in model.graph.node:  # a part of a bias is computed from a constant
        if set(node.input) <= constants:
            constants.update(node.output)
    for site in sites:
        for label in site.nodes:
            nodes = [
                (place, n)
                for place, n in enumerate(model.graph.node)
                if n.name == label or n.name.startswith(f"{label}/")
            ]
            made = {name for _, n in nodes for name in n.output}
            read = {name for _, n in nodes for name in n.input if name} - made - constants
            used = {o.name for o in model.graph.output} | {
                name
                for n in model.graph.node
                if not any(n is inner for _, inner in nodes)
                for name in n.input
            }
            (x,), (y,) = read, made & used
            places[nodes[0][0]] = (site, x, y)
    return [places[place] for place in sorted(places)]


def metadata(path):
    """The record of sites in a file."""
    (text,) = [e.value for e in onnx.load(path).metadata_props if e.key == "ai.analogfx"]
    return json.loads(text)
