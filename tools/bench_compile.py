"""What ``torch.compile`` makes of analog models: ``python tools/bench.py --compile``.

Three models from configs, nothing downloaded: a block of GPT-2 small (its ``Conv1D`` written as
``nn.Linear``, which Lightning does not know otherwise), a Llama block of like size, whose products
share inputs, and a ResNet of 18 layers. Each as digital, analogfx and Lightning model, eager and
compiled, held against the goals. For inference the compiled analog model also runs without each
whole-graph pass that changes something in it; smaller cases are there for passes that change
nothing in the large ones, or more where there are few rows.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from operator import truediv
from typing import Any, NamedTuple

import torch
import torch._inductor.config
import transformers
from aihwkit_lightning.nn.conversion import convert_to_analog
from bench_devices import Cpu, Row
from bench_layers import lightning_config
from bench_rows import ROOT, append_rows, described, environment, latest_rows
from tables import markdown, with_section
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.pytorch_utils import Conv1D

import analogfx
from analogfx.passes import pipeline

ROWS = ROOT / "tools" / "bench_compile_rows.jsonl"
PAGE = ROOT / "docs" / "compile.md"
COMMAND = "python tools/bench.py --compile --table"
TESTS = ("tests/backend/test_compiler.py",)
"""What must be green before anything is measured."""
REPEATS = 12
DIGITAL = "digital compiled"
BATCHES_FOR_RANGES = 3


def afm() -> Any:
    """The recipe that is measured, with ranges that are closed after a few batches."""
    config = analogfx.recipes.afm()
    config.pre_post.input_range.init_from_data = BATCHES_FOR_RANGES
    return config


def weight_noise_alone() -> Any:
    """A config whose sites change nothing in eval mode."""
    config = analogfx.TorchInferenceRPUConfig()
    config.modifier = afm().modifier
    return config


class Case(NamedTuple):
    """A model and the shape of its input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    config: Callable[[], Any] = afm
    whole: bool = True
    """Whether to take all arms and the training step, or to look at the passes alone."""


class _GPT2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = transformers.GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        config._attn_implementation = "sdpa"
        self.block = GPT2Block(config, layer_idx=0)
        for module in list(self.block.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Conv1D):
                    setattr(module, name, _linear(child))

    def forward(self, x: Tensor) -> Tensor:
        return _first(self.block(x))


def _linear(conv: Conv1D) -> nn.Linear:
    layer = nn.Linear(*conv.weight.shape)
    with torch.no_grad():
        layer.weight.copy_(conv.weight.T)
        layer.bias.copy_(conv.bias)
    return layer


class _Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = transformers.LlamaConfig(
            hidden_size=768, intermediate_size=2048, num_attention_heads=12
        )
        config._attn_implementation = "sdpa"
        self.block = LlamaDecoderLayer(config, layer_idx=0)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        return _first(self.block(x, position_embeddings=self.rotary(x, positions)))


class _ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = transformers.ResNetConfig(
            layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512]
        )
        self.model = transformers.ResNetModel(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).pooler_output


