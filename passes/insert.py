"""insert: around every chosen product the nodes of its pre-processing, tile and post-processing.

Written for one tile that holds the whole weight; ``map_tiles`` cuts it. In training the running
statistics are updated first, functionally, and stored by ``copy_``; what is used is the update
itself, so that the backward uses the range that this forward used whatever happens to the
parameter.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from analogfx import ops
from analogfx.config import Resolved
from analogfx.kernels import patches
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import all_scalars
from analogfx.passes.chain import Emitter, dialect
from analogfx.passes.contract import CONVOLUTIONS, EXPERTS, Context
from analogfx.passes.stationary import weight_value


def insert(graph: Graph, context: Context) -> int:
    """Replace every chosen product by its explicit chain.

    Returns:
        The number of products replaced.
    """
    count = 0
    for node in list(graph.nodes):
        site = node.meta.get("site")
        if site is None:
            continue
        with graph.inserting_before(node):
            out = _site(Emitter(graph, site, context), node)
        out.meta["decision"] = site.decision
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        count += 1
    return count


def _site(emit: Emitter, product: Node) -> Node:
    config, training = emit.site.config, emit.site.training
    x, weight, bias = product.args[:3]
    w = emit.call("weight", ops.autocast, weight)
    bias = None if bias is None else emit.call("bias", ops.autocast, bias)
    x_cast = x = _input(emit, x, w, bias)
    offsets = emit.method("offsets", "detach", product.args[3]) if emit.site.experts else None
    noisy = training and bool(config.noise_std or config.out_noise)
    seed = _seed(emit, x) if noisy else None
    window = _window(product)
    if window is not None:
        x = emit.call("input", patches.unfold_batched, x, *window)
        w = emit.method("weight", "flatten", w, 1)
    ranges = _ranges(emit, x, offsets, config, training) if config.has_state else None
    if emit.site.groups > 1:
        x = emit.method("input", "unflatten", x, -1, (emit.site.groups, -1))
        w = emit.method("weight", "unflatten", w, 0, (emit.site.groups, -1))
    y = _tile(emit, x, w, offsets, ranges, seed, config)

    if emit.site.groups > 1:
        y = emit.method("output", "flatten", y, -2)
    if bias is not None:
        of_rows = _by_row(emit, "bias", bias, offsets, y)
        y = emit.call("bias", torch.add, y, of_rows)
    if window is not None:
        y = emit.call("output", patches.fold_output, y, x_cast, *window)
    return emit.method("output", "type_as", y, x_cast)


def _input(emit: Emitter, x: Any, w: Node, bias: Node | None) -> Node:
    """The site's input, cast and checked before anything depends on it."""
    shape = emit.site.decision.weight_shape
    if emit.site.experts:
        shape = shape[1:]
    features, dims = emit.site.groups * shape[1], len(shape) - 2
    name = emit.path("state")
    cast = emit.call("input", ops.autocast, x)
    return emit.call("input", ops.checked, cast, w, bias, features, dims, name)


def _window(product: Node) -> Window | None:
    """Geometry of a convolution, None for a linear product."""
    if product.target in (F.linear, EXPERTS):
        return None
    assert product.target in CONVOLUTIONS
    value = weight_value(product.args[1])
    assert value is not None
    stride, padding, dilation = (list(a) for a in product.args[3:6])  # type: ignore[arg-type]
    return Window(list(value.shape[2:]), stride, padding, dilation)


def _by_row(emit: Emitter, role: str, value: Node, offsets: Node | None, rows: Node) -> Node:
    """What every expert has one of for every row; a site of one matrix has one for all."""
    if offsets is None:
        return value
    return emit.call(role, dialect.expert_rows.default, value, offsets, rows)


def _ranges(emit: Emitter, x: Node, offsets: Node | None, config: Resolved, training: bool) -> Node:
    """The input ranges (k,), or (E, k) of experts, after this step's statistics in training.

    A range acts by its magnitude, should an optimizer take it below 0.
    """
    names = emit.site.state
    parameter = emit.attribute("state", names.input_range)
    if not training:
        return emit.method("range", "abs", parameter)
    stored = [emit.method("state", "detach", parameter)]
    stored += [emit.attribute("state", n) for n in names.ranges()[1:]]
    arguments = (
        emit.method("state", "detach", x),
        *stored,
        config.range_mode,
        emit.site.groups,
        [sum(emit.site.in_sizes)],
        "",  # patches, if any, are made
        config.init_from_data,
        config.init_std_alpha,
        config.momentum,
        *([] if offsets is None else [offsets]),
    )
    if config.collects:  # the step writes the state; a forward notes what it saw
        notes = emit.attribute("state", names.seen)
        collect = dialect.collect_range.default
        how = emit.attribute("state", names.initializes), config.processes, config.learns_by_share
        updated = emit.call("update_range", collect, *arguments, notes, *how)
        places = [None, notes]
    else:
        updated = emit.call("update_range", dialect.update_range.default, *arguments)
        places = stored
    news = [emit.call("state", operator.getitem, updated, i) for i in range(len(places))]
    for place, new in zip(places, news, strict=True):
        if place is not None:
            emit.call("store", torch.ops.aten.copy_.default, place, new)
    used = emit.call("state", dialect.stored_range.default, parameter, news[0])
    return emit.method("range", "abs", used)


