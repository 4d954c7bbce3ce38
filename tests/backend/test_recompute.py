import functools

import pytest
import torch
import transformers as hf
from compiled import DYNAMO_CONFIGS, QUIET, assert_same, compiled, evaluated, ranges, step
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import analogfx
from analogfx import versions


class Blocks(nn.Module):
    """Two calls of one block, checkpointed if asked for; ``nested``: a part of it once more."""

    def __init__(self, checkpointed=True, nested=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.options = {"use_reentrant": False} | options
        self.checkpointed, self.nested = checkpointed, nested

    def inner(self, x):
        return torch.relu(self.a(x))

    def block(self, x):
        h = checkpoint(self.inner, x, **self.options) if self.nested else self.inner(x)
        return torch.tanh(self.b(h)), x

    def forward(self, x):
        for _ in range(2):
            run = self.block
            if self.checkpointed:
                run = functools.partial(checkpoint, run, **self.options)
            x, before = run(x)
            x = x + before
        return x


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_a_checkpointed_block_is_the_plain_one(compiler, nested):
    config = DYNAMO_CONFIGS["everything"]
    plain = analogfx.analogize(Blocks(False), config)
    digital = compiled(Blocks(nested=nested), config, compiler, fullgraph=True)
    analog = compiled(analogfx.analogize(Blocks(nested=nested), config), None, compiler)
    x = torch.randn(5, 8)
    for seed in range(2):
        expected = step(plain, x, seed)
        assert_same(step(digital, x, seed), expected, compiler != "inductor")
        assert_same(step(analog, x, seed), expected, compiler != "inductor")
    assert_same(ranges(digital), ranges(plain), exact=False)
    assert_same(evaluated(digital, x), evaluated(plain, x), exact=False)


def saved_numbers(run, rows=64):
    """How many numbers with a row for every sample a compiled function keeps for its backward."""
    node = run(torch.randn(rows, 8, requires_grad=True)).grad_fn
    return sum(t.numel() for t in node.saved_tensors if t.shape[:1] == (rows,))


@pytest.mark.skipif(
    versions.installed("torch") == (2, 11), reason="torch 2.11 does not show what a graph saved"
)
def test_the_backward_computes_it_again():
    config = DYNAMO_CONFIGS["DAC and ADC"]
    plain, checked = (
        saved_numbers(compiled(Blocks(how), config, "inductor")) for how in (False, True)
    )
    digital = saved_numbers(torch.compile(Blocks(True), backend="inductor"))
    assert checked == digital < plain / 2


def test_every_pass_sees_it():
    model = analogfx.analogize(Blocks(), QUIET).eval()
    with torch.no_grad():
        found = analogfx.explain(model, None, torch.randn(5, 8))
    counts = {step.name: step.count for step in found.graphs[0].steps}
    assert counts["freeze"] == 4 and counts["epilogue"] >= 2 and counts["skip_conversion"] == 2


def some(ctx, op, *args, **kwargs):
    return CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.filterwarnings("ignore:.*stays digital")
def test_one_that_chooses_what_to_save_stays_an_op_in_training():
    choose = functools.partial(create_selective_checkpoint_contexts, some)
    twin = compiled(Blocks(context_fn=choose), QUIET, "aot_eager")
    x = torch.randn(5, 8)
    twin(x).sum().backward()
    assert analogfx.report(twin).coverage == 0
    evaluated(twin, x)
    assert analogfx.report(twin).coverage == 1


def test_a_model_of_transformers_with_checkpoints():
    config = hf.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, use_cache=False,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    twin = compiled(model, QUIET)
    twin(torch.randint(0, 40, (2, 6))).logits.sum().backward()
    assert analogfx.report(twin).coverage == 1
