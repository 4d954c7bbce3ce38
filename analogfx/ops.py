"""The dialect: one ``torch.library`` op for every kind of node, namespace ``analogfx``.

Two levels. *Explicit*: a node for every role (range, DAC, weight modification, MVM, output noise,
ADC), which is what a reader of a graph sees. *Fused*: ``analog_linear`` and ``analog_conv``, a
whole site each. Both run, so a pass can be checked by running the graph before and after it.

Every op is functional (no op writes to its inputs), takes its randomness as (seed, stream), reads
nothing back to the host, and has a fake and an autograd formula. The arithmetic is in
:mod:`analogfx.kernels`; this module only names it to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from analogfx.compiled import keep_in_order, keep_result, order_in_inductor
from analogfx.kernels import conv, dispatch, held, linear, noise
from analogfx.kernels import reference as ref
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec, decode
from analogfx.transforms import differentiable, draws_by_sample

_library = torch.library.Library("analogfx", "DEF")

# Inside a site autocast has had its say (see `autocast`): nothing below may be cast again.
_AUTOCAST = (torch._C.DispatchKey.AutocastCPU, torch._C.DispatchKey.AutocastCUDA)


def _define(
    name: str,
    arguments: str,
    returns: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Register one op with its schema, implementation, fake and (if it has one) derivative."""
    _library.define(f"{name}({arguments}) -> {returns}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"analogfx::{name}", fake, lib=_library)
    op = getattr(torch.ops.analogfx, name).default
    if backward is not None:
        assert setup is not None
        _library.impl(name, differentiable(op, setup, backward), "Autograd", with_keyset=True)
    for key in _AUTOCAST:

        def below_autocast(*args: Any, _key: Any = key, _op: Any = op) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_key)):
                return _op(*args)

        _library.impl(name, below_autocast, key.name)


def autocast(x: Any) -> Any:
    """``x`` in the dtype that ``nn.Linear`` would compute in here: autocast's, if it is on."""
    if not isinstance(x, Tensor) or x.dtype == torch.float64 or x.is_meta:
        return x
    if not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def checked(
    x: Any, weight: Tensor, bias: Tensor | None, features: int, dims: int, name: str
) -> Tensor:
    """``x`` as it is, if a site can multiply it: before its ranges follow the data.

    Args:
        features: length of x's last axis, or number of channels of an image.
        dims: spatial axes of an image, 0 for a linear product.
        name: the module's path, for the message.

    Raises:
        TypeError: not a tensor, or not of floating point.
        RuntimeError: of the wrong shape, or of another dtype or device than the weight.
    """
    where = f"{name}: " if name else ""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = f"a {x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{where}expected a tensor of floating point, found {found}")
    fits = x.dim() in (dims + 1, dims + 2) if dims else x.dim() > 0
    if not fits or x.shape[-1 - dims] != features:
        wanted = f"(batch, {features}{', size' * dims})" if dims else f"(..., {features})"
        raise RuntimeError(f"{where}expected an input {wanted}, found {tuple(x.shape)}")
    for operand, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise RuntimeError(
                f"{where}the input is {x.dtype}, the {operand} {t.dtype}: "
                "cast one of them, or run under torch.autocast"
            )
    if x.device != weight.device:
        raise RuntimeError(f"{where}the input is on {x.device}, the weight on {weight.device}")
    return x


def _window(text: str) -> Window | None:
    """Geometry of a convolution; an empty text for none."""
    return decode(Window, text) if text else None


