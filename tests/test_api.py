import copy
import io
import json
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from samples import (
    COARSE,
    CONFIGS,
    EVERYTHING,
    IDENTITY,
    MLP,
    TILES,
    Deep,
    analog_names,
    merged,
    mlp,
    product,
    statuses,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import analogfx
from analogfx import recipes
from analogfx.errors import CaptureError, PlacementError
from analogfx.modules import plan
from analogfx.passes import pipeline

pytestmark = pytest.mark.usefixtures("one_thread")


# ----------------------------------------------------------------------------- what is preserved


def test_the_module_tree_and_the_names_stay():
    digital = mlp()
    analog = analogfx.analogize(digital, COARSE)
    assert type(analog) is MLP and isinstance(analog.first, nn.Linear)
    assert [n for n, _ in analog.named_modules()] == [n for n, _ in digital.named_modules()]
    assert set(dict(digital.named_parameters())) < set(dict(analog.named_parameters()))
    assert not analog_names(digital), "the given model is untouched"
    for name, parameter in digital.named_parameters():
        twin = analog.get_parameter(name)
        assert torch.equal(twin, parameter) and twin.data_ptr() != parameter.data_ptr()


@pytest.mark.parametrize("inplace", [False, True])
def test_frozen_parameters_modes_and_attributes_stay(inplace):
    digital = mlp()
    digital.first.weight.requires_grad_(False)
    digital.first.eval()
    digital.first.note = "mine"
    analog = analogfx.analogize(digital, EVERYTHING, inplace=inplace)
    assert (analog is digital) is inplace
    assert not analog.first.weight.requires_grad and analog.second.weight.requires_grad
    assert (analog.training, analog.first.training, analog.second.training) == (True, False, True)
    assert analog.first.note == "mine"


def test_an_eval_model_is_evaluated_without_noise():
    analog = analogfx.analogize(mlp().eval(), EVERYTHING)
    x = torch.randn(4, 8)
    assert torch.equal(analog(x), analog(x))
    assert not torch.equal(analog.train()(x), analog(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_stay_and_run(inplace):
    digital, ran = mlp(), []
    digital.first.register_forward_pre_hook(lambda *_: ran.append("pre"))
    digital.first.register_forward_hook(lambda *_: ran.append("forward"))
    digital.first.register_full_backward_hook(lambda *_: ran.append("backward"))
    digital.first.register_state_dict_pre_hook(lambda *_: ran.append("state"))
    if inplace:  # a copy of a parameter has never had its hooks
        digital.first.weight.register_hook(lambda grad: ran.append("weight"))
        digital.first.weight.register_post_accumulate_grad_hook(lambda p: ran.append("post"))
    analog = analogfx.analogize(digital, EVERYTHING, inplace=inplace)
    analog(torch.randn(4, 8, requires_grad=True)).sum().backward()
    analog.state_dict()
    own = {"weight", "post"} if inplace else set()
    assert set(ran) == {"pre", "forward", "backward", "state"} | own


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_stay(dtype):
    analog = analogfx.analogize(mlp().to(dtype), EVERYTHING)
    assert {p.dtype for n, p in analog.named_parameters() if n.endswith(("weight", "bias"))} == {
        dtype
    }
    assert analog(torch.randn(3, 8, dtype=dtype)).dtype == dtype


def test_shared_modules_stay_shared():
    layer = nn.Linear(6, 6)
    digital = nn.Sequential(layer, nn.ReLU(), layer)
    analog = analogfx.analogize(digital, EVERYTHING)
    assert analog[0] is analog[2]
    assert len(analogfx.report(analog).sites) == 1
    analog(torch.randn(2, 6))
    assert analog[0].input_range_update_idx == 2  # fed twice


def test_tied_weights_stay_tied():
    digital = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 5, bias=False))
    digital[1].weight = digital[0].weight
    analog = analogfx.analogize(digital, EVERYTHING)
    assert analog[1].weight is analog[0].weight
    assert analogfx.to_digital(analog)[1].weight is not digital[1].weight


def test_inplace_copies_no_weight():
    digital = mlp()
    addresses = {name: p.data_ptr() for name, p in digital.named_parameters()}
    analogfx.analogize(digital, EVERYTHING, inplace=True)
    assert {name: digital.get_parameter(name).data_ptr() for name in addresses} == addresses


PEAK = """
import resource, sys, torch
import analogfx
from analogfx import recipes

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

analogfx.analogize(torch.nn.Linear(4, 4), recipes.afm())
model = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096, bias=False) for _ in range(6)))
size = sum(p.numel() * 4 for p in model.parameters())
before = peak()
analogfx.analogize(model, recipes.afm(), inplace=True)
raise SystemExit(f"{peak() - before} bytes more" if peak() - before > size / 20 else 0)
"""


@pytest.mark.skipif(__import__("sys").platform != "linux", reason="measures memory as Linux does")
def test_inplace_needs_no_memory_to_speak_of():
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", PEAK], check=True, timeout=120)


def test_the_config_is_neither_changed_nor_kept():
    config = recipes.afm()
    before = config.to_dict()
    analog = analogfx.analogize(mlp(), config)
    assert config.to_dict() == before
    config.forward.inp_res = 2
    assert analog.first._analog.config.forward.inp_res == 254
    analog.first._analog.config.forward.inp_res = 3
    assert analog.second._analog.config.forward.inp_res == 254


def test_torchs_generator_is_not_advanced():
    state = torch.get_rng_state()
    analogfx.analogize(mlp(), EVERYTHING)
    assert torch.equal(state, torch.get_rng_state())


# -------------------------------------------------------------------------------- saving, loading


def saved_and_loaded(value, **options):
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, **options)


