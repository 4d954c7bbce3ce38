"""A backend for the custom ops in NumPy, written from docs/onnx/ alone, in float64.

It computes a site from what ``load_onnx_sites`` gives, and how far every product is from a tie of
the ADC's rounding: there, and only there, two orders of summation may end one step apart.
"""

import numpy as np


def _step(bound, res):
    return 2 * bound / res if res > 1 else 2 * bound * res


def _tile_max(row, out_sizes):
    parts = np.split(row, np.cumsum(out_sizes)[:-1])
    return np.concatenate([np.full_like(part, part.max()) for part in parts])


def linear(site, x):
    """``AnalogLinear`` of x (N, I), and for every output the distance of its nearest tie.

    Returns:
        y (N, O); distance (N, O) in ADC steps, infinite without an ADC; step (O,) or (N, O).
    """
    spec = site.spec
    x = x.astype(np.float64)
    y = np.zeros((len(x), site.weight_shape[0]))
    distance, steps = np.full(y.shape, np.inf), np.zeros(y.shape)
    weight = site.weight().astype(np.float64)
    start = 0
    for tile, size in enumerate(spec.in_sizes):
        columns = slice(start, start + size)
        start += size
        x_t = x[:, columns]
        r = None
        if spec.range_mode == "dynamic":
            r = np.abs(x_t).max(1, keepdims=True)
        elif spec.range_mode != "none":
            r = np.float64(site.array("input_range")[tile])
            x_t = np.clip(x_t, -r, r)
        if spec.inp_res:
            step = _step(np.float32(r), np.float32(spec.inp_res)).astype(np.float64)
            # The grid is float32's: a step that rounds elsewhere would shift every code.
            x_t = np.round(x_t.astype(np.float32) / step.astype(np.float32)) * step
        y_t = x_t @ weight[:, columns].T
        if spec.out_bound:
            a = site.array("weight_max")[tile].astype(np.float64)
            a = a if spec.bound_per_channel else _tile_max(a, spec.out_sizes)
            bound = np.broadcast_to(r * spec.out_bound * a, y_t.shape)
            if spec.out_res:
                step = _step(bound, spec.out_res)
                step = np.where(step == 0, 1.0, step)
                scaled = y_t / step
                distance = np.minimum(distance, np.abs(scaled - np.floor(scaled) - 0.5))
                steps = np.maximum(steps, step)
                y_t = np.round(scaled) * step
            y_t = np.clip(y_t, -bound, bound)
        y += y_t
    if "bias" in site.tensors:
        y += site.array("bias")
    return y, distance, steps
