import pytest
import torch
from compiled import (
    DYNAMO_CONFIGS,
    QUIET,
    assert_same,
    compiled,
    evaluated,
    ranges,
    report_of,
    step,
    twins,
)
from samples import IDENTITY, merged
from torch import nn

import analogfx

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

X, Y = torch.randn(5, 3, 8), torch.randn(4, 3, 8)
CAUSAL = torch.ones(5, 5).triu(1).bool()
PADDING = torch.tensor([[0, 0, 0, 0, 1], [0] * 5, [0, 0, 0, 1, 1]]).bool()

CALLS = {
    "self": lambda m: m(X, X, X),
    "cross": lambda m: m(X, Y, Y),
    "three inputs": lambda m: m(X, Y, Y * 2),
    "no weights": lambda m: m(X, X, X, need_weights=False),
    "weights of heads": lambda m: m(X, X, X, average_attn_weights=False),
    "padding": lambda m: m(X, X, X, key_padding_mask=PADDING),
    "mask": lambda m: m(X, X, X, attn_mask=CAUSAL),
    "both masks": lambda m: m(X, X, X, attn_mask=CAUSAL, key_padding_mask=PADDING),
    "mask of heads": lambda m: m(X, X, X, attn_mask=torch.ones(6, 5, 5).tril().log()),
    "causal": lambda m: m(X, X, X, attn_mask=CAUSAL, is_causal=True, need_weights=False),
    "no batch": lambda m: m(X[:, 0], X[:, 0], X[:, 0]),
}


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False, "dropout": 0.3}, {"add_bias_kv": True, "add_zero_attn": True}],
    ids=["plain", "without biases", "more keys"],
)
@pytest.mark.parametrize("call", CALLS)
def test_taken_apart_it_is_what_torch_computes(call, options):
    model = nn.MultiheadAttention(8, 2, **options)
    if model.in_proj_bias is not None:
        nn.init.normal_(model.in_proj_bias)
    taken_apart = twins(model, IDENTITY)
    outputs = []
    for run in (model, *taken_apart):
        torch.manual_seed(1)
        outputs.append(CALLS[call](run))
    assert_same(outputs[1], outputs[0], exact=False)
    assert_same(outputs[2], outputs[0], exact=False)
    assert [analogfx.report(twin).coverage for twin in taken_apart] == [1, 1]


def test_projections_of_their_own_widths():
    model = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
    inputs = torch.randn(2, 5, 8), torch.randn(2, 3, 6), torch.randn(2, 3, 4)
    for twin in twins(model, IDENTITY):
        assert_same(twin(*inputs), model(*inputs), exact=False)
        assert {n: s for n, (s, _) in report_of(twin).items()} == dict.fromkeys(
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"], "analog"
        )


@pytest.mark.parametrize("call", ["self", "cross", "three inputs", "no weights"])
def test_both_front_ends_give_the_same_sites_numbers_and_ranges(call):
    model = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    twin, analog = twins(model, DYNAMO_CONFIGS["everything"])
    for seed in range(3):
        results = []
        for run in (twin, analog):
            torch.manual_seed(seed)
            out = CALLS[call](run)[0]
            run.zero_grad()
            out.square().sum().backward()
            results.append([out, *(p.grad for p in model_of(run).parameters() if p.dim() > 1)])
        assert_same(*results)
    assert_same(ranges(twin), ranges(analog))
    assert {n for n in ranges(analog) if n.endswith("input_range")} == {
        "in_proj_weight_input_range", "in_proj_weight_2_input_range",
        "in_proj_weight_3_input_range", "out_proj.input_range",
    }  # fmt: skip
    sites = [
        sorted((s.name, s.kind, s.weight_shape, s.status) for s in analogfx.report(m).sites)
        for m in (twin, analog)
    ]
    assert sites[0] == sites[1]
    for run in (twin, analog):
        run.eval()
    with torch.no_grad():
        assert_same(CALLS[call](twin), CALLS[call](analog))


def model_of(twin):
    return getattr(twin, "_orig_mod", twin)


def turned(run):
    """A call of batches as CALLS has them, where the layer wants them first."""

    def called(*inputs, **options):
        once = {id(x): x.transpose(0, 1) for x in inputs}  # what was one tensor stays one
        return run(*(once[id(x)] for x in inputs), **options)

    return called


