"""Whether every program finds the same ADC codes: ``python tools/same_bits.py``.

Four models from configs (ViT, ResNet, GPT-2, Llama), with 4- and 8-bit weights, 8-bit converters
and several tiles a site, run in eager PyTorch, as a graph of the backend, in the
Triton kernels (in Triton's interpreter), as ONNX files of every level in ONNX Runtime, and in a
reader of such a file in NumPy (docs/examples/golden.py, on the inputs of eager PyTorch's sites);
all that again in a process whose PyTorch and oneDNN keep to AVX2 on two threads, and in one whose
PyTorch has no vector instructions.

Every site of every program is held against eager PyTorch on the very input that the site saw there:

- *ADC codes apart* are outputs that differ by half a step of the ADC or more. The command fails
  unless there are none.
- *rounded apart* are outputs of the same codes whose bits differ, by rounding of sums of tiles.

What a program does between sites (norms, softmax, activations) is float arithmetic, which rounds in
its own way, and may carry a value over a tie of the next DAC:

- *DAC codes apart* counts these, from eager PyTorch's own run of the whole model, and
  *nearest tie* is how far the furthest of the values that only rounding moved lay from a tie.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import analogfx
from analogfx import TorchInferenceRPUConfig, WeightClipType, WeightQuantizationType, kernels
from analogfx.errors import KernelError
from analogfx.kernels import reference as ref
from analogfx.kernels.spec import MVMSpec, decode
from analogfx.modules.analog_module import AnalogModule
from analogfx.onnx.levels import LEVELS

ROOT = Path(__file__).resolve().parent.parent

SETTINGS: tuple[dict[str, str], ...] = (
    {"OMP_NUM_THREADS": "1"},
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"},
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "1"},
)
"""Environments: what the machine has, and less. ONNX Runtime always has what the machine has."""

STATES = {"W4A8": 14, "W8A8": 254}

_FUSED = (torch.ops.analogfx.analog_linear.default, torch.ops.analogfx.analog_conv.default)


# ------------------------------------------------------------------------------------- models


def config(states: int) -> TorchInferenceRPUConfig:
    """8-bit converters around tiles of 40 inputs, weights of so many states a row."""
    made = TorchInferenceRPUConfig()
    made.forward.inp_res = made.forward.out_res = 254
    made.forward.out_bound = 12
    made.clip.type = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL
    made.clip.sigma = 2.5
    made.modifier.quantization_type = WeightQuantizationType.DISCRETIZE_PER_CHANNEL
    made.modifier.res = states
    made.mapping.max_input_size = 40
    made.pre_post.input_range.enable = True
    return made


def _vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
            image_size=32, patch_size=8,
        )
    )  # fmt: skip


def _resnet() -> nn.Module:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
        )
    )


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=100, n_positions=32, n_embd=48, n_layer=2, n_head=4, use_cache=False,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=100, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, use_cache=False,
        )
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "ViT": (_vit, lambda: torch.randn(4, 3, 32, 32)),
    "ResNet": (_resnet, lambda: torch.randn(4, 3, 32, 32)),
    "GPT-2": (_gpt2, lambda: torch.randint(0, 100, (4, 16))),
    "Llama": (_llama, lambda: torch.randint(0, 100, (4, 16))),
}


def model_of(name: str, states: int) -> tuple[nn.Module, Tensor]:
    """An analog model whose ranges saw one batch, and that batch."""
    torch.manual_seed(0)
    make, draw = MODELS[name]
    analog, x = analogfx.analogize(make(), config(states)), draw()
    with torch.no_grad():
        analog.train()(x)
    return analog.eval(), x


# ---------------------------------------------------------------------------- what sites did


class Call(NamedTuple):
    """One call of a site in eager PyTorch."""

    op: Callable[..., Any]
    x: Tensor
    rest: tuple[Any, ...]
    """The op's arguments behind x."""
    y: Tensor

    @property
    def spec(self) -> MVMSpec:
        """The site's scalars."""
        return decode(MVMSpec, self.rest[-1])

    def again(self, x: Tensor) -> Tensor:
        """What eager PyTorch gives for another input."""
        y: Tensor = self.op(x, *self.rest)[0]
        return y

    def dac(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of an input behind the DAC, and its distance from a tie, in steps."""
        spec, ranges = self.spec, self.rest[2]
        axis = 1 if len(self.rest) > 6 else -1
        groups, sizes = spec.groups, list(spec.in_sizes)
        parts = x.split(sizes, axis) if len(sizes) > 1 and groups == 1 else [x]
        pairs = list(zip(parts, ranges, strict=True))
        codes = [ref.dac(part, r, spec.inp_res, codes=True) for part, r in pairs]
        steps = [p.clamp(-r, r) / ref.step_of(r, spec.inp_res) for p, r in pairs]
        whole = torch.cat(steps, axis)
        return torch.cat(codes, axis), (whole - whole.floor() - 0.5).abs()

    def step(self, y: Tensor) -> Tensor:
        """The finest step of the ADC of any tile, for every output; it broadcasts with ``y``."""
        spec, (weight, _, ranges, clip) = self.spec, self.rest[:4]
        tiles = weight.flatten(1).split(list(spec.in_sizes), 1)
        steps = []
        for number, tile in enumerate(tiles):
            a = ref.row_max(tile) if clip is None else clip[number]
            a = a if spec.bound_per_channel else ref.tile_max(a, spec.out_sizes)
            bound = ref.adc_bound(ranges[number], a, spec.out_bound)
            steps.append(ref.adc_step(bound, spec.out_res))
        finest = torch.stack(steps).amin(0)
        return finest if y.shape[-1:] == finest.shape else finest.view(-1, *[1] * (y.dim() - 2))


class Recorded(TorchDispatchMode):
    """Notes the calls of fused ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _FUSED:
            self.calls.append(Call(func, args[0], args[1:], out[0]))
        return out


class Seen(NamedTuple):
    """One call of a site in some program."""

    call: Call
    """The same call in eager PyTorch's own run."""
    x: Tensor
    y: Tensor
    expected: Tensor
    """What eager PyTorch gives for this x."""


class Run(NamedTuple):
    """What a program did."""

    seen: list[Seen]
    y: Tensor
    """What the model returns."""


def eager(analog: nn.Module, x: Tensor) -> tuple[list[Call], Tensor]:
    """Every call of a site in eager PyTorch, and what the model returns."""
    with Recorded() as recorded:
        y: Tensor = analog(x).logits
    return recorded.calls, y


def compiled(analog: nn.Module, x: Tensor, calls: list[Call], _: Path) -> Run:
    """The model as one graph, which returns what its modules are given and return, too."""
    placed = [m for m in analog.modules() if isinstance(m, AnalogModule) and m._analog.sites]
    noted: list[tuple[Tensor, Tensor]] = []
    order: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda m, _: order.append(m)) for m in placed]
    analog(x)
    for hook in hooks:
        hook.remove()

    def note(_: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
        noted.append((given[0], y))

    def watched(x: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        noted.clear()
        logits = analog(x).logits
        return list(noted), logits

    hooks = [m.register_forward_hook(note) for m in placed]
    torch._dynamo.reset()
    pairs, y = torch.compile(watched, backend="analogfx", fullgraph=True)(x)
    for hook in hooks:
        hook.remove()
    seen = []
    for call, module, (given, found) in zip(calls, order, pairs, strict=True):
        with Recorded() as recorded:
            expected = module(given)
        seen.append(Seen(call, recorded.calls[0].x, found, expected))
    return Run(seen, y)


def triton(analog: nn.Module, x: Tensor, calls: list[Call], _: Path) -> Run:
    """The model with its products in the Triton kernels."""
    before = kernels.use("triton")
    try:
        found, y = eager(analog, x)
    finally:
        kernels.use(before)
    return Run([Seen(c, f.x, f.y, c.again(f.x)) for c, f in zip(calls, found, strict=True)], y)


def in_file(level: str) -> Callable[[nn.Module, Tensor, list[Call], Path], Run]:
    """A program that is an ONNX file of some level in ONNX Runtime."""

    def run(analog: nn.Module, x: Tensor, calls: list[Call], folder: Path) -> Run:
        path = folder / f"{level}.onnx"
        analogfx.export_onnx(analog, (x,), path, level=level, opset=21, verify=False)
        places, values, y = _opened(path, x)
        seen = [
            Seen(c, values[a], values[b], c.again(values[a]))
            for c, (_, a, b) in zip(calls, places, strict=True)
        ]
        return Run(seen, y)

    return run


def _opened(path: Path, x: Tensor) -> tuple[list[Any], dict[str, Tensor], Tensor]:
    """Site, input and output of every call in a file, the values by name, and the result."""
    import onnx
    import onnxruntime

    sys.path.insert(0, str(ROOT / "tests"))
    import onnx_compare

    model = onnx.load(path)
    places = onnx_compare.calls_of(model, analogfx.load_onnx_sites(path).sites)
    first = model.graph.output[0].name
    known = {p.name for p in (*model.graph.output, *model.graph.input)}
    names = [n for n in dict.fromkeys(n for _, *ends in places for n in ends) if n not in known]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    feed = {model.graph.input[0].name: x.numpy()}
    outputs = [place.name for place in session.get_outputs()]
    arrays = dict(zip(outputs, session.run(outputs, feed), strict=True)) | feed
    values = {name: torch.from_numpy(array) for name, array in arrays.items()}
    (alone,) = onnxruntime.InferenceSession(path, options).run([first], feed)
    return places, values, torch.from_numpy(alone)


def numpy_reader(analog: nn.Module, x: Tensor, calls: list[Call], folder: Path) -> Run:
    """The sites by themselves in NumPy, from a file and the inputs in its golden vectors."""
    import json

    import onnx
    from safetensors.numpy import load_file

    sys.path.insert(0, str(ROOT / "docs" / "examples"))
    import golden

    path = folder / "golden.onnx"
    analogfx.export_onnx(analog, (x,), path, verify=False, golden=1)
    model = onnx.load(path)
    record = json.loads(next(e.value for e in model.metadata_props if e.key == "ai.analogfx"))
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    order = {node.name: number for number, node in enumerate(model.graph.node)}
    given, found = load_file(f"{path}.golden.safetensors"), {}
    for site in record["sites"]:
        held = {key: constants[name] for key, name in site["initializers"].items()}
        for label in site["nodes"]:
            inputs = given[f"site/{label}/x"][0]
            _, _, y = golden.site(inputs, held, site["spec"], site["window"])
            found[order[label]] = torch.from_numpy(inputs), torch.from_numpy(y)
    placed = [found[place] for place in sorted(found)]
    seen = [Seen(c, a, b, c.again(a)) for c, (a, b) in zip(calls, placed, strict=True)]
    return Run(seen, torch.from_numpy(next(v[0] for k, v in given.items() if "output/" in k)))


PROGRAMS: dict[str, Callable[[nn.Module, Tensor, list[Call], Path], Run]] = {
    "compiled": compiled,
    "triton": triton,
    **{level: in_file(level) for level in LEVELS},
    "numpy": numpy_reader,
}


# ------------------------------------------------------------------------------------ counting


class Counts(NamedTuple):
    """How a program differs from eager PyTorch."""

    codes: int
    """ADC codes of all sites and tiles."""
    apart: int
    rounded: int
    inputs: int
    dac_apart: int
    nearest: float
    """Largest distance from a tie, in steps, of the inputs whose DAC codes are apart."""
    output: float
    """Largest difference of what the model returns, over the largest value."""


def count(run: Run, expected: Tensor) -> Counts:
    """Hold a run against eager PyTorch."""
    codes = apart = rounded = inputs = dac_apart = 0
    nearest = 0.0
    moved = False
    for call, x, y, mine in run.seen:
        off = (y - mine).abs()
        wrong = ~(off < call.step(y) / 2)
        apart += int(wrong.sum())
        rounded += int(((off > 0) & ~wrong).sum())
        codes += y.numel() * len(call.spec.in_sizes)
        (found, _), (own, distance) = call.dac(x), call.dac(call.x)
        other = found != own
        inputs += x.numel()
        dac_apart += int(other.sum())
        if other.any() and not moved:  # behind it, values are other values
            moved, nearest = True, float(distance[other].max())
    scale = float(expected.abs().max())
    return Counts(
        codes,
        apart,
        rounded,
        inputs,
        dac_apart,
        nearest,
        float((run.y - expected).abs().max()) / scale,
    )


HEADER = ("model", "program", "ADC codes", "apart", "rounded apart", "DAC codes", "apart",
          "nearest tie", "output off")  # fmt: skip


def rows(
    models: Sequence[str], bits: Sequence[str], programs: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], bool]]:
    """A row of the table for every model and program, and whether every ADC code is right."""
    for name in models:
        for width in bits:
            analog, x = model_of(name, STATES[width])
            with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
                calls, expected = eager(analog, x)
                for program in programs:
                    label = f"{name} {width}", program
                    try:
                        run = PROGRAMS[program](analog, x, calls, Path(folder))
                    except KernelError as error:
                        yield (*label, str(error)), True
                        continue
                    found = count(run, expected)
                    cells = (f"{v:,}" if isinstance(v, int) else f"{v:.1e}" for v in found)
                    yield (*label, *cells), not found.apart


