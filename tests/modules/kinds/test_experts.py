"""The experts of transformers' models, tiny and from config, in all of its implementations."""

import copy

import pytest
import torch
from samples import COARSE, CONFIGS, IDENTITY, merged
from torch.utils._python_dispatch import TorchDispatchMode

import analogfx

hf = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
DEEPSEEK = {
    **FEW, "n_routed_experts": 4, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}  # fmt: skip
FAMILIES = {
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
        "rope_parameters": None},
    "Qwen3Moe": {"num_experts": 4, "head_dim": 8, **FEW},
    "DeepseekV2": DEEPSEEK,
    "DeepseekV3": DEEPSEEK,
    "NemotronH": {
        "n_routed_experts": 4, **FEW, "moe_shared_expert_intermediate_size": 12, "n_group": 1,
        "topk_group": 1, "head_dim": 8,
        "layers_block_type": ["moe", "attention"]},
    "Llama4": {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8,
        "intermediate_size_mlp": 24},
}  # fmt: skip
"""Arguments of the config of every family besides SIZES."""

IDS = torch.arange(3, 15).view(2, 6)
OWN = {"mapping": {"experts": "own"}}


def made(family, how="grouped_mm", seed=0):
    kind = "Llama4Text" if family == "Llama4" else family
    config = getattr(hf, f"{kind}Config")(**SIZES, **FAMILIES[family])
    if family != "Llama4":  # whose experts have one forward
        config._experts_implementation = how
    torch.manual_seed(seed)
    return getattr(hf, f"{family}ForCausalLM")(config).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def experts_of(model):
    """The module that holds the experts of a model's first layer."""
    return next(m for n, m in model.named_modules() if n.endswith(".experts"))


class Digital(TorchDispatchMode):
    """Notes the parameters of three axes that products other than ours read."""

    def __init__(self, model):
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters() if p.dim() == 3}
        self.read = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        ours = function.namespace == "analogfx"
        product = any(n in function.__name__ for n in ("mm", "linear", "matmul", "index"))
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if product and not ours:
            self.read += any(t.untyped_storage().data_ptr() in self.weights for t in tensors)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_experts_of_every_family_are_analog(family):
    digital = made(family)
    analog = analogfx.analogize(digital, IDENTITY)
    torch.testing.assert_close(logits(analog), logits(digital), rtol=1e-5, atol=1e-6)
    stacks = [s for s in analogfx.report(analog).sites if len(s.weight_shape) == 3]
    parameters = [p for p in digital.parameters() if p.dim() == 3]
    assert len(stacks) == len(parameters) > 0
    assert all(s.status == "analog" for s in stacks)
    with Digital(analog) as watch:
        logits(analog)
    assert watch.read == 0
    with Digital(digital) as watch:
        logits(digital)
    assert watch.read > 0
    coarse = analogfx.analogize(digital, merged(COARSE, OWN))
    assert not torch.allclose(logits(coarse), logits(digital), atol=1e-3)


@pytest.mark.parametrize("config", ["DAC and ADC", "everything, dynamic"])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_all_implementations_give_the_same_numbers(family, config):
    analog = analogfx.analogize(made(family), CONFIGS[config])
    found = []
    for how in ("eager", "batched_mm", "grouped_mm"):
        other = copy.deepcopy(analog)
        other.config._experts_implementation = how
        experts_of(other).config._experts_implementation = how
        found.append(logits(other))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def by_hand(experts, layers, x, index, weights):
    """The eager loop over experts, each with two analog nn.Linear of its own."""
    out = torch.zeros_like(x)
    for number, (up, down) in enumerate(layers):
        token, place = torch.where(index == number)
        if len(token):
            gate, value = up(x[token]).chunk(2, -1)
            y = down(experts.act_fn(gate) * value) * weights[token, place, None]
            out.index_add_(0, token, y)
    return out


def as_linear(weight, config):
    layer = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return analogfx.analogize(layer, config)


@pytest.mark.parametrize("name", ["DAC and ADC", "fast", "dynamic", "discrete rows"])
def test_a_layer_is_a_loop_over_analog_linear_layers(name):
    config = merged(CONFIGS[name], {"mapping": {"max_input_size": 10}}, OWN)
    digital = experts_of(made("Mixtral")).double()
    for parameter in digital.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    analog = analogfx.analogize(digital, config, strict=True).train()
    pairs = zip(digital.gate_up_proj, digital.down_proj, strict=True)
    layers = [[as_linear(w, config) for w in pair] for pair in pairs]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(7, 16, dtype=torch.float64, generator=generator)
        scores = torch.rand(7, 3, dtype=torch.float64, generator=generator)  # the last gets none
        weights, index = scores.topk(2)
        y = analog(x, index, weights)
        expected = by_hand(digital, layers, x, index, weights)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        y.square().sum().backward()
        expected.square().sum().backward()
    for place, parameter in enumerate((analog.gate_up_proj, analog.down_proj)):
        grads = [pair[place].weight.grad for pair in layers]
        assert grads[3] is None and not parameter.grad[3].any()
        expected = torch.stack(grads[:3])
        torch.testing.assert_close(parameter.grad[:3], expected, rtol=1e-9, atol=1e-9)
    if hasattr(analog, "gate_up_proj_input_range"):
        ranges = torch.stack([up.input_range for up, _ in layers])
        torch.testing.assert_close(analog.gate_up_proj_input_range.detach(), ranges.detach())


