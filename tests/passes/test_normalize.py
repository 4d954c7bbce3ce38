import pytest
import torch
import torch.nn.functional as F
from samples import IDENTITY, after, product, run, targets, text
from torch import nn

import analogfx
from analogfx.passes.contract import CONVOLUTIONS
from analogfx.passes.normalize import normalize

W, X = (4, 6), (3, 6)


def in_chunks(self, x):
    first, second = self.w.chunk(2)
    return F.linear(x, first) - F.linear(x, second)


def in_parts(self, x):
    first, second = self.w.split([3, 5])
    return torch.cat([F.linear(x, first), F.linear(x, second)], -1)


SPELLINGS = {
    # name: (forward, shapes of the parameters, shape of the input)
    "linear": (lambda s, x: F.linear(x, s.w), {"w": W}, X),
    "linear with bias": (lambda s, x: F.linear(x, s.w, s.b), {"w": W, "b": (4,)}, X),
    "linear, keywords": (
        lambda s, x: F.linear(input=x, bias=s.b, weight=s.w), {"w": W, "b": (4,)}, X),
    "linear, bias of one": (lambda s, x: F.linear(x, s.w, s.b), {"w": W, "b": (1,)}, X),
    "linear, bias from x": (lambda s, x: F.linear(x, s.w, x.sum(1)[:1].expand(4)), {"w": W}, X),
    "linear of a view": (lambda s, x: F.linear(x, s.w.view(4, 6)), {"w": (24,)}, X),
    "linear of 1-D": (lambda s, x: F.linear(x, s.w, s.b), {"w": W, "b": (4,)}, (6,)),
    "linear of 4-D": (lambda s, x: F.linear(x, s.w), {"w": W}, (2, 1, 3, 6)),
    "linear, cast": (
        lambda s, x: F.linear(x, s.w.to(x.dtype), s.b.to(x.dtype)), {"w": W, "b": (4,)}, X),
    "@": (lambda s, x: x @ s.w, {"w": (6, 4)}, X),
    "@ of 1-D": (lambda s, x: x @ s.w, {"w": (6, 4)}, (6,)),
    "@ t": (lambda s, x: x @ s.w.t(), {"w": W}, X),
    "@ T": (lambda s, x: x @ s.w.T, {"w": W}, X),
    "@ mT": (lambda s, x: x @ s.w.mT, {"w": W}, X),
    "@ transpose": (lambda s, x: x @ s.w.transpose(0, 1), {"w": W}, X),
    "@ permute": (lambda s, x: x @ s.w.permute(1, 0), {"w": W}, X),
    "@ of a cast": (lambda s, x: x @ s.w.to(x.dtype), {"w": (6, 4)}, X),
    "weight @ x": (lambda s, x: s.w @ x, {"w": (4, 3)}, X),
    "weight @ 1-D": (lambda s, x: s.w @ x, {"w": W}, (6,)),
    "weight @ 3-D": (lambda s, x: s.w @ x, {"w": (4, 3)}, (2, 3, 6)),
    "matmul": (lambda s, x: torch.matmul(x, s.w), {"w": (6, 4)}, (2, 3, 6)),
    "matmul, keywords": (lambda s, x: torch.matmul(input=x, other=s.w), {"w": (6, 4)}, X),
    ".matmul": (lambda s, x: x.matmul(s.w), {"w": (6, 4)}, X),
    ".matmul, keyword": (lambda s, x: x.matmul(other=s.w), {"w": (6, 4)}, X),
    "weight.matmul": (lambda s, x: s.w.matmul(x), {"w": (4, 3)}, X),
    "mm": (lambda s, x: torch.mm(x, s.w), {"w": (6, 4)}, X),
    "mm, keywords": (lambda s, x: torch.mm(input=x, mat2=s.w), {"w": (6, 4)}, X),
    ".mm": (lambda s, x: x.mm(s.w), {"w": (6, 4)}, X),
    "addmm": (lambda s, x: torch.addmm(s.b, x, s.w), {"w": (6, 4), "b": (4,)}, X),
    "addmm, bias of one": (lambda s, x: torch.addmm(s.b, x, s.w), {"w": (6, 4), "b": (1,)}, X),
    "addmm, keywords": (
        lambda s, x: torch.addmm(input=s.b, mat1=x, mat2=s.w), {"w": (6, 4), "b": (4,)}, X),
    "addmm, beta, alpha": (
        lambda s, x: torch.addmm(s.b, x, s.w, beta=2, alpha=-0.5), {"w": (6, 4), "b": (4,)}, X),
    "addmm, beta 0": (
        lambda s, x: torch.addmm(torch.full_like(x, float("nan"))[:, :4], x, s.w, beta=0),
        {"w": (6, 4)}, X),
    "addmm, activations": (lambda s, x: torch.addmm(x[:, :4], x, s.w), {"w": (6, 4)}, X),
    ".addmm": (lambda s, x: x[:, :4].addmm(x, s.w, beta=3), {"w": (6, 4)}, X),
    "chunk": (in_chunks, {"w": (8, 6)}, X),
    "split": (in_parts, {"w": (8, 6)}, X),
    "torch.split": (lambda s, x: F.linear(x, torch.split(s.w, 4, dim=0)[1]), {"w": (8, 6)}, X),
    "select": (lambda s, x: F.linear(x, s.w.select(0, 1)), {"w": (3, 4, 6)}, X),
    "index": (lambda s, x: F.linear(x, s.w[1]), {"w": (3, 4, 6)}, X),
    "slice": (lambda s, x: x @ s.w[:, 1:5], {"w": (6, 9)}, X),
    "unbind": (
        lambda s, x: F.linear(F.linear(x, s.w.unbind()[0]), s.w.unbind()[1]), {"w": (2, 6, 6)}, X),
    "masked": (lambda s, x: F.linear(x, s.w * s.mask), {"w": W, "mask": W}, X),
    "einsum": (lambda s, x: torch.einsum("ni,oi->no", x, s.w), {"w": W}, X),
    "einsum, spaces": (lambda s, x: torch.einsum(" n i , o i -> n o ", x, s.w), {"w": W}, X),
    "einsum, weight first": (lambda s, x: torch.einsum("io,ni->no", s.w, x), {"w": (6, 4)}, X),
    "einsum, list": (lambda s, x: torch.einsum("ni,io->no", [x, s.w]), {"w": (6, 4)}, X),
    "einsum, to heads": (
        lambda s, x: torch.einsum("bti,ihd->bhtd", x, s.w), {"w": (6, 2, 4)}, (2, 3, 6)),
    "einsum, from heads": (
        lambda s, x: torch.einsum("bhtd,hdo->bto", x, s.w), {"w": (2, 5, 4)}, (3, 2, 7, 5)),
    "einsum, interleaved": (
        lambda s, x: torch.einsum("hbdt,ohpd->pbot", x, s.w), {"w": (4, 2, 3, 5)}, (2, 3, 5, 7)),
    "einsum, ...": (lambda s, x: torch.einsum("...i,oi->...o", x, s.w), {"w": W}, (2, 5, 3, 6)),
    "einsum, ... permuted": (
        lambda s, x: torch.einsum("...it,iop->...pto", x, s.w), {"w": (6, 4, 2)}, (2, 3, 6, 5)),
    "einsum, ... of nothing": (lambda s, x: torch.einsum("...i,oi->...o", x, s.w), {"w": W}, (6,)),
    "einsum, a vector": (lambda s, x: torch.einsum("ni,i->n", x, s.v), {"v": (6,)}, X),
    "einsum, batch only in x": (
        lambda s, x: torch.einsum("bni,oi->bon", x, s.w), {"w": W}, (2, 3, 6)),
    "conv1d": (lambda s, x: F.conv1d(x, s.w, s.b, 2), {"w": (4, 2, 3), "b": (4,)}, (2, 2, 9)),
    "conv1d, tuples": (
        lambda s, x: F.conv1d(x, s.w, stride=(2,), padding=(1,)), {"w": (4, 2, 3)}, (2, 2, 9)),
    "conv1d same, odd": (
        lambda s, x: F.conv1d(x, s.w, padding="same"), {"w": (4, 2, 3)}, (2, 2, 9)),
    "conv1d same, even": (
        lambda s, x: F.conv1d(x, s.w, padding="same"), {"w": (4, 2, 4)}, (2, 2, 9)),
    "conv1d valid": (lambda s, x: F.conv1d(x, s.w, padding="valid"), {"w": (4, 2, 4)}, (2, 2, 9)),
    "conv1d without batch": (lambda s, x: F.conv1d(x, s.w), {"w": (4, 2, 3)}, (2, 9)),
    "torch.conv1d": (lambda s, x: torch.conv1d(x, s.w), {"w": (4, 2, 3)}, (2, 2, 9)),
    "conv2d": (
        lambda s, x: F.conv2d(x, s.w, dilation=2, padding=(0, 1)), {"w": (4, 2, 3, 2)},
        (2, 2, 6, 5)),
    "conv2d, all by keyword": (
        lambda s, x: F.conv2d(
            input=x, weight=s.w, bias=s.b, stride=1, padding=1, dilation=1, groups=2),
        {"w": (4, 1, 3, 2), "b": (4,)}, (2, 2, 6, 5)),
    "conv2d same, even and dilated": (
        lambda s, x: F.conv2d(x, s.w, padding="same", dilation=(1, 3)), {"w": (4, 2, 4, 2)},
        (2, 2, 6, 5)),
    "torch.conv2d same": (
        lambda s, x: torch.conv2d(x, s.w, padding="same"), {"w": (4, 2, 2, 3)}, (1, 2, 4, 4)),
    "conv2d of a view": (
        lambda s, x: F.conv2d(x, s.w[..., None, None]), {"w": (4, 2)}, (2, 2, 3, 3)),
    "conv3d": (lambda s, x: F.conv3d(x, s.w, groups=2), {"w": (4, 1, 2, 1, 2)}, (2, 2, 3, 3, 3)),
    "torch.conv3d same": (
        lambda s, x: torch.conv3d(x, s.w, padding="same"), {"w": (2, 2, 2, 3, 1)}, (1, 2, 3, 3, 3)),
}  # fmt: skip

