"""What the source of an untraceable forward says: products, and what is none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from analogfx.modules.reads import mentions_product, multiplied


class Base(nn.Module):
    scale = 1
    exact = False

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 4))
        self.v = nn.Parameter(torch.ones(4, 4))
        self.layer = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.several = nn.ParameterList([torch.ones(4, 4)])
        self.logit_scale = nn.Parameter(torch.ones(()))

    def table(self):
        return self.w[:, :2]


def project(x, matrix):
    return x @ matrix.t()


def product_of(layer, x):
    return F.linear(x, layer.weight)


def at(self, x):
    return x @ self.w


def by_name(self, x):
    y = self.w.to(x.dtype).t().contiguous()
    return torch.matmul(x, y)


def by_helper(self, x):
    return project(x, self.w)


def returned(self, x):
    return x @ self.table()


def a_loop(self, x):
    for matrix in self.several:
        x = x.mm(matrix)
    return x


def of_a_child(self, x):
    return F.linear(x, self.layers[0].weight) + F.linear(x, self.layer.weight)


def given_a_child(self, x):
    return product_of(self.layer, x)


def in_a_branch(self, x, mask=None):
    if mask is not None:
        return x @ self.v
    if self.scale > 1 and self.exact:
        return x @ self.v
    return x @ self.w


def to_layers(self, x):
    for _, layer in enumerate(self.layers):
        x = layer(x, self.w) @ x
    return x


def unknown(self, x):
    return self.something.that(x, self.w)


def computed(self, x):
    merged = self.w @ self.v * 2
    return F.linear(x, merged)


def added(self, x):
    return x + self.w


def asked(self, x):
    if isinstance(self.layer.weight, torch.Tensor) and x.dtype != self.layer.weight.dtype:
        x = x.to(self.w.dtype)
    return self.layer(x)


def looked_up(self, x):
    return F.embedding(x, self.w) + x @ x


def added_by_a_method(self, x):
    return x @ x + self.table()


def merged_alone(self, x):
    delta = self.w @ self.v
    return x + delta


def scaled(self, x):
    return x @ x * self.logit_scale.exp()


READ = {
    at: ["w"],
    by_name: ["w"],
    by_helper: ["w"],
    returned: ["w"],
    a_loop: ["several.0"],
    of_a_child: ["layer.weight", "layers.0.weight"],
    in_a_branch: ["w"],
    to_layers: [],
    unknown: ["w"],
    computed: ["w", "v"],
    added: [],
    asked: [],
    looked_up: [],
    added_by_a_method: [],
    merged_alone: [],
    scaled: [],
}


@pytest.mark.parametrize("forward", READ, ids=lambda f: f.__name__)
def test_what_a_forward_may_multiply_by(forward):
    module = type("Read", (Base,), {"forward": forward})()
    assert sorted(multiplied(module, forward, {"mask": None})) == sorted(READ[forward])


def test_a_branch_that_the_module_says_is_taken_is_read():
    module = type("Read", (Base,), {"forward": in_a_branch, "scale": 2, "exact": True})()
    assert [*multiplied(module, in_a_branch, {"mask": None})] == ["v"]
    assert [*multiplied(module, in_a_branch, {})] == ["v"]
    module.exact = False
    assert sorted(multiplied(module, in_a_branch, {})) == ["v", "w"]


def test_code_without_source_counts_whole():
    names: dict = {}
    exec("def forward(self, x):\n    return x @ self.w", names)
    module = type("Read", (Base,), {"forward": names["forward"]})()
    assert [*multiplied(module, names["forward"], {})] == ["w", "v"]


def test_a_decorator_and_a_method_of_a_base_class_are_followed():
    def decorated(function):
        return lambda *args: function(*args)

    class Sub(nn.Linear):
        @decorated
        def forward(self, x):
            return super().forward(x)

    layer = Sub(3, 2)
    assert mentions_product(layer, Sub.forward)
    assert [*multiplied(layer, Sub.forward, {})] == ["weight"]


def a_branch(self, x):
    return F.linear(x, self.layer.weight) if x.sum() > 0 else x


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight.t()


class Looked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x * weight.shape[0]


def multiplied_there(self, x):
    return Times.apply(x, self.layer.weight)


def looked_at_there(self, x):
    return Looked.apply(x, self.layer.weight)


@pytest.mark.parametrize(
    ("forward", "found"), [(multiplied_there, ["layer.weight"]), (looked_at_there, [])]
)
def test_a_function_of_autograd_is_read(forward, found):
    assert [*multiplied(Base(), forward, {})] == found


def a_comprehension(self, inputs):
    return [x @ self.w for x in inputs]


def a_local_function(self, inputs):
    project = inputs.get("project")
    return project(inputs["x"], self.w)


@pytest.mark.parametrize(
    ("forward", "found"),
    [(a_branch, ["layer.weight"]), (a_comprehension, ["w"]), (a_local_function, ["w"])],
)
def test_a_name_of_the_function_is_not_the_global_of_that_name(monkeypatch, forward, found):
    monkeypatch.setitem(globals(), "x", torch.ones(2, 4))  # as a script has it
    monkeypatch.setitem(globals(), "project", F.layer_norm)
    assert [*multiplied(Base(), forward, {})] == found
