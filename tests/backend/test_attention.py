import pytest
import torch
from compiled import QUIET, assert_same, compiled, evaluated, ranges, report_of, step
from samples import IDENTITY
from torch import nn

import analogfx
from analogfx.backend.attention import expand_attention

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
    twin = compiled(model, IDENTITY)
    outputs = []
    for run in (model, twin):
        torch.manual_seed(1)
        outputs.append(CALLS[call](run))
    assert_same(outputs[1], outputs[0], exact=False)
    hinted = call == "causal" and "add_bias_kv" in options  # which torch computes another way
    assert analogfx.report(twin).coverage == (0 if hinted else 1)


def test_projections_of_their_own_widths():
    model = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
    twin = compiled(model, IDENTITY)
    inputs = torch.randn(2, 5, 8), torch.randn(2, 3, 6), torch.randn(2, 3, 4)
    assert_same(twin(*inputs), model(*inputs), exact=False)
    assert {n: s for n, (s, _) in report_of(twin).items()} == dict.fromkeys(
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"], "analog"
    )


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
    twin = compiled(encoder(), QUIET)
    x = torch.randn(3, 5, 8)
    step(twin, x, 0)
    before = ranges(twin)
    assert {n.removesuffix(".input_range") for n in before if n.endswith("input_range")} == {
        "self_attn", "self_attn.out_proj", "linear1", "linear2",
    }  # fmt: skip
    fused = evaluated(twin, x)
    assert_same(ranges(twin), before)
    assert_same(fused, twin(x).detach(), exact=False)


def test_other_graphs_are_left_alone():
    assert expand_attention(torch.fx.symbolic_trace(nn.Linear(2, 2)).graph) == 0