# Even kernels with padding="same" make torch's own convolution pad a second time, and say so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.usefixtures("one_thread"),
]


def made(name):
    forward, shapes, x_shape = SPELLINGS[name]
    module = product(forward, **shapes)
    return module, torch.randn(x_shape, dtype=torch.float64)


def canonical(graph):
    """The products of a graph in canonical form."""
    for node in graph.nodes:
        if node.target is F.linear and node.args[1].meta.get("parameter"):
            assert len(node.args) == 3 and not node.kwargs
            yield node
        elif node.target in CONVOLUTIONS:
            assert len(node.args) == 7 and not node.kwargs
            lists, dims = node.args[3:6], CONVOLUTIONS[node.target]
            assert all(isinstance(v, list) and len(v) == dims for v in lists)
            yield node


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_made_canonical_and_computes_the_same(name):
    module, x = made(name)
    graph, _ = after((normalize,), module, IDENTITY)
    products = list(canonical(graph))
    assert len(products) == (2 if name in ("chunk", "split", "unbind") else 1)
    assert not any("decision" in n.meta for n in graph.nodes)
    leftover = {torch.matmul, torch.mm, torch.addmm, torch.einsum, "matmul", "mm", "addmm"}
    assert not leftover & set(targets(graph))
    torch.testing.assert_close(run(graph, module, x), module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_second_run_changes_nothing(name):
    module, _ = made(name)
    graph, context = after((normalize,), module, IDENTITY)
    once = text(graph)
    assert normalize(graph, context) == 0
    assert text(graph) == once


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_analog_product_and_its_gradients_are_those_of_the_spelling(name):
    digital, x = made(name)
    analog = analogfx.analogize(digital, IDENTITY, strict=True)
    sites = analogfx.report(analog).sites
    assert sites and all(site.status == "analog" for site in sites)
    results = []
    for module in (digital, analog):
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        y.square().sum().backward()
        results.append((y, inputs.grad, *(p.grad for p in module.parameters())))
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)


