import pytest
import torch
from torch import nn

import analogfx


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (torch.eye(4).to_sparse(), r"found sparse_coo: call .to_dense\(\)"),
        (torch.eye(4).to_mkldnn(), r"found _mkldnn: call .to_dense\(\)"),
        (
            torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged),
            r"found a nested one: call .to_padded_tensor",
        ),
        (torch.ones(3, 4, dtype=torch.int64), "found a torch.int64 tensor"),
    ],
    ids=["sparse", "mkldnn", "nested", "integers"],
)
@pytest.mark.parametrize("training", [False, True])
def test_what_is_not_a_dense_float_tensor_is_refused_by_name(training, x, found):
    model = nn.Sequential(nn.Linear(4, 3))
    analog = analogfx.analogize(model, analogfx.recipes.afm()).train(training)
    with pytest.raises(TypeError, match=f"^0: expected a .*{found}"):
        analog(x)
