"""Convolutions against Lightning's own, and where it has none, against its linear on patches."""

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from oracle import (
    BINARY_RESOLUTIONS,
    DTYPES,
    RANGE_MODES,
    Tally,
    Twins,
    assert_equal,
    configs,
    divides_zero,
    draws_of,
    feeding,
    lightning_layer,
    randomize,
    steps,
    values,
)
from torch import nn

import analogfx
from analogfx.config import as_config

# Configs are drawn: 8 steps are meant.
pytestmark = pytest.mark.filterwarnings("ignore:forward[.].*_res = .* is a quantizer of")

EXAMPLES = 250
"""Configurations for each number of spatial axes."""
FOREIGN_EXAMPLES = 60
"""Those of them that Lightning itself refuses."""

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def geometries(draw, dims):
    """Kernel, stride, padding and dilation that Lightning takes, and an image that they fit."""
    most = {1: 5, 2: 3, 3: 2}[dims]

    def per_axis(low, high):
        return draw(st.tuples(*[st.integers(low, high)] * dims))

    kernel, stride, padding = per_axis(1, most), per_axis(1, 2), per_axis(0, 2)
    dilation = per_axis(1, 2) if dims == 2 else (1,) * dims
    image = tuple(
        max(1, d * (k - 1) + 1 - 2 * p) + extra
        for k, p, d, extra in zip(kernel, padding, dilation, per_axis(0, 4), strict=True)
    )
    return {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
    }, image


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dims", KINDS)
def test_three_steps(dims):
    tally = Tally()

    @settings(max_examples=EXAMPLES)
    @given(st.data())
    def compare(data):
        channels, outputs = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
        window, image = data.draw(geometries(dims))
        dtype, bias = data.draw(DTYPES), data.draw(st.booleans())
        digital = KINDS[dims](channels, outputs, **window, bias=bias, dtype=dtype)
        patch = digital.weight[0].numel()
        mode = data.draw(st.sampled_from(RANGE_MODES))
        # Statistics over patches that are never made may differ from Lightning's in the last bit.
        config = data.draw(configs(mode, patch, out_res=BINARY_RESOLUTIONS))
        dead_row = data.draw(st.booleans()) and not divides_zero(config)
        randomize(digital, data.draw(st.integers(0, 99)), dead_row)
        twins = Twins(digital, config, tally, explicit=data.draw(st.booleans()))

        batch = data.draw(st.sampled_from([(), (1,), (3,)]))
        shape = (*batch, channels, *image)
        out = digital(torch.zeros(shape, dtype=dtype)).shape
        for step in data.draw(steps(shape, out, dtype, config)):
            twins.step(step)
            if not twins.within_domain():
                event("left Lightning's domain")
                break

    compare()
    assert tally.configurations >= EXAMPLES
    assert tally.tied <= 0.01 * tally.steps