def test_a_canonical_product_is_left_alone():
    module, _ = made("linear with bias")
    graph, context = after((), module, IDENTITY)
    before = text(graph)
    assert normalize(graph, context) == 0
    assert text(graph) == before


def test_a_transposed_weight_is_not_transposed_again():
    module, _ = made("@ t")
    graph, _ = after((normalize,), module, IDENTITY)
    assert "t" not in targets(graph)


REFUSED = {
    # name: (forward, shapes of the parameters, shape of the input, kind, part of the reason)
    "4-D weight": (
        lambda s, x: x @ s.w, {"w": (1, 2, 6, 4)}, (2, 3, 6), "matmul", "4 dimensions"),
    "only the bias": (
        lambda s, x: F.linear(x, x, s.b), {"b": (3,)}, X, "linear", "the weight is not"),
    "addmm on the left": (
        lambda s, x: torch.addmm(s.b, s.w, x), {"w": (4, 3), "b": (6,)}, X, "addmm", "on the left"),
    "kernel is an activation": (
        lambda s, x: F.conv1d(x, x[:, :, :1], s.b), {"b": (2,)}, (2, 2, 5), "conv1d",
        "kernel is not"),
    "cut by the input": (
        lambda s, x: F.linear(x, s.w[: x.shape[0]]), {"w": W}, X, "linear", "input's shape"),
    "cut, then transposed": (
        lambda s, x: x @ s.w[: x.size(0) + 1].t(), {"w": W}, X, "matmul", "input's shape"),
    "einsum, diagonal": (
        lambda s, x: torch.einsum("nii,oi->no", x, s.w), {"w": (4, 3)}, (2, 3, 3), "einsum",
        "twice"),
    "einsum, outer": (
        lambda s, x: torch.einsum("ni,o->nio", x, s.v), {"v": (4,)}, X, "einsum", "contraction"),
    "einsum, ... in the weight": (
        lambda s, x: torch.einsum("ni,...i->n...", x, s.w), {"w": W}, X, "einsum", "..."),
    "einsum, ... inside": (
        lambda s, x: torch.einsum("n...i,oi->n...o", x, s.w), {"w": W}, (2, 3, 6), "einsum", "..."),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_tile_computes_is_refused_with_a_reason_and_computes_the_same(name):
    forward, shapes, x_shape, kind, reason = REFUSED[name]
    module = product(forward, **shapes)
    graph, context = after((normalize,), module, IDENTITY)
    (decision,) = (n.meta["decision"] for n in graph.nodes if "decision" in n.meta)
    assert (decision.status, decision.kind, decision.decided_by) == ("digital", kind, "normalize")
    assert reason in decision.reason
    largest = max(shapes, key=lambda name: torch.Size(shapes[name]).numel())
    assert (decision.name, decision.weight_shape) == (largest, shapes[largest])
    x = torch.randn(x_shape, dtype=torch.float64)
    assert torch.equal(run(graph, module, x), module(x))
    assert normalize(graph, context) == 0


DIGITAL = {
    "activations": (lambda s, x: x @ x.mT, {}),
    "scaling": (lambda s, x: x * s.v, {"v": (6,)}),
    "embedding": (lambda s, x: F.embedding(x.long().abs() % 4, s.w), {"w": W}),
    "weights among themselves": (lambda s, x: x.sum() + (s.w @ s.w.t()).sum(), {"w": W}),
}


@pytest.mark.parametrize("name", DIGITAL)
def test_what_is_no_product_of_an_input_with_a_weight_is_not_listed(name):
    forward, shapes = DIGITAL[name]
    module = product(forward, **shapes)
    graph, _ = after((normalize,), module, IDENTITY)
    assert not any({"decision", "kind"} & n.meta.keys() for n in graph.nodes)


def test_a_product_with_weights_multiplied_among_themselves():
    module = product(lambda s, x: F.linear(x, s.a @ s.b), a=(4, 2), b=(2, 6))
    graph, _ = after((normalize,), module, IDENTITY)
    (node,) = canonical(graph)
    assert node.args[1].meta["stationary"].shape == (4, 6)


def test_side_effects_stay():
    def forward(self, x):
        self.calls.add_(1)
        return x @ self.w

    module = product(forward, w=(6, 4), calls=(), buffers=("calls",))
    graph, _ = after((normalize,), module, IDENTITY)
    before = module.calls.clone()
    run(graph, module, torch.randn(X, dtype=torch.float64))
    assert module.calls == before + 1


def test_gpt2s_layer_is_an_addmm():
    from transformers.pytorch_utils import Conv1D

    layer = nn.Module.double(Conv1D(4, 6))
    graph, _ = after((normalize,), layer, IDENTITY)
    (node,) = canonical(graph)
    assert node.meta["kind"] == "addmm" and node.args[2].target == "bias"