def test_the_state_dict_is_plain_tensors_for_torchs_safe_default():
    analog = analogfx.analogize(mlp(), EVERYTHING)
    state = saved_and_loaded(analog.state_dict())
    fresh = analogfx.analogize(mlp(seed=3), EVERYTHING)
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.state_dict(), analog.state_dict(), rtol=0, atol=0)


def test_the_whole_model_is_saved_with_its_report():
    analog = analogfx.analogize(mlp(), merged(EVERYTHING, TILES))
    loaded = saved_and_loaded(analog, weights_only=False)
    x = torch.randn(3, 8)
    outputs = []
    for model in (analog, loaded):
        torch.manual_seed(0)
        outputs.append(model(x))
    assert torch.equal(*outputs)
    assert str(analogfx.report(loaded)) == str(analogfx.report(analog))
    assert type(analogfx.to_digital(loaded).first) is nn.Linear


def test_ties_survive_saving_the_model():
    digital = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    digital[1].weight = digital[0].weight
    loaded = saved_and_loaded(analogfx.analogize(digital, EVERYTHING), weights_only=False)
    assert loaded[1].weight is loaded[0].weight


@pytest.mark.parametrize("path", ["", "first"])
def test_an_analog_model_is_refused(path):
    analog = analogfx.analogize(mlp(), COARSE)
    model = nn.Sequential(analog) if path == "" else analog
    with pytest.raises(CaptureError, match=r"first is analog already: pass the digital model"):
        analogfx.analogize(model, COARSE)


# ------------------------------------------------------------------------------ what is found


class Functional(nn.Module):
    """Attention with its projections written as functions."""

    def __init__(self, width=8):
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3 * width, width) / 3)
        self.out = nn.Parameter(torch.randn(width, width) / 3)
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x):
        wq, wk, wv = self.qkv.chunk(3)
        q, k, v = F.linear(x, wq), x @ wk.t(), torch.einsum("bti,oi->bto", x, wv)
        attention = torch.softmax(q @ k.mT, dim=-1)
        return torch.matmul(attention @ v, self.out) + self.bias


def test_functional_products_of_several_parameters():
    torch.manual_seed(0)
    digital = Functional()
    analog = analogfx.analogize(digital, EVERYTHING, strict=True)
    sites = analogfx.report(analog).sites
    assert [(s.name, s.kind) for s in sites] == [
        ("qkv", "linear"), ("qkv", "matmul"), ("qkv", "einsum"), ("out", "matmul"),
    ]  # fmt: skip
    assert {"qkv_input_range", "qkv_2_input_range", "qkv_3_input_range", "out_input_range"} <= set(
        analog.state_dict()
    )
    x = torch.randn(2, 5, 8)
    analog(x).sum().backward()
    assert all(p.grad is not None for p in analog.parameters())
    identity = analogfx.analogize(digital, IDENTITY)
    torch.testing.assert_close(identity(x), digital(x))


class WhisperLinear(nn.Linear):
    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