def test_calibration_sees_the_rows_of_each_expert():
    digital = experts_of(made("Mixtral"))
    x, index = torch.randn(6, 16), torch.tensor([[0, 1]] * 3 + [[1, 3]] * 3)
    weights = torch.full((6, 2), 0.5)
    for own, expected in (
        ({}, [x.abs().max()]),
        (OWN, [x[:3].abs().max(), x.abs().max(), torch.tensor(3.0), x[3:].abs().max()]),
    ):
        analog = analogfx.analogize(digital, merged(COARSE, own))
        if own:
            with pytest.warns(UserWarning, match=r"gate_up_proj \(tiles 2\)"):
                analogfx.calibrate(analog, [(x, index, weights)], "max", progress=False)
        else:
            analogfx.calibrate(analog, [(x, index, weights)], "max", progress=False)
        found = analog.gate_up_proj_input_range.detach().flatten()
        torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("own", [{}, OWN], ids=["shared", "own"])
def test_the_verbs(family, own, tmp_path):
    config = merged(CONFIGS["gaussian clip by row"], CONFIGS["discrete rows"], own)
    digital = made(family)
    for name, parameter in digital.named_parameters():
        if "experts" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    analog = analogfx.analogize(digital, config)
    analogfx.calibrate(analog, [{"input_ids": IDS}], progress=False)
    before = logits(analog)

    analogfx.save(analog, tmp_path / "model")
    again = analogfx.load(made(family, seed=1), tmp_path / "model").eval()
    assert torch.equal(logits(again), before)

    chip = analogfx.program(analog, analogfx.chip.PCMLikeNoiseModel())
    with chip.at(60.0, read=0):
        on_chip = logits(analog)
    chip.save(tmp_path / "chip")
    with analogfx.load_device(analog, tmp_path / "chip").at(60.0, read=0):
        assert torch.equal(logits(analog), on_chip)
    assert not torch.equal(on_chip, before) and torch.equal(logits(analog), before)

    analogfx.clip_weights(analog)
    weight, source = (experts_of(m).gate_up_proj.detach() for m in (analog, digital))
    if family == "GptOss":  # which keeps (inputs, outputs)
        weight, source = weight.mT, source.mT
    bound = 2.0 * source.std(-1, keepdim=True)
    torch.testing.assert_close(weight, torch.clamp(source, -bound, bound))
    clipped = logits(analog)
    analogfx.quantize_weights(analog)
    torch.testing.assert_close(logits(analog), clipped)
    steps = experts_of(analog).gate_up_proj.detach()
    steps = steps.mT if family == "GptOss" else steps
    assert all(len(row.unique()) <= 15 for matrix in steps for row in matrix)

    back = analogfx.to_digital(analog)
    assert type(experts_of(back)) is type(experts_of(digital))
    assert back.state_dict().keys() == digital.state_dict().keys()


def test_whole_matrices_are_clipped_by_their_own_spread():
    digital = experts_of(made("Mixtral"))
    scale = torch.tensor([1.0, 2.0, 4.0, 8.0])
    digital.down_proj.data = torch.randn(4, 16, 24) * scale[:, None, None]
    analog = analogfx.analogize(digital, CONFIGS["gaussian clip"])
    analogfx.clip_weights(analog)
    for found, source in zip(analog.down_proj, digital.down_proj, strict=True):
        bound = 2.0 * source.std().item()
        torch.testing.assert_close(found, source.clamp(-bound, bound))


def test_a_step_trains_and_compiles_to_one_graph():
    torch._dynamo.reset()
    config = merged(CONFIGS["everything"], OWN)
    analog = analogfx.analogize(made("Mixtral"), config).train()
    twin = copy.deepcopy(analog)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for step in range(2):
        losses = []
        for model, run in ((analog, analog), (twin, compiled)):
            model.zero_grad()
            torch.manual_seed(step)
            loss = run(IDS, labels=IDS).loss
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
    for (name, p), q in zip(analog.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and p.grad.isfinite().all(), name
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["grouped_mm", "batched_mm"])
def test_the_backend_gives_the_same_numbers(how):
    torch._dynamo.reset()
    config = merged(COARSE, {"pre_post": {"input_range": {"learn_input_range": False}}}, OWN)
    digital = made("Mixtral", how)
    analog = analogfx.analogize(digital, config)
    options = {"rpu_config": config, "compiler": "eager"}
    compiled = torch.compile(copy.deepcopy(digital), backend="analogfx", options=options)
    assert torch.equal(logits(compiled), logits(analog))
    stacks = [s for s in analogfx.report(compiled).sites if len(s.weight_shape) == 3]
    assert len(stacks) == 2 and all(s.status == "analog" for s in stacks)
