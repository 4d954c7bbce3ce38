"""Cases and the oracle of the kernel tests: the same on a GPU and in Triton's interpreter."""

import contextlib
import math
from dataclasses import dataclass, field
from unittest import mock

import torch

from analogfx.kernels import linear as plain
from analogfx.kernels import noise, philox
from analogfx.kernels.operands import Operands
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.triton import weights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED = 1234567890123456789


@dataclass(frozen=True)
class Case:
    """One site and the data that it is given."""

    fields: dict
    """Of the MVMSpec."""
    in_sizes: tuple = (12,)
    outputs: int = 7
    out_sizes: tuple = ()
    lead: tuple = (5,)
    bias: bool = True
    clip: bool = False
    layout: str = "contiguous"
    dtypes: tuple = (torch.float32,)
    spec: MVMSpec = field(init=False)

    def __post_init__(self):
        outs = list(self.out_sizes) or [self.outputs]
        fields = {"keep": True, **self.fields}
        if self.clip and fields.get("weight_states"):
            fields["weight_per_channel"] = True
        object.__setattr__(self, "spec", MVMSpec(list(self.in_sizes), outs, **fields))


HALF = (torch.bfloat16, torch.float16)
ALL = (torch.float32, *HALF)
STATIC = {"range_mode": "static", "decay": 0.01, "input_min_percentage": 0.5}
DAC = {**STATIC, "inp_res": 30.0}
# An odd resolution: no output rounds to its bound, whose gradient hangs on the last bit.
ADC = {**DAC, "out_res": 61.0, "out_bound": 0.7}
NOISY = {"noise_std": 0.1, "out_noise": 0.1}
TILES = (5, 4, 4)

CASES = {
    "nothing": Case({}, dtypes=ALL),
    "nothing, no bias": Case({}, bias=False),
    "range": Case(STATIC, dtypes=ALL),
    "DAC": Case({**STATIC, "inp_res": 254.0}, dtypes=ALL),
    "DAC, tiles": Case(DAC, TILES, dtypes=(torch.bfloat16,)),
    "DAC too fine for bfloat16": Case({**STATIC, "inp_res": 2046.0}, dtypes=HALF),
    "DAC as a fraction": Case({**STATIC, "inp_res": 0.1, "out_res": 0.03, "out_bound": 0.7}),
    "ADC": Case(ADC, dtypes=ALL),
    "ADC, tiles": Case(ADC, TILES, out_sizes=(4, 3), dtypes=(torch.float32, torch.bfloat16)),
    "ADC, nine tiles": Case(ADC, (2,) + (1,) * 8, 3, lead=(3,)),
    "bound alone": Case({**STATIC, "out_bound": 0.4}, TILES, 9),
    "bound by row": Case({**ADC, "bound_per_channel": True}, TILES),
    "nothing kept": Case({**ADC, **NOISY, "keep": False}, TILES, out_sizes=(4, 3)),
    "fast": Case({**ADC, "range_mode": "fast"}, TILES, dtypes=(torch.float32, torch.float16)),
    "dynamic": Case(
        {**ADC, "range_mode": "dynamic"}, TILES, dtypes=(torch.float32, torch.bfloat16)
    ),
    "dynamic, DAC alone": Case(
        {"range_mode": "dynamic", "inp_res": 30.0}, TILES, dtypes=(torch.float32, torch.bfloat16)
    ),
    "weight noise": Case({"noise_std": 0.1}, TILES, out_sizes=(4, 3), dtypes=ALL),
    "weight noise by row": Case({"noise_std": 0.1, "noise_per_channel": True}, TILES),
    "output noise": Case({**DAC, "out_noise": 0.1}, TILES, out_sizes=(4, 3)),
    "output noise by row": Case({**DAC, "out_noise": 0.1, "out_noise_per_channel": True}, TILES, 8),
    "discrete": Case({"weight_states": 14.0}, TILES, out_sizes=(4, 3), dtypes=ALL),
    "discrete, odd": Case({"weight_states": 13.0, "weight_per_channel": True}),
    "clip": Case(ADC, TILES, clip=True, dtypes=(torch.float32, torch.bfloat16)),
    "clip, discrete": Case({"weight_states": 14.0}, TILES, clip=True),
    "everything": Case(
        {**ADC, **NOISY, "weight_states": 14.0, "bound_per_channel": True},
        TILES, out_sizes=(4, 3), clip=True, dtypes=ALL,
    ),
    "everything, dynamic": Case(
        {**ADC, **NOISY, "range_mode": "dynamic", "weight_states": 14.0, "noise_per_channel": True},
        TILES, dtypes=(torch.float32, torch.bfloat16),
    ),
    "aligned, many rows": Case(
        {**ADC, "out_bound": 0.3}, (16, 16), 24, lead=(66,), clip=True,
        dtypes=(torch.float32, torch.bfloat16),
    ),
    "aligned, few rows": Case(ADC, (16, 16), 24),
    "second blocks": Case(
        {**ADC, **NOISY}, (70, 69), out_sizes=(40, 27), lead=(67,), clip=True,
        dtypes=(torch.float32, torch.bfloat16),
    ),
    "second blocks, dynamic": Case(
        {**ADC, "range_mode": "dynamic"}, (80,), 80, lead=(130,), dtypes=(torch.bfloat16,)
    ),
    "no rows": Case(ADC, TILES, lead=(0,), clip=True),
    "no axis": Case(ADC, TILES, lead=()),
    "two axes": Case(ADC, TILES, lead=(2, 3)),
    "one output": Case(ADC, TILES, 1),
    "one input": Case(ADC, (1,), 5),
    "every second": Case({**ADC, **NOISY}, TILES, layout="every second", dtypes=(torch.bfloat16,)),
    "transposed": Case({**ADC, **NOISY}, TILES, layout="transposed"),
    "expanded": Case({**STATIC, "inp_res": 254.0}, layout="expanded", dtypes=(torch.bfloat16,)),
}  # fmt: skip


