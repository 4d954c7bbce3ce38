"""A model on a chip: programmed once, read at any time.

A chip is a function of the weights that it was programmed with, of its noise models and of a seed.
Nothing of a model is written to: inside ``at`` its products multiply by what the chip holds, and
everything else that reads a weight (a tied embedding, a checkpoint) finds the exact one.

Random numbers are drawn on the CPU whatever the model's device, each by a key made of the seed,
the site, its tile, the step (programming, drift, a reading) and the number of the draw in it; so
times can be asked for in any order. What a chip holds does not depend on threads or on the
processor's instructions: NumPy draws in float64, the formulas are free of fused multiply-adds, and
compensation adds up integers. Noise that every product draws is drawn where the model is, by a key
made of the seed, the site, the reading and the number of the product in it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from analogfx import files
from analogfx.chip.compensation import BaseDriftCompensation
from analogfx.chip.model import NoiseModel
from analogfx.chip.record import read as read_record
from analogfx.errors import CaptureError, CheckpointError, ConfigError, Conflict
from analogfx.held import Held, holding
from analogfx.kernels import held as kernel
from analogfx.log import logger
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.program import AnalogSite, Lowered
from analogfx.modules.sites import required_sites, unwrapped
from analogfx.modules.write_back import dense_weight
from analogfx.shards import whole

SCHEMA = 1
CHIP_FILE = "chip.json"
READ_NOISE = ("readout", "product")


@dataclass(frozen=True)
class _Site:
    """One site's part of a chip."""

    name: str
    placement: int
    in_sizes: tuple[int, ...]
    out_sizes: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the weight as the site's op takes it."""
    model: NoiseModel
    compensation: BaseDriftCompensation | None
    target: Tensor
    """(O, I) weights that it was programmed to hold."""
    peaks: Tensor | None
    deviation: Tensor | None
    """(k, O) of its output noise over the range; None for none."""

    def tiles(self) -> Iterator[tuple[int, int, slice, slice]]:
        """Every tile: its number, its number along the inputs, its rows and columns of target."""
        numbers = itertools.count()
        for rows in _slices(self.out_sizes):
            for column, inputs in enumerate(_slices(self.in_sizes)):
                yield next(numbers), column, rows, inputs


