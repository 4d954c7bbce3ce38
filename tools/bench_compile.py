"""What ``torch.compile`` makes of analog models: ``python tools/bench.py --compile``.

Three models from configs, nothing downloaded: a block of GPT-2 small (its ``Conv1D`` written as
``nn.Linear``, which Lightning does not know otherwise), a Llama block of like size, whose products
share inputs, and a ResNet of 18 layers. Each as digital, analogfx and Lightning model, eager and
compiled; for inference also with one whole-graph pass left out at a time.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
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
REPEATS = 20
DIGITAL = "digital compiled"
BATCHES_FOR_RANGES = 3


class Case(NamedTuple):
    """A model and the shape of its input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


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


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


CASES = {
    "GPT-2 small block": Case(_GPT2, (2, 256, 768)),
    "Llama block": Case(_Llama, (2, 256, 768)),
    "ResNet-18": Case(_ResNet, (4, 3, 96, 96)),
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
    config = analogfx.recipes.afm()
    config.pre_post.input_range.init_from_data = BATCHES_FOR_RANGES
    torch.manual_seed(0)
    digital = case.make()
    analog = analogfx.analogize(digital, config)
    lightning = convert_to_analog(copy.deepcopy(digital), lightning_config(config))
    for model in (analog, lightning):
        for seed in range(BATCHES_FOR_RANGES):
            torch.manual_seed(seed)
            with torch.no_grad():
                model.train()(torch.randn(case.shape))
    models = {"digital": digital, "analogfx": analog, "lightning": lightning}
    arms = {}
    for name, model in models.items():
        arms[f"{name} eager"] = Arm(model.train(training))
        options = {"backend": "analogfx"} if name == "analogfx" else {}
        twin = copy.deepcopy(model)
        arms[f"{name} compiled"] = Arm(twin, torch.compile(twin, **options))
    return arms


def without_passes(analog: nn.Module) -> dict[str, Arm]:
    """The compiled analog model without each of the whole-graph passes, and without all."""
    names = [p.__name__ for p in pipeline.WHOLE_GRAPH]
    left = {f"without {name}": [n for n in names if n != name] for name in names}
    arms = {}
    for name, passes in {**left, "without all": []}.items():
        twin = copy.deepcopy(analog)
        options = {"passes": passes}
        arms[name] = Arm(twin, torch.compile(twin, backend="analogfx", options=options))
    return arms


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


def measure(cases: Mapping[str, Case], repeats: int) -> Iterator[Row]:
    """Rows for every model, what is timed, and arm."""
    warm_up()
    for name, case in cases.items():
        for what, call, training in (("eval forward", forward, False), ("step", step, True)):
            arms = make_arms(case, training)
            if not training:
                arms |= without_passes(arms["analogfx eager"].model)
            torch.manual_seed(0)
            x = torch.randn(case.shape, requires_grad=training)
            for row in _race(arms, x, call, repeats):
                yield {"model": name, "what": what, **row}


def _race(
    arms: dict[str, Arm], x: Tensor, call: Callable[[Arm, Tensor], None], repeats: int
) -> Iterator[Row]:
    """Compile every arm, then time them in turns."""
    starts, breaks, failed = {}, {}, {}
    for name, arm in arms.items():
        counters.clear()
        begin = time.perf_counter()
        try:
            call(arm, x)
        except Exception as error:  # a peer that does not compile is a figure, too
            failed[name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            continue
        starts[name] = time.perf_counter() - begin
        breaks[name] = sum(counters["graph_break"].values())
        call(arm, x)
    times: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(repeats):
        for name, samples in times.items():
            begin = time.perf_counter()
            call(arms[name], x)
            samples.append(1e3 * (time.perf_counter() - begin))
    digital = statistics.median(times[DIGITAL])
    for name, samples in times.items():
        cuts = statistics.quantiles(samples, n=5)
        yield {
            "arm": name,
            "unit": "ms",
            "median": round(statistics.median(samples), 3),
            "p20": round(cuts[0], 3),
            "p80": round(cuts[-1], 3),
            "repeats": repeats,
            "ratio": round(statistics.median(samples) / digital, 3),
            "first_call_s": round(starts[name], 2),
            "graph_breaks": breaks[name],
        }
    for name, text in failed.items():
        yield {"arm": name, "failed": text}


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


_HEADER = ("arm", "ms", "of digital compiled", "first call, s", "graph breaks")


def tables(rows: list[Row]) -> str:
    """A run as Markdown: how it was made, and a table for each model and what was timed."""
    if not rows:
        return "No run is recorded yet."
    parts = [described(rows[0])]
    for model, what in dict.fromkeys((row["model"], row["what"]) for row in rows):
        lines = [_line(r) for r in rows if (r["model"], r["what"]) == (model, what)]
        parts.append(f"**{model}, {what}**\n\n{markdown(_HEADER, lines)}")
    return "\n\n".join(parts)


def _line(row: Row) -> list[str]:
    if "failed" in row:
        return [row["arm"], f"fails: {row['failed']}", "", "", ""]
    time = f"{row['median']:.1f} ({row['p20']:.1f}–{row['p80']:.1f})"
    eager = row["arm"].endswith("eager")
    start = ["", ""] if eager else [f"{row['first_call_s']:.1f}", str(row["graph_breaks"])]
    return [row["arm"], time, f"×{row['ratio']:.2f}", *start]