def laid_out(t, layout):
    """The same values with other strides."""
    if layout == "every second":
        return torch.stack([t, t.flip(-1)], -1)[..., 0]
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return t[..., :1].expand(t.shape)
    return t


@dataclass
class Data:
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    input_range: torch.Tensor | None
    clip: torch.Tensor | None
    seed: torch.Tensor
    grad: torch.Tensor

    def inputs(self):
        tensors = self.x, self.weight, self.bias, self.input_range, self.clip, self.seed
        return Operands(*tensors)

    def to(self, dtype=None, device=None):
        def move(t):
            if t is None or not t.is_floating_point():
                return t if t is None else t.to(device)
            return t.to(device, dtype)

        return Data(*(move(getattr(self, name)) for name in self.__dataclass_fields__))


def data(case, dtype):
    """Inputs of a case, some beyond their range, on the device of the kernels."""
    g = torch.Generator().manual_seed(sum(case.in_sizes) + case.spec.out_sizes[0])
    outputs, tiles = sum(case.spec.out_sizes), len(case.in_sizes)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    x, w = normal(*case.lead, sum(case.in_sizes)), 0.3 * normal(outputs, sum(case.in_sizes))
    ranged = case.spec.range_mode in ("static", "fast")
    made = Data(
        laid_out(x.to(dtype).to(DEVICE), case.layout),
        laid_out(w.to(dtype).to(DEVICE), case.layout),
        normal(outputs).to(dtype) if case.bias else None,
        1 + torch.rand(tiles, generator=g) if ranged else None,
        (0.2 + 0.5 * torch.rand(tiles, outputs, generator=g)).to(dtype) if case.clip else None,
        torch.tensor(SEED),
        laid_out(normal(*case.lead, outputs).to(dtype), case.layout),
    )
    for name in ("bias", "input_range", "clip", "seed", "grad"):
        t = getattr(made, name)
        setattr(made, name, None if t is None else t.to(DEVICE))
    if made.clip is not None:
        made.clip[0, 0] *= -1  # acts by its magnitude
    return made


def philox_normal(seed, stream, shape, dtype):
    return philox.normal(seed, stream, math.prod(shape)).to(dtype).reshape(shape)


@contextlib.contextmanager
def philox_on_the_cpu():
    """Let the torch implementation draw what the kernels draw."""
    with mock.patch.object(noise, "normal", philox_normal):
        yield


@contextlib.contextmanager
def operands_of_the_kernels(case, d, dtype):
    """Let a float64 oracle multiply what the kernels multiply: operands rounded to a half dtype.

    How these come about is tested on its own.
    """
    if dtype == torch.float32:
        yield
        return
    peaks = weights.maxima(d.weight, d.clip, case.spec)
    held = weights.modified_weight(d.weight, d.clip, d.seed, peaks, case.spec).cpu().double()
    whole = case.spec.inp_res and case.spec.inp_res < 512 and case.spec.range_mode != "dynamic"
    of_torch = plain.converted

    def converted(x, r, spec, codes=False):
        out = of_torch(x, r, spec, codes)
        return out if whole or r is None else out.to(dtype).double()

    with (
        mock.patch.object(plain, "modified_weight", return_value=held),
        mock.patch.object(plain, "converted", converted),
    ):
        yield


def needs_of(case, d):
    return [True, True, case.bias, d.input_range is not None, d.clip is not None]


def run(implementation, case, d):
    """Outputs and gradients by name."""
    site, needs = d.inputs(), needs_of(case, d)
    y, *kept = implementation.forward(site, case.spec)
    gradients = implementation.backward(d.grad, site, *kept, needs, case.spec)
    named = {f"gradient of {name}": t for name, t in gradients._asdict().items()}
    return {"output": y} | {n: t for n, t in named.items() if t.numel() or not y.numel()}


def oracle(case, d, dtype):
    """What a case gives in float64, and by torch in the kernels' own precision."""
    on_cpu = d.to(None, "cpu")
    with philox_on_the_cpu():
        same = run(plain, case, on_cpu)
        with operands_of_the_kernels(case, d, dtype):
            exact = run(plain, case, on_cpu.to(torch.float64))
    return exact, same


def assert_as_good(found, exact, same, dtype):
    """At most twice the error of torch in the same precision, or one unit in the last place.

    The gradient of a range sums gradients at inputs, which are of x's dtype: it is off by the last
    place of those.
    """
    assert found.keys() == exact.keys()
    for name, value in found.items():
        want = exact[name]
        assert value.shape == want.shape, name
        assert value.dtype == same[name].dtype, name
        if not want.numel():
            continue
        largest = float(want.abs().max())
        eps = torch.finfo(value.dtype).eps
        if name == "gradient of input_range":
            eps = torch.finfo(dtype).eps
            if (summed := exact["gradient of x"]).numel():
                largest = max(largest, float(summed.abs().max()))
        unit = eps * largest
        of_torch = float((same[name].double() - want).abs().max())
        error = float((value.cpu().double() - want).abs().max())
        assert error <= max(2 * of_torch, 4 * unit if dtype == torch.float32 else unit), (
            f"{name}: {error:.2g}, torch {of_torch:.2g}, largest {largest:.2g}"
        )