PACKED = {"mapping": {"packed_projections": True}}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("call", ["self", "cross", "three inputs", "no weights", "no batch"])
def test_a_packed_weight_is_one_site_where_the_config_says_so(call, batch_first):
    given = nn.MultiheadAttention(8, 2)
    exact = analogfx.analogize(given, merged(IDENTITY, PACKED), strict=True)
    assert_same(CALLS[call](exact), CALLS[call](given), exact=False)

    model = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    twin, analog = twins(model, merged(DYNAMO_CONFIGS["everything"], PACKED))
    for seed in range(2):
        results = []
        for run in (twin, analog):
            called = turned(run) if batch_first and call != "no batch" else run
            torch.manual_seed(seed)
            results.append(CALLS[call](called)[0])
        assert_same(*results)
    assert_same(ranges(twin), ranges(analog))
    assert {n for n in ranges(analog) if n.endswith("input_range")} == {
        "input_range", "out_proj.input_range",
    }  # fmt: skip


def test_a_packed_weight_is_one_site_in_the_fused_encoder_too():
    rules = {"self_attn": merged(QUIET, PACKED), "*": QUIET}
    twin, analog = twins(encoder(), rules)
    x = torch.randn(3, 5, 8)
    assert_same(step(twin, x, 0), step(analog, x, 0), exact=False)
    assert_same(evaluated(twin, x), evaluated(analog, x), exact=False)
    assert_same(ranges(twin), ranges(analog))
    assert "self_attn.input_range" in ranges(twin)


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_masks_of_another_shape_are_refused_as_in_torch(name):
    analog = analogfx.analogize(nn.MultiheadAttention(8, 2), IDENTITY)
    mask = torch.zeros(2, 4).bool()
    with pytest.raises(RuntimeError, match=rf"shape of {name} is \(2, 4\), but"):
        analog(X, X, X, **{name: mask})
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        analog(X, X, X, is_causal=True)
    with pytest.raises(RuntimeError, match=r"attn_mask is \(2, 5, 5\), but should be \(6, 5"):
        analog(X, X, X, attn_mask=torch.zeros(2, 5, 5))


class Static(nn.MultiheadAttention):
    """Attention to keys that are projected already, which has no module in torch."""

    def forward(self, x, keys):
        return nn.functional.multi_head_attention_forward(
            x, x, x, 8, 2, self.in_proj_weight, self.in_proj_bias, None, None, False, 0.0,
            self.out_proj.weight, self.out_proj.bias, static_k=keys, static_v=keys,
        )[0]  # fmt: skip


def test_keys_that_are_projected_leave_it_digital_with_a_reason():
    model, keys = Static(8, 2), torch.randn(6, 4, 4)
    twin = compiled(model, QUIET)
    assert_same(twin(X, keys), model(X, keys))
    assert report_of(twin)["in_proj_weight"] == ("digital", "no tile computes this product")


def encoder(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0, **options)
    nn.init.normal_(layer.self_attn.in_proj_bias)
    return layer


@pytest.mark.parametrize("mask", [None, "src_mask", "src_key_padding_mask", "both"])
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}])
def test_the_fused_encoder_layer_is_the_slow_one(options, mask):
    model = encoder(**options).eval()
    twin = compiled(model, IDENTITY)
    x = torch.randn(3, 5, 8)
    masks = {"src_mask": CAUSAL, "src_key_padding_mask": PADDING}
    given = masks if mask == "both" else {k: v for k, v in masks.items() if k == mask}
    slow = model(x, **given)  # gradients are on
    with torch.no_grad():
        assert_same(twin(x, **given), slow.detach(), exact=False)
    assert analogfx.report(twin).coverage == 1


def test_the_same_products_are_analog_on_every_way_through_an_encoder_layer():
    twin, analog = twins(encoder(), QUIET)
    x = torch.randn(3, 5, 8)
    assert_same(step(twin, x, 0), step(analog, x, 0), exact=False)
    before = ranges(twin)
    assert_same(before, ranges(analog))
    fused = evaluated(twin, x)
    assert_same(ranges(twin), before)
    assert_same(fused, twin(x).detach(), exact=False)
    assert_same(fused, evaluated(analog, x), exact=False)


@pytest.mark.parametrize("mask", [None, "attn_mask", "key_padding_mask", "both"])
def test_the_fused_attention_is_the_slow_one(mask):
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    twin = compiled(model, IDENTITY)
    x = torch.randn(3, 5, 8)
    masks = {"attn_mask": CAUSAL, "key_padding_mask": PADDING}
    given = masks if mask == "both" else {k: v for k, v in masks.items() if k == mask}
    slow = model(x, x, x, **given)  # gradients are on
    with torch.no_grad():
        assert_same(twin(x, x, x, **given), slow, exact=False)
    assert analogfx.report(twin).coverage == 1