def _wide_like(x: Tensor, shape: Sequence[Any] | None = None) -> Tensor:
    """An empty tensor in the precision that sites compute in."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape if shape is None else shape, dtype=dtype)


# ------------------------------------------------------------------- randomness, statistics


def _fake_seed(x: Tensor) -> Tensor:
    order_in_inductor(torch.ops.analogfx.draw_seed.default)
    return x.new_empty((), dtype=torch.int64)


_define(
    "draw_seed",
    "Tensor x",
    "Tensor",
    lambda x: noise.draw_seed(x.device),
    _fake_seed,
)
keep_in_order(torch.ops.analogfx.draw_seed.default, _library)
keep_result(torch.ops.analogfx.draw_seed.default, _library)
draws_by_sample(torch.ops.analogfx.draw_seed.default, _library)

_define(
    "normal_like",
    "Tensor x, Tensor seed, int stream",
    "Tensor",
    lambda x, seed, stream: noise.normal(seed, stream, x.shape, ref.wide(x.new_empty(0)).dtype),
    lambda x, seed, stream: _wide_like(x),
    lambda ctx, inputs, output: None,
    lambda ctx, grad: (None, None, None),  # x gives the shape alone
)


_define(
    "update_range",
    "Tensor x, Tensor input_range, Tensor count, Tensor x_min, Tensor x_max, str range_mode, "
    "int groups, int[] in_sizes, str window, int init_from_data, float init_std_alpha, "
    "float momentum",
    "(Tensor, Tensor, Tensor, Tensor)",
    lambda *args: dispatch.update_range(*(*args[:8], _window(args[8]), *args[9:])),
    lambda x, *state_and_rest: tuple(torch.empty_like(t) for t in state_and_rest[:4]),
)

keep_result(torch.ops.analogfx.update_range.default, _library)

# What a parameter holds once an update is stored in it. Not read from the parameter: a compiled
# checkpoint's backward would read what later calls have stored there.
_define(
    "stored_range",
    "Tensor input_range, Tensor new",
    "Tensor",
    lambda input_range, new: new.clone(),
    lambda input_range, new: torch.empty_like(new),
    lambda ctx, inputs, output: None,
    lambda ctx, grad: (grad, None),  # to the parameter that holds the range
)
keep_result(torch.ops.analogfx.stored_range.default, _library)

_define(
    "dynamic_range",
    "Tensor x",
    "Tensor",
    lambda x: ref.range_dynamic(x).to(ref.wide(x.new_empty(0)).dtype, copy=True),
    lambda x: _wide_like(x, (*x.shape[:-1], 1)),
)

# ------------------------------------------------------------------------------ explicit level


def _dac_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, input_range, _, ctx.range_mode, ctx.decay, ctx.input_min_percentage = inputs
    ctx.save_for_backward(x, input_range)


def _dac_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, input_range = ctx.saved_tensors
    rest = (None, None, None, None)
    if ctx.range_mode == "dynamic":
        return grad.to(x.dtype), None, *rest
    grad_range = None
    if ctx.needs_input_grad[1]:
        if ctx.range_mode == "fast":
            grad_range = ref.range_grad_fast(grad, x, input_range)
        else:
            grad_range = ref.range_grad_static(
                grad, x, input_range, ctx.decay, ctx.input_min_percentage
            )
    return (grad * ref.inside(x, input_range)).to(x.dtype), grad_range, *rest


_define(
    "dac",
    "Tensor x, Tensor input_range, float inp_res, str range_mode, float decay, "
    "float input_min_percentage",
    "Tensor",
    lambda x, input_range, inp_res, range_mode, decay, input_min_percentage: ref.dac(
        x, input_range, inp_res, range_mode != "dynamic"
    ),
    lambda x, *_: _wide_like(x),
    _dac_setup,
    _dac_backward,
)

_define(
    "row_max",
    "Tensor w",
    "Tensor",
    lambda w: ref.row_max(w),
    lambda w: _wide_like(w, w.shape[:-1]),
)

_define(
    "tile_max",
    "Tensor row_max, int[] out_sizes",
    "Tensor",
    lambda row, out_sizes: ref.tile_max(row, out_sizes).clone(),
    lambda row, out_sizes: torch.empty_like(row),
)

_define(
    "quantize_weight",
    "Tensor w, Tensor bound, float weight_states",
    "Tensor",
    lambda w, bound, states: ref.quantize_weight(w, bound.unsqueeze(-1), states),
    lambda w, *_: _wide_like(w),
    lambda ctx, inputs, output: setattr(ctx, "dtype", inputs[0].dtype),
    lambda ctx, grad: (grad.to(ctx.dtype), None, None),  # straight through
)


def _clip_weight(w: Tensor, clip: Tensor, weight_states: float) -> Tensor:
    if weight_states:
        return ref.quantize_weight(w, ref.wide(clip).abs().unsqueeze(-1), weight_states)
    return ref.clip_weight(w, clip.unsqueeze(-1))


def _clip_weight_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    w, clip, ctx.weight_states = inputs
    ctx.save_for_backward(w, clip)


def _clip_weight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    w, clip = ctx.saved_tensors
    grad_w, grad_clip = ref.weight_backward(grad, w, clip, ctx.weight_states)
    return grad_w.to(w.dtype), grad_clip.to(clip.dtype), None


_define(
    "clip_weight",
    "Tensor w, Tensor clip, float weight_states",
    "Tensor",
    _clip_weight,
    lambda w, *_: _wide_like(w),
    _clip_weight_setup,
    _clip_weight_backward,
)

_define(
    "weight_noise",
    "Tensor w, Tensor a, Tensor normal, float noise_std",
    "Tensor",
    lambda w, a, normal, noise_std: normal * (noise_std * a).unsqueeze(-1) + ref.wide(w),
    lambda w, *_: _wide_like(w),
    lambda ctx, inputs, output: setattr(ctx, "dtype", inputs[0].dtype),
    lambda ctx, grad: (grad.to(ctx.dtype), None, None, None),
)


def _rows(x: Tensor, w: Tensor) -> Tensor:
    """(..., I) or (..., groups, I) as (N, ...)."""
    return ref.wide(x).reshape(-1, *x.shape[1 - w.dim() :])


def _mvm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _mvm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, w = ctx.saved_tensors
    flat_x, flat_g = _rows(x, w), grad.reshape(-1, *w.shape[:-1])
    grad_x = linear.product(flat_g, ref.wide(w).mT).view(x.shape)
    return grad_x.to(x.dtype), linear.outer(flat_g, flat_x).to(w.dtype)


def _mvm(x: Tensor, w: Tensor) -> Tensor:
    y = linear.product(_rows(x, w), ref.wide(w))
    return y.reshape(*x.shape[: 1 - w.dim()], *w.shape[:-1]).contiguous()


_define(
    "mvm",
    "Tensor x, Tensor w",
    "Tensor",
    _mvm,
    lambda x, w: _wide_like(x, (*x.shape[: 1 - w.dim()], *w.shape[:-1])),
    _mvm_setup,
    _mvm_backward,
)

_define(
    "output_noise",
    "Tensor y, Tensor a, Tensor input_range, Tensor normal, float strength",
    "Tensor",
    ref.output_noise,
    lambda y, *_: _wide_like(y),
    lambda ctx, inputs, output: None,
    lambda ctx, grad: (grad, None, None, None, None),
)


def _adc(y: Tensor, a: Tensor, input_range: Tensor, out_bound: float, out_res: float) -> Tensor:
    bound = ref.adc_bound(input_range, a, out_bound)
    return ref.clamp_to(ref.adc_(y.clone(), bound, out_res), bound)


def _adc_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, a, input_range, ctx.out_bound, ctx.out_res = inputs
    ctx.save_for_backward(y, a, input_range)


def _adc_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, a, input_range = ctx.saved_tensors
    bound = ref.adc_bound(input_range, a, ctx.out_bound)
    clipped = ref.adc_(y.clone(), bound, ctx.out_res).abs() > bound
    return grad.masked_fill(clipped, 0.0), None, None, None, None


_define(
    "adc",
    "Tensor y, Tensor a, Tensor input_range, float out_bound, float out_res",
    "Tensor",
    _adc,
    lambda y, *_: _wide_like(y),
    _adc_setup,
    _adc_backward,
)

# --------------------------------------------------------------------------------- fused level
#
# The scalars of a site travel as one text, see `analogfx.kernels.spec.encode`.

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? input_range, Tensor? clip, Tensor? seed, "
_BACKWARD_INPUTS = (
    "Tensor grad, Tensor x, Tensor weight, Tensor? input_range, Tensor? clip, Tensor? seed, "
    "Tensor clipped, Tensor modified, bool[] needs, "
)
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"


def _fused_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, *state = inputs[:6]
    ctx.texts = inputs[6:]
    _, clipped, modified = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(clipped, modified)
    ctx.save_for_backward(x, weight, *state, clipped, modified)


def _fused_backward(
    op: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (1 + len(ctx.texts))  # the seed and the texts
        needs = list(ctx.needs_input_grad[:5])
        if grad is None:
            return (None,) * 5 + nothing
        gradients = op(grad, *ctx.saved_tensors, needs, *ctx.texts)
        wanted = (g if need else None for g, need in zip(gradients, needs, strict=True))
        return (*wanted, *nothing)

    return backward


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "analog products have no second derivative: a gradient of a gradient needs the digital "
        "model, see to_digital()"
    )


def _fake_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    input_range: Tensor | None,
    clip: Tensor | None,
    seed: Tensor | None,
    clipped: Tensor,
    modified: Tensor,
    needs: list[bool],
    *texts: str,
) -> tuple[Tensor, ...]:
    bias = weight.new_empty(weight.shape[0])
    return tuple(
        t.new_empty(t.shape) if need and t is not None else x.new_empty(0)
        for t, need in zip((x, weight, bias, input_range, clip), needs, strict=True)
    )


def _fake_kept(
    x: Tensor, weight: Tensor, out: Sequence[Any], clipped: Sequence[Any], keeps_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Stand-ins for what a fused op returns."""
    kept = _wide_like(weight) if keeps_weight else weight.new_empty(0)
    return x.new_empty(out), x.new_empty(clipped, dtype=torch.uint8), kept