class _FeedForward(nn.Sequential):
    """Products that end in a relu, with dropout between: what last steps and clamps are cut for."""

    def __init__(self) -> None:
        width, inner = 768, 3072
        up, down = nn.Linear(width, inner), nn.Linear(inner, width)
        super().__init__(up, nn.ReLU(), nn.Dropout(0.1), down, nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class _GatedConvolution(nn.Module):
    """Two convolutions that read one image alike, as in WaveNet: one conversion serves both."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.gates = (nn.Conv2d(64, 64, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.values(x)) * torch.sigmoid(self.gates(x))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


CASES = {
    "GPT-2 small block": Case(_GPT2, (2, 256, 768)),
    "Llama block": Case(_Llama, (2, 256, 768)),
    "ResNet-18": Case(_ResNet, (4, 3, 96, 96)),
    "feed-forward, 16 rows": Case(_FeedForward, (16, 768), whole=False),
    "gated convolution": Case(_GatedConvolution, (4, 64, 56, 56), whole=False),
    "Llama block, 4 rows": Case(_Llama, (4, 1, 768), whole=False),
    "GPT-2 small block, weight noise alone": Case(
        _GPT2, (2, 64, 768), weight_noise_alone, whole=False
    ),
}


class Arm(NamedTuple):
    """A model, and what compiles it; None for eager."""

    model: nn.Module
    compiled: Callable[..., Any] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The model's output, from whatever runs it."""
        run = self.model if self.compiled is None else self.compiled
        return run(x)


def make_arms(case: Case, training: bool) -> dict[str, Arm]:
    """All arms from the same weights, with ranges set from the same data."""
    config = case.config()
    torch.manual_seed(0)
    models = {"digital": case.make()}
    models["analogfx"] = analogfx.analogize(models["digital"], config)
    if case.whole:
        twin = copy.deepcopy(models["digital"])
        models["lightning"] = convert_to_analog(twin, lightning_config(config))
    arms = {}
    for name, model in models.items():
        if name != "digital":
            set_ranges(model, case.shape)
        arms[f"{name} eager"] = Arm(model.train(training))
        arms[f"{name} compiled"] = compiled(model, "analogfx" if name == "analogfx" else "inductor")
    return arms


def set_ranges(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Run as many batches as the ranges are set from."""
    for seed in range(BATCHES_FOR_RANGES):
        torch.manual_seed(seed)
        with torch.no_grad():
            model.train()(torch.randn(shape))


def compiled(model: nn.Module, backend: str, **options: Any) -> Arm:
    """A copy of a model, compiled."""
    twin = copy.deepcopy(model)
    return Arm(twin, torch.compile(twin, backend=backend, options=options or None))


def without_passes(analog: nn.Module, counts: Mapping[str, int]) -> dict[str, Arm]:
    """The compiled analog model without each pass that changes something, and without all."""
    names = [p.__name__ for p in pipeline.WHOLE_GRAPH]
    left = {f"without {n}": [m for m in names if m != n] for n in names if counts.get(n)}
    left["without all"] = []
    return {name: compiled(analog, "analogfx", passes=passes) for name, passes in left.items()}


def forward(arm: Arm, x: Tensor) -> None:
    """Inference."""
    with torch.no_grad():
        arm(x)


def step(arm: Arm, x: Tensor) -> None:
    """Forward and backward to all weights and the input; every optimizer adds the same to it."""
    arm.model.zero_grad()
    x.grad = None
    arm(x).sum().backward()


def warm_up() -> None:
    """Let every compilation be a first one, and the compiler's own start be none of them."""
    torch._inductor.config.force_disable_caches = True
    # All arms of a model share its code, and Dynamo counts compilations by code.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.compile(nn.Linear(2, 2))(torch.randn(1, 2)).sum().backward()


class Start(NamedTuple):
    """What the first call of an arm took."""

    seconds: float
    graph_breaks: int
    passes: dict[str, int]
    """How much every whole-graph pass changed, for the arms of the backend."""


def measure(cases: Mapping[str, Case], repeats: int) -> Iterator[Row]:
    """Rows for every model, what is timed, and arm."""
    warm_up()
    for name, case in cases.items():
        for what, call, training in (("eval forward", forward, False), ("step", step, True)):
            if training and not case.whole:
                continue
            arms = make_arms(case, training)
            torch.manual_seed(0)
            x = torch.randn(case.shape, requires_grad=training)
            starts, failed = _start(arms, x, call)
            if not training:
                counts = starts["analogfx compiled"].passes
                more = without_passes(arms["analogfx eager"].model, counts)
                arms |= more
                starts |= _start(more, x, call)[0]
            for row in _race(arms, starts, x, call, repeats):
                yield {"model": name, "whole": case.whole, "what": what, **row}
            for arm, text in failed.items():
                common = {"model": name, "whole": case.whole, "what": what}
                yield {**common, "arm": arm, "failed": text}


_Call = Callable[[Arm, Tensor], None]


def _start(
    arms: Mapping[str, Arm], x: Tensor, call: _Call
) -> tuple[dict[str, Start], dict[str, str]]:
    """Call every arm for the first time; what that took, and how others failed."""
    starts, failed = {}, {}
    for name, arm in arms.items():
        counters.clear()
        torch.manual_seed(0)
        begin = time.perf_counter()
        try:
            call(arm, x)
        except Exception as error:  # a peer that does not compile is a figure, too
            failed[name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            continue
        seconds = time.perf_counter() - begin
        ours = arm.compiled is not None and hasattr(arm.model, "_analog_chosen")
        passes = dict(analogfx.report(arm.model).passes) if ours else {}
        starts[name] = Start(seconds, sum(counters["graph_break"].values()), passes)
    return starts, failed


def _race(
    arms: Mapping[str, Arm], starts: Mapping[str, Start], x: Tensor, call: _Call, repeats: int
) -> Iterator[Row]:
    """Time all arms that have started, in turns; ratios are those within a turn."""
    times: dict[str, list[float]] = {name: [] for name in starts}
    torch.manual_seed(0)
    for turn in range(repeats + 1):
        for name, samples in times.items():
            begin = time.perf_counter()
            call(arms[name], x)
            if turn:  # the first is to warm up
                samples.append(1e3 * (time.perf_counter() - begin))
    digital = times[DIGITAL]
    for name, samples in times.items():
        cuts = statistics.quantiles(samples, n=5)
        start = starts[name]
        yield {
            "arm": name,
            "unit": "ms",
            "median": round(statistics.median(samples), 3),
            "p20": round(cuts[0], 3),
            "p80": round(cuts[-1], 3),
            "repeats": repeats,
            "ratio": round(statistics.median(map(truediv, samples, digital)), 3),
            "first_call_s": round(start.seconds, 2),
            "first_call_ratio": round(start.seconds / starts[DIGITAL].seconds, 3),
            "graph_breaks": start.graph_breaks,
            "passes": start.passes,
        }


def bench(cases: Mapping[str, Case] = CASES, repeats: int = REPEATS) -> str:
    """Measure, append the rows to the data file, all of them or none, and show them."""
    device = Cpu()
    device.prepare()
    common = environment(device)
    rows = [common | row for row in measure(cases, repeats)]
    append_rows(ROWS, rows)
    return tables(rows)


def write_page() -> None:
    """Write the last recorded run to the page."""
    text = tables(latest_rows(ROWS, Cpu.name))
    PAGE.write_text(with_section(PAGE.read_text(), COMMAND, text))


class Goal(NamedTuple):
    """A bound on a ratio of the compiled analog model to the compiled digital one."""

    text: str
    what: str
    figure: str
    at_most: float


GOALS = (
    Goal("eval forward", "eval forward", "ratio", 1.1),
    Goal("training step", "step", "ratio", 1.3),
    Goal("first call, eval", "eval forward", "first_call_ratio", 1.5),
    Goal("first call, training", "step", "first_call_ratio", 1.5),
)
_HEADER = ("arm", "ms", "of digital compiled", "first call, s", "graph breaks", "changed by passes")


def tables(rows: list[Row]) -> str:
    """A run as Markdown: how it was made, the goals, and a table for each model and what is timed.

    A line without a pass says what that pass had changed in the model.
    """
    if not rows:
        return "No run is recorded yet."
    parts = [described(rows[0]), _goals(rows)]
    for model, what in dict.fromkeys((row["model"], row["what"]) for row in rows):
        those = [r for r in rows if (r["model"], r["what"]) == (model, what)]
        counts = next((r["passes"] for r in those if r["arm"] == "analogfx compiled"), {})
        lines = [_line(r, counts) for r in those]
        parts.append(f"**{model}, {what}**\n\n{markdown(_HEADER, lines)}")
    return "\n\n".join(parts)


def _goals(rows: list[Row]) -> str:
    """Which goals are met, by model."""
    ours = {(r["model"], r["what"]): r for r in rows
            if r["arm"] == "analogfx compiled" and r["whole"] and "failed" not in r}  # fmt: skip
    models = list(dict.fromkeys(model for model, _ in ours))
    header = ("analog compiled, of digital compiled", "goal", *models)
    lines = []
    for goal in GOALS:
        found = [ours[model, goal.what][goal.figure] for model in models]
        shown = [f"×{f:.2f} {'met' if f <= goal.at_most else 'missed'}" for f in found]
        lines.append((goal.text, f"≤ ×{goal.at_most}", *shown))
    return markdown(header, lines)


def _line(row: Row, counts: Mapping[str, int]) -> list[str]:
    if "failed" in row:
        return [row["arm"], f"fails: {row['failed']}", "", "", "", ""]
    time = f"{row['median']:.1f} ({row['p20']:.1f}–{row['p80']:.1f})"
    eager = row["arm"].endswith("eager")
    start = ["", ""] if eager else [f"{row['first_call_s']:.1f}", str(row["graph_breaks"])]
    left_out = row["arm"].removeprefix("without ")
    changed = {left_out: counts[left_out]} if left_out in counts else row["passes"]
    shown = ", ".join(f"{name} {count}" for name, count in changed.items() if count)
    return [row["arm"], time, f"×{row['ratio']:.2f}", *start, shown]
