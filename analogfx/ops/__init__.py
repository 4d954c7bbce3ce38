"""The dialect: one ``torch.library`` op for every kind of node, namespace ``analogfx``.

Two levels. *Explicit*: a node for every role (range, DAC, weight modification, MVM, output noise,
ADC), which is what a reader of a graph sees. *Fused*: ``analog_linear``, ``analog_conv`` and
``analog_experts``, a whole site each. Both run, so a pass can be checked by running the graph
before and after it.

Every op is functional (no op writes to its inputs), takes its randomness as (seed, stream), reads
nothing back to the host, and has a fake and an autograd formula. The arithmetic is in
:mod:`analogfx.kernels`; this package only names it to torch, when it is imported.
"""

from analogfx.ops import experts, explicit, flops, fused, held, ranges, recurrence
from analogfx.ops.operands import autocast, checked

flops.register_when_counted()

__all__ = [
    "autocast", "checked", "experts", "explicit", "flops", "fused", "held", "ranges", "recurrence",
]  # fmt: skip