class Device:
    """One chip that a model was programmed to; see :func:`program`."""

    def __init__(self, sites: list[_Site], seed: int) -> None:
        self.seed = seed
        self._sites = sites
        self._readings: Counter[float] = Counter()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        weights = sum(site.target.numel() for site in self._sites)
        models = sorted({type(site.model).__name__ for site in self._sites})
        return f"Device({weights} weights, {', '.join(models)}, seed={self.seed})"

    @contextmanager
    def at(
        self,
        seconds: float,
        read: int | None = None,
        read_noise: str = "readout",
        output_noise: bool = False,
    ) -> Iterator[Device]:
        """Inside this context the model's analog products multiply by what the chip holds now.

        The chip is read on entry. Contexts nest, of one chip and of several; each thread is inside
        its own. A product in training mode raises a ``RuntimeError``.

        Args:
            seconds: time after programming, 0 or more.
            read: number of the reading at this time: the same one gives the same weights. None
                takes the next.
            read_noise: "readout": drawn once, when the chip is read; all products inside share it,
                as in AIHWKIT. "product": drawn anew for every input vector, as a chip does it.
                The first product of a reading has the same noise whenever the reading is repeated,
                and so has the second.
            output_noise: add the noise of ``forward.out_noise`` to every tile's outputs, anew for
                every input vector, as training does.

        Raises:
            ValueError: a time below 0, or another ``read_noise``.
            ConfigError: ``read_noise="product"`` with a noise model of one's own that does not tell
                its read noise apart, or ``output_noise`` where no config has any.

        Example:
            >>> device = analogfx.program(analog.eval(), analogfx.chip.PCMLikeNoiseModel())
            >>> with device.at(86400.0):
            ...     accuracy = evaluate(analog)
        """
        seconds = float(seconds)
        if not (seconds >= 0 and math.isfinite(seconds)):
            raise ValueError(f"seconds = {seconds!r}: expected a time after programming, from 0 on")
        if read_noise not in READ_NOISE:
            valid = " or ".join(map(repr, READ_NOISE))
            raise ValueError(f"read_noise = {read_noise!r}: expected {valid}")
        if output_noise and all(site.deviation is None for site in self._sites):
            valid = "a strength above 0 at one site at least, for output_noise=True"
            raise ConfigError([Conflict("forward.out_noise", 0.0, valid)])
        if read is None:
            with self._lock:
                read = self._readings[seconds]
                self._readings[seconds] += 1
        with torch.no_grad():
            held = [
                self._held(site, seconds, read, read_noise == "product", output_noise)
                for site in self._sites
            ]
        by_placement: dict[int, tuple[Held, ...]] = {}
        for site, one in zip(self._sites, held, strict=True):
            by_placement[site.placement] = (*by_placement.get(site.placement, ()), one)
        with holding(by_placement):
            yield self

    def part(self, modules: Iterable[AnalogModule]) -> Device:
        """The same chip, of which some modules are used; all others multiply exactly.

        Args:
            modules: of the model that was programmed.
        """
        numbers = {module._analog.number for module in modules}
        return Device([site for site in self._sites if site.placement in numbers], self.seed)

    def weights(self, seconds: float, read: int = 0) -> dict[str, Tensor]:
        """What the tiles hold at a time, (O, I) by site, without the compensation's factors."""
        with torch.no_grad():
            held = [self._held(site, float(seconds), read) for site in self._sites]
        return {s.name: h.weight.flatten(1) for s, h in zip(self._sites, held, strict=True)}

    def _held(
        self,
        site: _Site,
        seconds: float,
        read: int,
        by_product: bool = False,
        output_noise: bool = False,
    ) -> Held:
        weight = torch.empty_like(site.target)
        variance = torch.empty_like(site.target) if by_product else None
        compensation = site.compensation
        programmed = gain = None
        if compensation is not None:
            programmed = torch.empty_like(site.target)
            gain = site.target.new_empty(len(site.in_sizes), site.target.shape[0])
        converter = site.model.g_converter
        for number, column, rows, inputs in site.tiles():
            of_tile = (rows, inputs)
            tile = _Tile(site, f"{self.seed}/{site.name}/{number}", of_tile)
            now = weight[of_tile]
            first = None if programmed is None else programmed[of_tile]
            for one in tile.blocks():
                begun, g, spread = tile.reading(one, seconds, read, by_product)
                now[one.place] = converter.to_weights(g, one.scale)
                if first is not None:
                    first[one.place] = converter.to_weights(begun, one.scale)
                if variance is not None:
                    part = variance[of_tile][one.place]
                    if spread is None:
                        part.zero_()
                    else:
                        part.copy_(converter.variance(spread, one.scale))
            if compensation is not None and gain is not None and first is not None:
                gain[column, rows] = compensation.factor(site.target[of_tile], first, now)
        deviation = site.deviation if output_noise else None
        return Held(
            weight.view(site.shape),
            site.peaks,
            gain,
            None if variance is None else variance.view(site.shape),
            deviation,
            None
            if variance is None and deviation is None
            else _calls(f"{self.seed}/{site.name}/product/{seconds!r}/{read}", weight.device),
        )

    def conductances(
        self, seconds: float | None = None, read: int = 0
    ) -> dict[str, tuple[Tensor, list[Tensor]]]:
        """What the devices were asked to hold, or hold at a time.

        Args:
            seconds: after programming; None for the targets, without any noise.

        Returns:
            By site: (n, O, I) conductances in microsiemens, of the n devices of every weight, and
            for each tile, along the outputs and then along the inputs, the scale that the
            converter's ``to_weights`` takes.
        """
        found = {}
        for site in self._sites:
            whole, scales = None, []
            for number, _, rows, inputs in site.tiles():
                tile = _Tile(site, f"{self.seed}/{site.name}/{number}", (rows, inputs))
                scales.append(tile.scale)
                for one in tile.blocks():
                    if seconds is None:
                        g = one.goal
                    else:
                        g = tile.reading(one, float(seconds), read, by_product=False)[1]
                    if whole is None:
                        whole = g.new_empty(len(g), *site.target.shape)
                    down, across = one.place
                    whole[:, rows, inputs][:, down, across] = g
            assert whole is not None
            found[site.name] = whole, scales
        return found

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the chip to a folder, for :func:`load_device`.

        ``chip-<id>.safetensors`` holds what was programmed, ``chip.json`` the seed, and the
        noise model and compensation of every site. A save that is interrupted leaves what was
        there before.

        Raises:
            ConfigError: a noise model or compensation of one's own is no dataclass.
        """
        folder = Path(directory)
        sites, tensors = [], {}
        for site in self._sites:
            sites.append(
                {
                    "name": site.name,
                    "in_sizes": list(site.in_sizes),
                    "out_sizes": list(site.out_sizes),
                    "noise_model": site.model.to_dict(),
                    "compensation": site.compensation and site.compensation.to_dict(),
                }
            )
            tensors[f"{site.name}:target"] = site.target.contiguous()
            if site.peaks is not None:
                tensors[f"{site.name}:peaks"] = site.peaks.contiguous()
            if site.deviation is not None:
                tensors[f"{site.name}:output_noise"] = site.deviation.contiguous()
        record = {"schema": SCHEMA, "seed": self.seed, "tensors": {}, "sites": sites}
        files.commit(folder, CHIP_FILE, "chip", record, tensors)


def program(
    analog: nn.Module,
    noise_model: Any = None,
    compensation: Any = None,
    seed: int = 0,
) -> Device:
    """Program the weights of an analog model to a chip.

    The model stays as it is: use the chip by ``with device.at(seconds):``. What the chip holds is
    fixed now; weights that change afterwards are not on it.

    Args:
        analog: what ``analogize`` or ``load`` returned, on any device but ``meta``.
        noise_model: for all sites; None for each config's ``noise_model``. One of
            :mod:`analogfx.chip`, one of your own, an AIHWKIT object, or a dict as in JSON.
        compensation: likewise, for the drift; None for each config's ``drift_compensation``.
        seed: the chip's number: the same one gives the same chip on every machine.

    Raises:
        TypeError: the model has no analog layer.
        ConfigError: a site has no noise model, or one that cannot be.
        CaptureError: a site has no fused product, or no weights.
    """
    analog = unwrapped(analog)
    model = None if noise_model is None else read_record(NoiseModel, noise_model, "noise_model")
    chosen = (
        None
        if compensation is None
        else read_record(BaseDriftCompensation, compensation, "compensation")
    )
    sites = []
    for name, module, site, lowered in _products(analog):
        config = module._analog.config
        of_site = config.noise_model if model is None else model
        if of_site is None:
            valid = "a noise model, in the config or as noise_model (--noise in a shell)"
            raise ConfigError([Conflict("noise_model", None, valid)], name)
        weight = dense_weight(module, site)
        if weight.is_meta:
            raise CaptureError(f"{name} has no weights: it is on the meta device")
        clip = getattr(module, site.state.clip, None)
        clip = None if clip is None else whole(clip)
        target, peaks = kernel.asked_for(weight, clip, lowered.spec)
        deviation = None
        if module._analog.resolved.out_noise:
            deviation = kernel.output_deviation(
                weight, clip, _lowered(name, module, site, True).spec
            )
        sites.append(
            _Site(
                name,
                module._analog.number,
                site.in_sizes,
                site.out_sizes,
                tuple(weight.shape if lowered.op == "conv" else target.shape),
                of_site,
                config.drift_compensation if chosen is None else chosen,
                target,
                peaks,
                deviation,
            )
        )
    logger.info("program: %d products, chip %d", len(sites), seed)
    return Device(sites, seed)


def load_device(analog: nn.Module, directory: str | os.PathLike[str]) -> Device:
    """The chip that :meth:`Device.save` wrote, for the model that was programmed to it.

    Args:
        analog: the analog model; its weights need not be those that were programmed.

    Raises:
        CheckpointError: the folder is damaged, of another schema, or of another model.
        ConfigError: it names a noise model that this process has not defined.
    """
    folder = Path(directory)
    record, tensors = _read_folder(folder)
    saved = {site["name"]: site for site in record["sites"]}
    sites = []
    for name, module, site, lowered in _products(unwrapped(analog)):
        shape = tuple(site.weight(module).shape)
        matrix = (shape[0], math.prod(shape[1:]))
        found = saved.pop(name, None)
        target = tensors.get(f"{name}:target")
        fits = found is not None and target is not None and tuple(target.shape) == matrix
        grid = list(site.in_sizes), list(site.out_sizes)
        if not fits or (found["in_sizes"], found["out_sizes"]) != grid:
            raise CheckpointError(f"{folder} is the chip of another model: {name} does not fit")
        assert found is not None and target is not None
        device = site.weight(module).device
        limits = (tensors.get(f"{name}:{part}") for part in ("peaks", "output_noise"))
        factor = found["compensation"]
        sites.append(
            _Site(
                name,
                module._analog.number,
                site.in_sizes,
                site.out_sizes,
                shape if lowered.op == "conv" else matrix,
                read_record(NoiseModel, found["noise_model"], "noise_model"),
                factor and read_record(BaseDriftCompensation, factor, "compensation"),
                target.to(device),
                *(None if part is None else part.to(device) for part in limits),
            )
        )
    if saved:
        raise CheckpointError(
            f"{folder} is the chip of another model: {sorted(saved)[0]} is no site of it"
        )
    return Device(sites, record["seed"])


def key(*parts: object) -> int:
    """A seed below 2^63 that depends on every part."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class _Draws:
    """The random numbers of one step of one block of devices."""

    def __init__(self, block: str, step: str) -> None:
        self.block, self.step = block, step
        self.count = itertools.count()

    def __call__(self, like: Tensor, name: str = "") -> Tensor:
        parts = (self.block, name) if name else (self.block, self.step, next(self.count))
        # ATen's own normal values depend on the instruction set. These are made of integers and of
        # float64, but for one in some thousands, which takes a logarithm in float64.
        from numpy.random import SFC64, Generator  # late: only a chip needs it

        values = _buffer(like.numel())
        Generator(SFC64(key(*parts))).standard_normal(out=values.numpy())
        return values.to(like, copy=True).view(like.shape)


