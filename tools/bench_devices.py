"""What a benchmark runs on: the device's clock, its memory, and what its figures depend on."""

import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

Row = dict[str, Any]
Call = Callable[[], None]


class Sample(NamedTuple):
    """Milliseconds of one call."""

    ms: float
    host_ms: float
    """Until the call returned, whether or not the device was done."""


class Cpu:
    """The processor, in float32 and with a thread for every core."""

    name = "cpu"
    place = "cpu"
    dtype = torch.float32

    def prepare(self) -> None:
        """Bring this process into the state in which everything is measured."""
        torch.set_num_threads(os.cpu_count() or 1)

    def measure(self, call: Call, before: Sample | None) -> Sample:
        """Time one call.

        Args:
            before: what the same call took the last time.
        """
        start = time.perf_counter()
        call()
        elapsed = 1e3 * (time.perf_counter() - start)
        return Sample(elapsed, elapsed)

    def synchronize(self) -> None:
        """Wait for all that was queued; its errors are raised here."""

    def described(self) -> Row:
        """What names the device and the software below torch."""
        return {}


class SmallLayers(Cpu):
    """The processor again: layers so small that the calls cost more than the arithmetic."""

    name = "cpu-small"


class Recurrent(Cpu):
    """The processor again: recurrent layers."""

    name = "cpu-recurrent"


class Experts(Cpu):
    """The processor again: mixtures of experts."""

    name = "cpu-experts"


class Cuda:
    """A GPU, in bfloat16."""

    name = "cuda"
    dtype = torch.bfloat16

    CYCLES = 2_000_000
    """About a millisecond of a GPU's clock."""

    LONGEST = 100
    """Milliseconds that the device waits at most: a first call compiles for seconds."""

    CACHE = 256 << 20
    """Bytes that are written before a call: several times any L2 cache, to leave nothing in it."""

    def __init__(self, api: Any = torch.cuda, place: str = "cuda") -> None:
        """The current GPU. Tests give a stand-in for ``torch.cuda``, and another place."""
        self.api = api
        self.place = place
        self.cache = torch.empty(self.CACHE, dtype=torch.int8, device=place)

    def prepare(self) -> None:
        """Nothing: the clocks and settings of a GPU are measured as they are found."""

    def measure(self, call: Call, before: Sample | None) -> Sample:
        """Time one call by events, from an empty cache.

        The device first waits for twice as long as the host took to queue the call before, so that
        what is timed is the device's work and not the host's. Where a call waits for the device in
        its middle, the host's time from there on shows, as it does in use.
        """
        self.synchronize()
        start, end = (self.api.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        wait = 1 + 2 * before.host_ms if before else 1
        self.api._sleep(int(self.CYCLES * min(wait, self.LONGEST)))
        start.record()
        begun = time.perf_counter()
        call()
        host_ms = 1e3 * (time.perf_counter() - begun)
        end.record()
        end.synchronize()
        return Sample(start.elapsed_time(end), host_ms)

    def synchronize(self) -> None:
        """Wait for all that was queued; its errors are raised here."""
        self.api.synchronize()

    def described(self) -> Row:
        """GPU, driver, CUDA and triton."""
        return {
            "gpu": self.api.get_device_name(),
            "driver": driver(),
            "cuda": torch.version.cuda,
            "triton": installed("triton"),
        }

    def peak_bytes(self, call: Call) -> int:
        """Most memory that a call holds at once, beyond what was held before it."""
        self.synchronize()
        self.api.reset_peak_memory_stats()
        held = self.api.memory_allocated()
        call()
        self.synchronize()
        return self.api.max_memory_allocated() - held

    def host_syncs(self, call: Call) -> int:
        """How often a call makes the host wait for the device."""
        try:
            self.api.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                call()
            found = sum("called a synchronizing" in str(warning.message) for warning in seen)
            if not found:  # a warning may get lost on its way from another thread, an error not
                self.api.set_sync_debug_mode("error")
                try:
                    call()
                except RuntimeError as error:
                    if "called a synchronizing" not in str(error):
                        raise
                    found = 1
        finally:
            self.api.set_sync_debug_mode("default")
        return found


Device = Cpu | Cuda


def driver() -> str | None:
    """The version of NVIDIA's driver, None where nothing says."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.split("\n")[0].strip() or None


def installed(package: str) -> str | None:
    """The version of a package, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The name that the processor gives itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