@st.composite
def foreign_convolutions(draw, dims):
    """Digital convolutions of the kinds that Lightning refuses, and an image for them."""
    groups = draw(st.integers(1, 3))
    channels, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    kernel, dilation = (draw(st.tuples(*[st.integers(1, n)] * dims)) for n in (3 - dims // 3, 2))
    padding = draw(st.sampled_from(["same", "valid", *range(3)]))
    # Torch pads "same" only at stride 1, and reflects at most all but one pixel of an image.
    stride = 1 if padding == "same" else draw(st.integers(1, 2))
    image = [5 + draw(st.integers(0, 2)) for _ in range(dims)]
    digital = KINDS[dims](
        channels,
        outputs,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=torch.float64,
    )
    return randomize(digital, draw(st.integers(0, 99)), dead_row=False), image


def patches(digital, x, group):
    """Patches of one group's channels as rows: what a convolution with the identity gives."""
    size = digital.weight[0].numel()
    kernel = torch.eye(size, dtype=x.dtype).view(size, *digital.weight.shape[1:])
    cut = type(digital)(
        digital.in_channels // digital.groups,
        size,
        digital.kernel_size,
        digital.stride,
        digital.padding,
        digital.dilation,
        1,
        False,
        digital.padding_mode,
        dtype=x.dtype,
    )
    cut.weight = nn.Parameter(kernel, requires_grad=False)
    return cut(x.chunk(digital.groups, dim=1)[group]).flatten(2).mT


class LinearOnPatches(nn.Module):
    """Lightning's linear layers, one for each group of a convolution, on its patches."""

    def __init__(self, digital, config):
        super().__init__()
        self.digital = digital
        rows = digital.out_channels // digital.groups
        self.rows = [slice(g * rows, (g + 1) * rows) for g in range(digital.groups)]
        self.layers = nn.ModuleList(self._layer(rows, config) for rows in self.rows)

    def _layer(self, rows, config):
        matrix = self.digital.weight.detach().flatten(1)[rows]
        bias = None if self.digital.bias is None else self.digital.bias.detach()[rows]
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias is not None, dtype=matrix.dtype)
        linear.weight.data = matrix
        if bias is not None:
            linear.bias.data = bias
        return lightning_layer(linear, config)

    def forward(self, x, seed):
        outputs = []
        for group, (layer, rows) in enumerate(zip(self.layers, self.rows, strict=True)):
            inputs = patches(self.digital, x, group)
            shape = torch.Size([*inputs.shape[:2], self.digital.out_channels])
            with feeding(draws_of(layer, seed, shape, x.dtype, rows), x.dtype):
                outputs.append(layer(inputs))
        return torch.cat(outputs, dim=-1).mT

    def gradients(self):
        """Gradients by name, put together as those of one layer."""
        groups = [dict(layer.named_parameters()) for layer in self.layers]
        return {
            name: self._joined(name, [group[name].grad for group in groups]) for name in groups[0]
        }

    def _joined(self, name, gradients):
        if gradients[0] is None:
            return None
        if name == "input_range":  # the groups share it
            return sum(gradients)
        if name == "learnable_weight_clip":
            # LSQ divides by the root of the number of weights: a group's here, the site's there.
            return torch.cat(gradients, dim=1) / self.digital.groups**0.5
        return torch.cat(gradients)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dims", KINDS)
def test_what_lightning_lacks(dims):
    """Groups, dilation, string padding and padding modes, against linear layers on patches."""
    tally = Tally()

    @settings(max_examples=FOREIGN_EXAMPLES)
    @given(st.data())
    def compare(data):
        digital, image = data.draw(foreign_convolutions(dims))
        mode = data.draw(st.sampled_from(RANGE_MODES))
        config = data.draw(configs(mode, digital.weight[0].numel()))
        ranges = config.pre_post.input_range
        # A range is shared by the groups here, where there is one each: no statistics, no decay.
        ranges.init_from_data, ranges.decay = 0, 0.0
        own = as_config(config)
        own.mapping.max_output_size = digital.out_channels // digital.groups
        oracle, ours = LinearOnPatches(digital, config), analogfx.analogize(digital, own)

        x = data.draw(values((2, digital.in_channels, *image), torch.float64, ranges.init_value))
        grad = 0.2 * data.draw(values(digital(x).shape, torch.float64, 1.0))
        seed = data.draw(st.integers(0, 2**32 - 1))
        training = data.draw(st.booleans())
        expected_x, actual_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        oracle.train(training)
        expected = oracle(expected_x, seed)
        expected.backward(grad.flatten(2))
        ours.train(training)
        torch.manual_seed(seed)
        actual = ours(actual_x)
        actual.backward(grad)

        assert_equal(actual.flatten(2), expected)
        assert_equal(actual_x.grad, expected_x.grad)
        parameters = dict(ours.named_parameters())
        for name, gradient in oracle.gradients().items():
            assert_equal(parameters[name].grad, gradient)
        tally.configurations += 1

    compare()
    assert tally.configurations >= FOREIGN_EXAMPLES