@pytest.mark.parametrize("bias", [True, False])
def test_a_subclass_that_casts_its_weight_to_the_inputs_dtype(bias):
    analog = analogfx.analogize(WhisperLinear(6, 4, bias=bias), EVERYTHING, strict=True)
    y = analog(torch.randn(3, 6, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert analog.weight.grad.dtype == torch.float32 and analog.weight.grad.any()
    analogfx.clip_weights(analogfx.analogize(WhisperLinear(6, 4), recipes.afm()))


PARAMETRIZED = {
    "weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "spectral_norm": torch.nn.utils.parametrizations.spectral_norm,
    "orthogonal": torch.nn.utils.parametrizations.orthogonal,
}


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrized_layers(name):
    torch.manual_seed(0)
    digital = nn.Sequential(PARAMETRIZED[name](nn.Linear(6, 4)))
    before = copy.deepcopy(digital.state_dict())
    analog = analogfx.analogize(digital, CONFIGS["learned clip"], strict=True)
    torch.testing.assert_close(digital.state_dict(), before, rtol=0, atol=0)
    analog(torch.randn(5, 6)).square().sum().backward()
    assert all(p.grad is not None for p in analog.parameters())
    back, x = analogfx.to_digital(analog).eval(), torch.randn(3, 6)
    twin = analogfx.analogize(back, IDENTITY)
    torch.testing.assert_close(twin(x), back(x))


def test_untraceable_products_are_reported_and_strict_refuses_them():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else x @ self.w

    digital = Gated()
    analog = analogfx.analogize(digital, COARSE)
    assert statuses(analog) == {"w": "digital", "inner": "analog"}
    site = analogfx.report(analog).sites[0]
    assert "cannot be traced" in site.reason and site.decided_by == "capture"
    with pytest.raises(PlacementError, match=r"w +Gated +4x4 +forward cannot be traced"):
        analogfx.analogize(digital, COARSE, strict=True, inplace=True)
    assert not analog_names(digital)


def test_a_product_of_one_mode_alone_stays_digital():
    module = product(lambda self, x: x @ self.a @ self.b if self.training else x @ self.a,
                     a=(4, 4), b=(4, 4))  # fmt: skip
    analog = analogfx.analogize(module, COARSE)
    assert not analog_names(analog)
    assert {s.reason for s in analogfx.report(analog).sites} == {
        "the forward multiplies by ['a', 'b'] or by ['a'], as its mode, arguments or attributes say"
    }


def test_forwards_that_no_graph_can_stand_for_keep_their_behaviour():
    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            self.last = x
            return x @ self.w

    class Splat(Recorder):
        def forward(self, *xs):
            return xs[0] @ self.w

    overridden = nn.Linear(4, 4)
    overridden.forward = lambda x: -x
    analog = analogfx.analogize(nn.Sequential(Recorder(), Splat(), overridden), COARSE)
    assert {s.name: s.reason for s in analogfx.report(analog).sites} == {
        "0.w": "forward assigns to self.last",
        "1.w": "forward passes *args or **kwargs on, which differ from call to call",
        "2.weight": "forward is overridden on the instance, so its class does not run",
    }
    x = torch.randn(2, 4)
    assert torch.equal(analog(x), -(x @ analog[0].w @ analog[1].w))
    assert analog[0].last is x


def test_two_modules_share_a_graph_only_if_their_code_would_bake_in_the_same():
    class Scaled(nn.Module):
        def __init__(self, factor, p):
            super().__init__()
            self.w, self.factor, self.drop = nn.Parameter(torch.ones(4, 4)), factor, nn.Dropout(p)

        def forward(self, x):
            return F.linear(x, self.w) * self.factor * self.drop.p

    digital = nn.ModuleList([Scaled(2, 0.5), Scaled(2, 0.5), Scaled(3, 0.5), Scaled(2, 0.25)])
    analog = analogfx.analogize(digital, IDENTITY)
    x = torch.randn(2, 4)
    for own, other in zip(analog, digital, strict=True):
        assert torch.equal(own(x), other(x))
    programs = [next(iter(m._analog.programs.values())) for m in analog]
    assert programs[0] is programs[1]
    assert len({id(p) for p in programs}) == 3


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_scripted_modules_stay_digital_and_are_reported():
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 4))
    analog = analogfx.analogize(model, COARSE, inplace=True)
    assert statuses(analog) == {"0.weight": "digital", "1": "analog"}
    assert analog(torch.randn(2, 4)).shape == (2, 4)


