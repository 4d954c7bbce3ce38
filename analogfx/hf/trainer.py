"""transformers' ``Trainer`` on analog models."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, trainer

from analogfx.distributed import Preparation, keep_decay_off_ranges, prepare_training
from analogfx.modules.sites import sites


class AnalogCallback(TrainerCallback):
    """Trains analog layers as their configs say: ``Trainer(..., callbacks=[AnalogCallback()])``.

    When training begins it calls :func:`analogfx.prepare_training`: after every step weights are
    clipped, input ranges are those of the data of all processes, and their decay does not depend on
    the accumulation of gradients. Weight decay, which Trainer gives to every parameter that is no
    bias or norm, is kept off ranges and learned clips. When training ends all of it ends.

    Checkpoints of Trainer hold ranges and their statistics. Training that is resumed goes on as if
    it had not been interrupted, bit by bit.

    Args:
        exact: see :func:`analogfx.prepare_training`.

    Example:
        >>> Trainer(analog, args, train_dataset=data, callbacks=[analogfx.hf.AnalogCallback()])
    """

    def __init__(self, exact: bool = True) -> None:
        self.exact = exact
        self._preparation: Preparation | None = None
        self._decay: list[RemovableHandle] = []

    def on_train_begin(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
        """Prepare the optimizer that Trainer made, after a checkpoint was loaded.

        Raises:
            TypeError: the model has no analog layer.
        """
        self._end()
        self._preparation = prepare_training(optimizer, model, exact=self.exact)
        self._decay = keep_decay_off_ranges(optimizer, model)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Let the model train by itself again."""
        self._end()

    def _end(self) -> None:
        if self._preparation is not None:
            self._preparation.remove()
            self._preparation = None
        for handle in self._decay:
            handle.remove()
        self._decay = []


class _Reminder(TrainerCallback):
    """Warns of an analog model that Trainer trains without :class:`AnalogCallback`."""

    def on_step_end(self, args: Any, state: Any, *_: Any, model: Any, **__: Any) -> None:
        """Look once, after the first step: callbacks that come later have begun by then."""
        if not getattr(self, "_looked", False):
            self._looked = True
            if missed := list(_missed(args, model)):
                warnings.warn(
                    f"Trainer trains an analog model without analogfx.hf.AnalogCallback(): "
                    f"{', '.join(missed)}. Add it to callbacks",
                    stacklevel=2,
                )


def _missed(args: Any, model: nn.Module) -> Iterator[str]:
    """What is not as the configs say, unless training was prepared."""
    configs = [module._analog.resolved for _, module, _ in sites(model)]
    ranges = [config for config in configs if config.has_state and not config.collects]
    if any(c.clip_sigma and not c.collects for c in configs) and not any(
        c.collects for c in configs
    ):
        yield "weights are not clipped"
    if ranges and args.weight_decay:
        yield "weight decay shrinks input ranges"
    if ranges and args.gradient_accumulation_steps > 1:
        yield "the decay of input ranges is added once a micro-batch"
    if ranges and args.world_size > 1:
        yield "every process has its own input ranges"


trainer.DEFAULT_CALLBACKS.append(_Reminder)
