"""take_part: a fused site computes the part of its product that this process holds the weights of.

What a part needs besides its own sizes are scalars of the site: where it stands in the whole, and
who holds the rest of its tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph

from analogfx import ops
from analogfx.kernels.part import Part
from analogfx.kernels.spec import MVMSpec, encode
from analogfx.passes.chain import role
from analogfx.passes.contract import Context
from analogfx.passes.sites import fused_sites


@dataclass(frozen=True)
class Share:
    """What one of several processes computes of a product."""

    part: Part
    in_sizes: tuple[int, ...]
    """Of its tiles along the inputs."""
    out_sizes: tuple[int, ...]
    """Of its rows in every tile along the outputs."""
    peers: str
    """Name of the group of processes that hold rows of the same tiles; empty if none do."""
    sums: str
    """Name of the group of processes that multiply the same inputs; empty if none do."""


def take_part(graph: Graph, context: Context, share: Share) -> int:
    """Cut every fused site down to a part; all of a graph's sites are cut alike.

    Returns:
        The number of sites that were not.
    """
    sizes = list(share.in_sizes)
    count = 0
    for site in list(fused_sites(graph)):
        clips = site.node.args[4] is not None
        spec = _cut(site.spec, share, clips)
        if spec == site.spec:
            continue
        site.node.args = (*site.node.args[:-1], encode(spec))
        count += 1
        for node in graph.nodes:
            if node.meta.get("made", (None,))[0] != site.node.meta["made"][0]:
                continue
            if node.target is ops.checked:
                node.update_arg(3, sum(sizes))
            elif role(node) == "update_range":
                node.update_arg(7, sizes)
    return count


def _cut(spec: MVMSpec, share: Share, clips: bool) -> MVMSpec:
    """Scalars of a part. A site that needs not know that it is one can run by more kernels."""
    peers = share.peers if _scales_by_tile(spec) else ""
    aware = spec.noise_std or spec.out_noise or peers or (clips and spec.keep)
    return spec._replace(
        in_sizes=list(share.in_sizes),
        out_sizes=list(share.out_sizes),
        part=list(share.part) if aware else (),
        peers=peers,
        sums=share.sums if spec.keep else "",
    )


def _scales_by_tile(spec: MVMSpec) -> bool:
    """Whether something is scaled by the largest weight of a whole tile."""
    strengths = (
        (spec.weight_states, spec.weight_per_channel),
        (spec.noise_std, spec.noise_per_channel),
        (spec.out_noise, spec.out_noise_per_channel),
        (spec.out_bound, spec.bound_per_channel),
    )
    return any(strength and not per_channel for strength, per_channel in strengths)