def _line(cells: Sequence[str]) -> str:
    """A row for a terminal; it is printed as soon as it is known."""
    return "  ".join(c.ljust(11) if n < 2 else c.rjust(13) for n, c in enumerate(cells))


def here(models: Sequence[str], bits: Sequence[str], programs: Sequence[str]) -> bool:
    """Print the table of this process; whether every ADC code is right."""
    all_right = True
    threads = torch.get_num_threads()
    print(f"{torch.backends.cpu.get_cpu_capability()}, {threads} threads\n{_line(HEADER)}")
    for row, right in rows(models, bits, programs):
        print(_line(row), flush=True)
        all_right &= right
    return all_right


def main(argv: Sequence[str] | None = None) -> int:
    """Run all settings, each in a process of its own. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--bits", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--here", action="store_true", help="this process's instructions alone")
    arguments = parser.parse_args(argv)
    if arguments.here:
        return 0 if here(arguments.models, arguments.bits, arguments.programs) else 1
    failed = 0
    given = ["--models", *arguments.models, "--bits", *arguments.bits]
    given += ["--programs", *arguments.programs, "--here"]
    for setting in SETTINGS:
        print("\n" + " ".join(f"{name}={value}" for name, value in setting.items()), flush=True)
        environment = os.environ | {"TRITON_INTERPRET": "1"} | setting
        command = [sys.executable, __file__, *given]
        # Inductor's cache does not tell instruction sets apart: with one found there, C++ code
        # for AVX2 is compiled without it, and fails.
        with tempfile.TemporaryDirectory() as cache:
            environment["TORCHINDUCTOR_CACHE_DIR"] = cache
            failed |= subprocess.run(command, env=environment).returncode != 0
    print("\nFAILED: see the column apart" if failed else "\nEvery ADC code is the same.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