CLOSED = {
    "nn.LazyLinear": (lambda: nn.LazyLinear(4), {"weight", "bias"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSED)
def test_closed_layers_stay_digital_and_the_report_says_so(name):
    make, names = CLOSED[name]
    digital = make()
    analog = analogfx.analogize(digital, COARSE)
    sites = analogfx.report(analog).sites
    assert {s.name for s in sites} == names
    assert all(s.status == "digital" and not s.asked and len(s.reason) > 20 for s in sites)
    assert analogfx.report(analog).coverage == 0.0
    with pytest.raises(PlacementError):
        analogfx.analogize(digital, COARSE, strict=True)
    analogfx.analogize(digital, {"*": None}, strict=True)  # asked for


def test_a_closed_layer_computes_as_before():
    class Own(nn.LSTM):
        def forward(self, x):
            return super().forward(x)

    torch.manual_seed(0)
    digital = Own(8, 2).eval()
    analog = analogfx.analogize(digital, COARSE)
    x = torch.randn(3, 2, 8)
    assert torch.equal(analog(x)[0], digital(x)[0])


# ------------------------------------------------------------------------------ encoder fast path


def encoder_layer():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def encoder():
    return nn.TransformerEncoder(encoder_layer(), 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("make", [encoder_layer, encoder])
def test_torchs_fused_encoder_does_not_go_around_analog_layers(make, padded):
    digital = make().eval()
    analog = analogfx.analogize(digital, COARSE)
    x = torch.randn(3, 5, 8)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = mask[1, 4:] = padded
    options = {"src_key_padding_mask": mask} if padded else {}
    with torch.no_grad():
        y, of_digital = analog(x, **options), digital(x, **options)
    with torch.enable_grad():
        expected = analog(x, **options)
    kept = ~mask
    torch.testing.assert_close(y[kept], expected[kept])
    assert (y[kept] - of_digital[kept]).abs().max() > 0.05

    back = analogfx.to_digital(analog)
    assert [vars(m).keys() for m in back.modules()] == [vars(m).keys() for m in digital.modules()]
    with torch.no_grad():
        assert torch.equal(back(x, **options)[kept], of_digital[kept])


def test_an_encoder_left_digital_keeps_its_fast_path():
    digital = encoder_layer().eval()
    analog = analogfx.analogize(digital, None)
    assert analog.activation_relu_or_gelu == digital.activation_relu_or_gelu == 1


# ------------------------------------------------------------------------------ model zoo


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        vocab_size=61, n_positions=16, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    ))  # fmt: skip


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
    ))  # fmt: skip


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        image_size=16, patch_size=4,
    ))  # fmt: skip


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    )