def _buffer(size: int) -> Tensor:
    """A thread's own memory for so many values: what is new costs more than what is drawn."""
    held: Tensor | None = getattr(_thread, "values", None)
    if held is None or size > len(held):
        with torch.inference_mode(False):
            held = _thread.values = torch.empty(max(size, _BLOCK), dtype=torch.float64)
    return held[:size]


_thread = threading.local()


_BLOCK = 1 << 16
"""Devices of a tile that are computed at a time. Part of what a chip is: never tuned.

Small enough for a cache, and large enough that calls do not cost more than arithmetic.
"""


class _Block(NamedTuple):
    """A part of a tile whose devices are computed at a time."""

    key: str
    place: tuple[slice, slice]
    """Of its weights in the tile."""
    goal: Tensor
    """(n, o, i) conductances that its devices were asked to hold."""
    scale: Tensor
    """What the converter must know of its weights."""


class _Tile:
    """The devices of one tile of a site."""

    def __init__(self, site: _Site, key: str, of_site: tuple[slice, slice]) -> None:
        self.key, self.model, self.target = key, site.model, site.target[of_site]
        self.scale = site.model.g_converter.scale(self.target)

    def blocks(self) -> Iterator[_Block]:
        """Blocks of whole rows, or of a part of one."""
        outputs, inputs = self.target.shape
        converter = self.model.g_converter
        width = max(min(inputs, _BLOCK), 1)
        height = max(_BLOCK // (width * converter.devices), 1)
        places = itertools.product(_pieces(outputs, height), _pieces(inputs, width))
        for number, place in enumerate(places):
            # A scale of every row has the rows where the weights have them.
            scale = self.scale if self.scale.dim() < 2 else self.scale[..., place[0], :]
            goal = converter.conductances(self.target[place], scale)
            yield _Block(f"{self.key}/{number}", place, goal, scale)

    def reading(
        self, block: _Block, seconds: float, read: int, by_product: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Conductances (n, o, i) of a block: as programmed, and as a reading finds them.

        Args:
            by_product: leave read noise to the products, and return its standard deviation, too;
                None for no read noise.
        """
        model, shape = self.model, block.goal.shape
        target = block.goal.flatten(1)
        programmed = model.programmed(target, _Draws(block.key, "program"))
        exponents = model.drift(target, _Draws(block.key, "drift"))
        draws = _Draws(block.key, f"read/{seconds!r}/{read}")
        spread = None
        if by_product:
            now, spread = model.reading(programmed, exponents, seconds, draws)
        else:
            now = model.at(programmed, exponents, seconds, draws)
        return (
            programmed.view(shape),
            now.view(shape),
            None if spread is None else spread.view(shape),
        )


def _pieces(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _calls(text: str, device: torch.device) -> Tensor:
    """What counts the products of a site in one reading, from a seed on."""
    with torch.inference_mode(False):  # or no product outside of that mode could count
        return torch.tensor(key(text), device=device)


def key_of(path: str, site: AnalogSite) -> str:
    """What a chip knows a site by: its module's path and what it multiplies by."""
    return ".".join(filter(None, (path, site.state.prefix + site.name)))


def _products(analog: nn.Module) -> Iterator[tuple[str, AnalogModule, AnalogSite, Lowered]]:
    """Every site of a model: its name, module, and the fused op that it is in evaluation.

    Raises:
        CaptureError: a site has none.
    """
    for path, module, site in required_sites(analog):
        name = key_of(path, site)
        yield name, module, site, _lowered(name, module, site, training=False)


def _lowered(name: str, module: AnalogModule, site: AnalogSite, training: bool) -> Lowered:
    """The fused op that a site is in a mode.

    Raises:
        CaptureError: it is none.
    """
    placement = module._analog
    program = next(p for (mode, _), p in placement.programs.items() if mode == training)
    lowered = program.lowered[placement.sites.index(site)]
    if lowered is None:
        raise CaptureError(f"{name}: its chain of ops is not one that lower knows")
    return lowered


def _slices(sizes: tuple[int, ...]) -> list[slice]:
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _read_folder(folder: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """A folder's record and tensors, once they have proved whole."""
    try:
        record = json.loads((folder / CHIP_FILE).read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            raise ValueError(f"schema {record['schema']!r}, expected {SCHEMA}")
        file, checksum = record["tensors"]["file"], record["tensors"]["sha256"]
        if not files.tensor_file("chip").fullmatch(file):
            raise ValueError(f"{file!r} is no name of a file of tensors")
        if not isinstance(record["seed"], int):
            raise ValueError("the seed is no whole number")
        for site in record["sites"]:
            for part in ("name", "in_sizes", "out_sizes", "noise_model", "compensation"):
                site[part]
    except OSError:
        raise CheckpointError(
            f"{folder}: no {CHIP_FILE}; expected a folder that Device.save() wrote"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CHIP_FILE} is damaged: {error}") from error
    if not (folder / file).is_file():
        raise CheckpointError(f"{folder}: no {file}")
    if files.sha256(folder / file) != checksum:
        raise CheckpointError(f"{folder / file} is damaged: its checksum does not match")
    try:
        return record, load_file(str(folder / file))
    except SafetensorError as error:
        raise CheckpointError(f"{folder / file} is damaged: {error}") from error
