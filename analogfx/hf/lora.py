"""LoRA adapters whose product is part of the analog weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from analogfx.errors import PlacementError
from analogfx.modules.analog_module import AnalogModule


def lora_in_tiles(model: nn.Module) -> int:
    """Let LoRA adapters change the weights of the analog layers that they stand beside, in place.

    By itself PEFT adds to an analog product a digital one: ``analog(W, x) + scale * B (A x)``. The
    chip that ``merge_and_unload()`` is for computes ``analog(W + scale * B A, x)``, with one
    converter, one clip and one noise for both. After this call the layers compute that in training
    and in evaluation, so that merging changes nothing. What PEFT saves and loads stays the same;
    call this again after adapters were added or loaded.

    Args:
        model: what ``get_peft_model`` or ``PeftModel.from_pretrained`` gave, of an analog model or
            made analog afterwards. Layers without an analog base stay as they are.

    Returns:
        How many layers have adapters in their weights.

    Raises:
        PlacementError: an adapter that changes more than the weight: it has dropout, a bias, or is
            a variant such as DoRA. Nothing is changed.
        TypeError: no LoRA adapter stands beside an analog layer.

    Example:
        >>> model = get_peft_model(analog, LoraConfig(target_modules=["q_proj", "v_proj"]))
        >>> analogfx.hf.lora_in_tiles(model)
    """
    from peft.tuners.lora import Linear

    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Linear) and isinstance(module.get_base_layer(), AnalogModule)
    }
    if not found:
        raise TypeError(f"{type(model).__name__} has no LoRA adapter beside an analog layer")
    for path, module in found.items():
        _check(path, module)
    for module in found.values():
        if not isinstance(module, _in_tile()):
            module.__class__ = _in_tile()
    return len(found)


def _check(path: str, module: Any) -> None:
    """Refuse an adapter that is no change of the weight."""
    for name in module.lora_A:
        dropout = not isinstance(module.lora_dropout[name], nn.Identity)
        reasons = {
            "lora_dropout": dropout,
            "lora_bias": module.lora_bias[name],
            "a variant such as DoRA": name in module.lora_variant,
        }
        for reason, found in reasons.items():
            if found:
                raise PlacementError(
                    f"{path}: the adapter {name!r} has {reason}, which no weight can hold: make it "
                    "without, or leave it beside the analog layer"
                )


_CLASSES: list[type] = []


def _in_tile() -> Any:
    """The class of PEFT's linear layers whose adapters are in the weight, made on first use."""
    if not _CLASSES:
        from peft.tuners.lora import Linear

        class LinearInTile(Linear):
            """A linear layer of PEFT that multiplies once, by the weight and its adapters."""

            adapters_in_weight = True

            def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
                names = [name for name in self.active_adapters if name in self.lora_A]
                if self.disable_adapters or self.merged or not names:
                    return super().forward(x, *args, **kwargs)
                if kwargs.get("adapter_names") is not None:
                    raise ValueError(
                        "adapter_names gives samples of a batch other weights, and a tile has one: "
                        "use set_adapter(), or adapters beside the analog layer"
                    )
                base = self.get_base_layer()
                weight = base.weight
                for name in names:  # as merge() adds them, one after the other
                    weight = (weight + self.get_delta_weight(name)).to(base.weight.dtype)
                return functional_call(base, {"weight": weight}, (x, *args), kwargs)

        _CLASSES.append(LinearInTile)
    return _CLASSES[0]
