"""Check an ONNX file against its golden vectors, in NumPy alone: ``python golden.py FILE``."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from safetensors import safe_open

F, TINY = np.float32, np.finfo(np.float32).tiny


def step_of(bound, res):
    """Width of a converter's step over +-bound."""
    return 2 * bound / F(res) if res > 1 else 2 * bound * F(res)


def accumulated(codes, weight, groups, window):
    """Sums of products of codes, int64: (..., G, O / G), or (B, O, ...) of a convolution."""
    if window is None:
        return np.einsum("...gi,goi->...go", codes, weight.reshape(groups, -1, codes.shape[-1]))
    kernel, dilations = window["kernel_size"], window["dilation"]
    padded = np.pad(codes, [(0, 0), (0, 0), *((p, p) for p in window["padding"])])
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    views = sliding_window_view(padded, spans, tuple(range(2, padded.ndim)))
    views = views[(..., *(slice(None, None, s) for s in (*window["stride"], *dilations)))]
    batch, channels, *places = views.shape[: codes.ndim]
    patches = views.reshape(batch, groups, channels // groups, *places, -1)
    kernels = weight.reshape(groups, -1, channels // groups, patches.shape[-1])
    return np.einsum("bgc...k,gock->bgo...", patches, kernels).reshape(batch, -1, *places)


def site(x, held, spec, window):
    """Codes behind the DAC, codes behind the ADC of every row of tiles, and the output."""
    weight, groups, y, dac, adc = held["weight"].astype(np.int64), spec["groups"], F(0), [], []
    cuts, columns = (np.cumsum(spec[sizes])[:-1] for sizes in ("in_sizes", "out_sizes"))
    if window is None:
        shape, xs = (groups, -1), np.split(x.reshape(*x.shape[:-1], groups, -1), cuts, -1)
    else:
        shape, xs = (-1, *[1] * (x.ndim - 2)), [x]
    for t, (x_t, w_t) in enumerate(zip(xs, np.split(weight, cuts, 1), strict=True)):
        dynamic = spec["range_mode"] == "dynamic"
        r = np.abs(x_t).max(-1, keepdims=True) if dynamic else held["input_range"][t]
        dac.append(np.round(np.clip(x_t, -r, r) / np.maximum(step_of(r, spec["inp_res"]), TINY)))
        sums = accumulated(dac[-1].astype(np.int64), w_t, groups, window)
        adc.append(np.round(sums.astype(F) * held["code_scale"][t].reshape(shape)))
        a = held["weight_max"][t]
        if not spec["bound_per_channel"]:
            a = np.concatenate([np.full_like(p, p.max()) for p in np.split(a, columns)])
        bound = (r * F(spec["out_bound"])) * a.reshape(shape)
        step = step_of(bound, spec["out_res"])
        y = y + np.clip(adc[-1] * np.where(step == 0, F(1), step), -bound, bound)
    if window is None:
        y, shape = y.reshape(*x.shape[:-1], -1), (-1,)
    y = y + held["bias"].reshape(shape) if "bias" in held else y
    return np.concatenate(dac, -1).reshape(x.shape), np.stack([c.reshape(y.shape) for c in adc]), y


def check(path):
    """Compare every site. Returns how many ADC codes were; raises at the first that differs."""
    model, count = onnx.load(path), 0
    record = json.loads(next(e.value for e in model.metadata_props if e.key == "ai.analogfx"))
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    with safe_open(f"{path}.golden.safetensors", "np") as golden:
        assert golden.metadata()["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
        kept = set(golden.keys())
        for entry in record["sites"]:
            held = {key: constants[name] for key, name in entry["initializers"].items()}
            spec, window = entry["spec"], entry["window"]
            end = np.floor(1 / step_of(F(1), spec["out_res"]) + F(0.5)) if spec["out_res"] else 0
            for node in (n for n in entry["nodes"] if f"site/{n}/adc" in kept):
                noted = [
                    golden.get_tensor(f"site/{node}/{key}") for key in ("x", "dac", "adc", "y")
                ]
                for x, *expected in zip(*noted, strict=True):  # a call each
                    dac, adc, y = site(x, held, spec, window)
                    found = dac, np.clip(adc, -end, end), y
                    for mine, want in zip(found, expected, strict=True):
                        np.testing.assert_array_equal(mine, want, err_msg=node)
                    count += adc.size
    return count


if __name__ == "__main__":
    print(f"{check(sys.argv[1]):,} ADC codes, as in the golden vectors")