TOKENS, IMAGE = torch.arange(14).view(2, 7), torch.randn(2, 3, 16, 16)
MODELS = {
    # name: (makes it, its input, analog products)
    "GPT-2": (gpt2, TOKENS, 9),
    "Llama": (llama, TOKENS, 15),
    "ViT": (vit, IMAGE, 8),
    "ResNet": (resnet, IMAGE, 9),
    "Mixtral": (mixtral, TOKENS, 8),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_product_of_a_model_is_analog(name):
    make, x, count = MODELS[name]
    torch.manual_seed(0)
    digital = make().eval()
    analog = analogfx.analogize(digital, IDENTITY, strict=True)
    placed = analogfx.report(analog)
    assert (len(placed.sites), placed.coverage) == (count, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(analog(x)[0], digital(x)[0], rtol=0, atol=0)

    noisy = analogfx.analogize(digital, EVERYTHING).train()
    noisy(x)[0].square().mean().backward()
    ranges = [p for n, p in noisy.named_parameters() if n.endswith("input_range")]
    assert len(ranges) == count and all(p.grad is not None for p in ranges)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_tied_language_model_stays_tied(make):
    analog = analogfx.analogize(make(), EVERYTHING)
    assert analog.lm_head.weight is analog.get_input_embeddings().weight
    analog.tie_weights()
    assert analog.lm_head.weight is analog.get_input_embeddings().weight
    loss = analog(TOKENS, labels=TOKENS).loss
    loss.backward()
    analogfx.clip_weights(analog)
    assert analog.lm_head.weight is analog.get_input_embeddings().weight


class Looped(nn.Module):
    """Experts in a loop that depends on the data."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.experts = nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x):
        chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for number in chosen.unique():
            rows = chosen == number
            out[rows] = F.linear(x[rows], self.experts[number])
        return out


def test_experts_in_a_loop_of_ones_own_stay_digital_and_are_reported():
    digital, x = Looped(), torch.randn(5, 6)
    analog = analogfx.analogize(digital, IDENTITY)
    placed = analogfx.report(analog)
    (left,) = (s for s in placed.sites if s.status == "digital")
    assert left.name == "experts" and "cannot be traced" in left.reason
    assert 0.1 < placed.coverage < 0.2
    with torch.no_grad():
        assert torch.equal(analog(x), digital(x))


def test_a_language_model_generates():
    analog = analogfx.analogize(gpt2().eval(), COARSE)
    out = analog.generate(TOKENS[:1, :3], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 7)


def test_a_deep_model_is_analogized_in_seconds_from_few_graphs(monkeypatch):
    built = []
    build = plan.build_or_run
    monkeypatch.setattr(plan, "build_or_run", lambda *args: built.append(args) or build(*args))
    model = Deep(100, width=8)  # 201 layers
    start = time.perf_counter()
    analog = analogfx.analogize(model, recipes.afm(), inplace=True)
    assert time.perf_counter() - start < 5
    assert len(analog_names(analog)) == 201
    assert len(built) == 2  # one signature, two modes


def test_debug_dir_holds_the_graph_after_every_pass(tmp_path):
    analogfx.analogize(mlp(), EVERYTHING, debug_dir=tmp_path / "graphs")
    files = sorted(str(p.relative_to(tmp_path / "graphs")) for p in tmp_path.rglob("*.py"))
    passes = pipeline.EXPLICIT + pipeline.FUSED
    names = ["capture", *(step.__name__ for step in passes)]
    steps = [f"{number:02d}_{name}" for number, name in enumerate(names)]
    kinds = ["first.eval", "first.train", "second.eval", "second.train"]
    assert files == [f"{kind}/{step}.py" for kind in kinds for step in steps]
    text = (tmp_path / "graphs/first.train/08_lower.py").read_text()
    assert text.startswith("# after lower: 1 changed") and "analog_linear" in text
    for path in tmp_path.rglob("*.py"):
        compile(path.read_text(), str(path), "exec")


@pytest.mark.parametrize("model", [nn.Identity(), nn.Sequential(), nn.LayerNorm(4)])
def test_a_model_without_products(model):
    analog = analogfx.analogize(model, recipes.afm(), strict=True)
    assert analogfx.report(analog).sites == () and analogfx.report(analog).coverage == 1.0


def test_a_model_that_is_one_layer():
    analog = analogfx.analogize(nn.Linear(4, 3), EVERYTHING)
    assert [s.name for s in analogfx.report(analog).sites] == ["weight"]
    assert type(analogfx.to_digital(analog)) is nn.Linear


# ------------------------------------------------------------------------------- the way back


@pytest.mark.parametrize("inplace", [False, True])
def test_to_digital_gives_everything_back(inplace):
    digital = mlp()
    analog = analogfx.analogize(digital, merged(EVERYTHING, TILES))
    analog(torch.randn(4, 8)).sum().backward()
    back = analogfx.to_digital(analog, inplace=inplace)
    assert (back is analog) is inplace
    assert bool(analog_names(analog)) is not inplace
    assert [type(m) for m in back.modules()] == [type(m) for m in digital.modules()]
    assert [vars(m).keys() for m in back.modules()] == [vars(m).keys() for m in digital.modules()]
    torch.testing.assert_close(back.state_dict(), digital.state_dict(), rtol=0, atol=0)
    with pytest.raises(PlacementError):
        analogfx.report(back)
    again = analogfx.analogize(back, EVERYTHING)
    assert analogfx.report(again).coverage == 1.0


def test_an_analog_model_is_freed():
    analog = analogfx.analogize(mlp(), EVERYTHING)
    analog(torch.randn(2, 8))
    gone = weakref.ref(analog.first.weight)
    del analog
    __import__("gc").collect()
    assert gone() is None


# ---------------------------------------------------------------------------------- exactness


def test_with_everything_off_the_model_is_the_digital_one_to_the_bit():
    digital = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2, padding_mode="reflect", padding=1),
        nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3, bias=False),
    )  # fmt: skip
    analog = analogfx.analogize(digital, analogfx.TorchInferenceRPUConfig())
    x = torch.randn(5, 2, 4, 4)
    assert torch.equal(analog(x), digital(x))
    for model in (analog, digital):
        model(x).square().sum().backward()
    for own, other in zip(analog.parameters(), digital.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_bit_identical_after_a_forward_and_a_backward(name):
    analog = analogfx.analogize(mlp(), merged(CONFIGS[name], TILES))
    ranges = {"input_range"}
    kept = {
        n: p.detach().clone()
        for n, p in analog.named_parameters()
        if n.rpartition(".")[2] not in ranges
    }
    analog(torch.randn(4, 8)).square().sum().backward()
    analog.eval()(torch.randn(4, 8))
    for parameter, before in kept.items():
        assert torch.equal(analog.get_parameter(parameter), before)


# ------------------------------------------------------------------------------------ training


def train(
    model,
    steps,
    make_optimizer=lambda p: torch.optim.SGD(p, 0.05),
    autocast=None,
    dtype=torch.float32,
):
    torch.manual_seed(7)
    optimizer = make_optimizer(model.parameters())
    generator, losses = torch.Generator().manual_seed(2), []
    x = torch.randn(64, 8, generator=generator).to(dtype)
    target = torch.randn(8, 4, generator=generator).to(dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = (model(x) - x @ target).float().square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_torchs_seed_reproduces_a_run_bit_for_bit():
    runs = []
    for _ in range(2):
        analog = analogfx.analogize(mlp(), merged(EVERYTHING, TILES))
        losses = train(analog, 3)
        runs.append((losses, analog.state_dict()))
    assert runs[0][0] == runs[1][0]
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=0, atol=0)
    analog = analogfx.analogize(mlp(), merged(EVERYTHING, TILES))
    torch.manual_seed(8)
    assert not torch.equal(analog(torch.ones(2, 8)), analog(torch.ones(2, 8)))


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
def test_training_lowers_the_loss(dtype, autocast):
    analog = analogfx.analogize(mlp(hidden=16).to(dtype), recipes.afm())
    losses = train(analog, 40, autocast=autocast, dtype=dtype)
    assert losses[-1] < 0.7 * losses[0]
    assert analog.first.input_range_update_idx == 40
    assert analog.first.input_range.dtype == torch.float32


def test_an_average_of_the_weights_by_deepcopy():
    analog = analogfx.analogize(mlp(), EVERYTHING)
    average = torch.optim.swa_utils.AveragedModel(analog)
    train(analog, 2)
    average.update_parameters(analog)
    assert average.module.first.weight.equal(analog.first.weight)
    average(torch.randn(2, 8))


class Checkpointed(nn.Module):
    def __init__(self, model, use_reentrant):
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, x):
        if self.use_reentrant is None:
            return self.model(x)
        return checkpoint(self.model, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize(
    "name", ["everything", "everything, dynamic", "fast", "learned clip, discrete"]
)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(use_reentrant, name):
    results = []
    for mode in (None, use_reentrant):
        analog = analogfx.analogize(mlp(), merged(CONFIGS[name], TILES))
        model = Checkpointed(analog, mode)
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(4)
        outputs = []
        for _ in range(2):
            y = model(x)
            y.square().sum().backward()
            outputs.append(y.detach())
        grads = {n: p.grad for n, p in analog.named_parameters()}
        results.append((outputs, x.grad, grads, analog.state_dict()))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    counts = [v for n, v in results[1][3].items() if n.endswith("update_idx")]
    assert all((count == 2).all() for count in counts)


def test_report_is_ready_for_json():
    analog = analogfx.analogize(gpt2(), COARSE)
    assert json.loads(json.dumps(analogfx.report(analog).to_dict()))["coverage"] == 1.0


def test_a_model_without_an_analog_product_is_a_warning():
    with pytest.warns(UserWarning, match="no product of ReLU became analog: it has none"):
        analogfx.analogize(torch.nn.ReLU(), analogfx.TorchInferenceRPUConfig())
    left = torch.nn.Sequential(torch.nn.Linear(2, 2))
    analogfx.analogize(left, {"*": None})  # was asked for