def _seed(emit: Emitter, x: Node) -> Node:
    """The seed of this call's noise."""
    plain = emit.method("state", "detach", x)
    return emit.call("seed", dialect.draw_seed.default, plain)


def _tile(
    emit: Emitter,
    x: Node,
    w: Node,
    offsets: Node | None,
    ranges: Node | None,
    seed: Node | None,
    config: Resolved,
) -> Node:
    """One tile, or that of every expert: DAC, weights, product, output noise, ADC."""
    r = None
    if ranges is not None:
        r = emit.call("tile_range", torch.select, ranges, -1, 0)
    elif config.range_mode == "dynamic":
        plain = emit.method("tile", "detach", x)
        r = emit.call("tile_range", dialect.dynamic_range.default, plain)
    analog_x = x
    if r is not None and (config.has_state or config.inp_res):
        own = len(emit.site.range_shape) > 1 and ranges is not None
        analog_x = emit.call(
            "dac",
            dialect.expert_dac.default if own else dialect.dac.default,
            x,
            r,
            *([offsets] if own else []),
            *all_scalars("dac", replace(config, decay=0.0) if config.collects else config),
        )
        if own:  # for what follows, of every row
            column = emit.method("tile", "unsqueeze", emit.method("tile", "detach", r), -1)
            r = _by_row(emit, "tile", column, offsets, x)

    analog_w, row_max = _weights(emit, w, seed, config)
    if offsets is None:
        y = emit.call("mvm", dialect.mvm.default, analog_x, analog_w)
    else:
        y = emit.call("mvm", dialect.expert_mvm.default, analog_x, analog_w, offsets)

    if seed is not None and config.out_noise:
        assert r is not None
        a = _scale(emit, row_max, config.out_noise_per_channel)
        a = _by_row(emit, "tile", a, offsets, y)
        if offsets is None:
            draw = emit.call("output_normal", dialect.normal_like.default, y, seed, 1)
        else:
            normal = dialect.expert_output_normal.default
            draw = emit.call("output_normal", normal, y, seed, 1, offsets)
        strength = all_scalars("output_noise", config)
        y = emit.call("output_noise", dialect.output_noise.default, y, a, r, draw, *strength)
    if config.out_bound:
        assert r is not None
        a = _scale(emit, row_max, config.bound_per_channel)
        a = _by_row(emit, "tile", a, offsets, y)
        y = emit.call("adc", dialect.adc.default, y, a, r, *all_scalars("adc", config))
    return y


def _weights(
    emit: Emitter, w: Node, seed: Node | None, config: Resolved
) -> tuple[Node, Node | None]:
    """The weights as the tile holds them, and what scales noise and bounds of its rows."""
    clip = row_max = None
    whole = w
    if config.learnable_clip:
        clip = emit.call(
            "tile_clip", torch.select, emit.attribute("state", emit.site.state.clip), 0, 0
        )
        parts = max(emit.site.groups, emit.site.experts)
        if parts > 1 or emit.site.experts:
            clip = emit.method("tile", "unflatten", clip, 0, (parts, -1))
        plain = emit.method("tile", "detach", clip)
        row_max = emit.method("row_max", "abs", plain)
    else:
        row_max = emit.call("row_max", dialect.row_max.default, emit.method("tile", "detach", w))
    if clip is not None:
        scalars = (
            *all_scalars("clip", config),
            *([emit.site.experts] if emit.site.experts else []),
        )
        w = emit.call("clip", dialect.clip_weight.default, w, clip, *scalars)
    elif config.weight_states:
        bound = _scale(emit, row_max, config.weight_per_channel)
        states = all_scalars("quantize", config)
        w = emit.call("quantize", dialect.quantize_weight.default, w, bound, *states)
    if seed is not None and config.noise_std:
        a = _scale(emit, row_max, config.noise_per_channel)
        plain = emit.method("state", "detach", whole)  # of the shape of all tiles together
        experts = emit.site.experts
        normal = dialect.expert_weight_normal if experts else dialect.normal_like
        draw = emit.call("weight_normal", normal.default, plain, seed, 0)
        strength = all_scalars("weight_noise", config)
        w = emit.call("weight_noise", dialect.weight_noise.default, w, a, draw, *strength)
    return w, row_max


def _scale(emit: Emitter, row_max: Node | None, per_channel: bool) -> Node:
    """A row's own maximum, or that of its tile."""
    assert row_max is not None
    if per_channel:
        return row_max
    return emit.call("tile_max", dialect.tile_max.default, row_max, [sum(emit.site.out_sizes)])