def _fake_linear(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    spec = decode(MVMSpec, rest[-1])
    out = (*x.shape[:-1], weight.shape[0])
    clipped = dispatch.clipped_shape(x, weight, spec)
    return _fake_kept(x, weight, out, clipped, dispatch.keeps_weight(x, weight, spec))


def _fake_conv(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    window, spec = decode(Window, rest[-2]), decode(MVMSpec, rest[-1])
    shapes = conv.out_shape(x, weight, window), conv.clipped_shape(x, weight, window, spec)
    y, clipped, kept = _fake_kept(x, weight, *shapes, linear.keeps_weight(weight, spec))
    return (
        conv.laid_out(y, x),
        conv.laid_out(clipped, x) if linear.is_kept(clipped) else clipped,
        kept,
    )


def _fake_conv_gradients(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    of_x, of_weight, *others = _fake_gradients(grad, x, weight, *rest)
    return (
        conv.laid_out(of_x, x) if linear.is_kept(of_x) else of_x,
        conv.laid_out(of_weight, weight) if linear.is_kept(of_weight) else of_weight,
        *others,
    )


def _analog_linear(*args: Any) -> Any:
    *tensors, text = args
    return dispatch.forward(*(*tensors, decode(MVMSpec, text)))


def _analog_linear_backward(*args: Any) -> Any:
    *tensors, text = args
    return dispatch.backward(*(*tensors, decode(MVMSpec, text)))


def _analog_conv(*args: Any) -> Any:
    *tensors, window, text = args
    dispatch.serves(dispatch.refused_convolution(tensors[0]))  # an error if they were asked for
    return conv.forward(*(*tensors, decode(Window, window), decode(MVMSpec, text)))


def _analog_conv_backward(*args: Any) -> Any:
    *tensors, window, text = args
    return conv.backward(*(*tensors, decode(Window, window), decode(MVMSpec, text)))


_define(
    "analog_linear_backward",
    _BACKWARD_INPUTS + "str spec",
    _GRADIENTS,
    _analog_linear_backward,
    _fake_gradients,
    lambda ctx, inputs, output: None,
    _no_second_derivative,
)
_define(
    "analog_linear",
    _INPUTS + "str spec",
    "(Tensor, Tensor, Tensor)",
    _analog_linear,
    _fake_linear,
    _fused_setup,
    _fused_backward(torch.ops.analogfx.analog_linear_backward.default),
)
_define(
    "analog_conv_backward",
    _BACKWARD_INPUTS + "str window, str spec",
    _GRADIENTS,
    _analog_conv_backward,
    _fake_conv_gradients,
    lambda ctx, inputs, output: None,
    _no_second_derivative,
)
_define(
    "analog_conv",
    _INPUTS + "str window, str spec",
    "(Tensor, Tensor, Tensor)",
    _analog_conv,
    _fake_conv,
    _fused_setup,
    _fused_backward(torch.ops.analogfx.analog_conv_backward.default),
)

# ------------------------------------------------------------------------ what a chip holds


def _held_linear(*args: Any) -> Tensor:
    *tensors, text = args
    return held.linear(*(*tensors, decode(MVMSpec, text)))


def _held_conv(*args: Any) -> Tensor:
    *tensors, window, text = args
    return held.conv(*(*tensors, decode(Window, window), decode(MVMSpec, text)))


def _no_gradient(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("a programmed chip has no gradient: leave device.at() to train the model")


_HELD = "Tensor x, Tensor weight, Tensor? bias, Tensor? input_range, Tensor? peaks, Tensor? gain, "
_define(
    "held_linear",
    _HELD + "str spec",
    "Tensor",
    _held_linear,
    lambda x, weight, *rest: x.new_empty((*x.shape[:-1], weight.shape[0])),
    lambda ctx, inputs, output: None,
    _no_gradient,
)
_define(
    "held_conv",
    _HELD + "str window, str spec",
    "Tensor",
    _held_conv,
    lambda x, weight, *rest: conv.laid_out(
        x.new_empty(conv.out_shape(x, weight, decode(Window, rest[-2]))), x
    ),
    lambda ctx, inputs, output: None,
    _no_gradient,
)
