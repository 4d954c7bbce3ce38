"""Hugging Face: analog models in ``save_pretrained`` and ``from_pretrained``, Trainer and PEFT.

Importing this module registers the format with transformers. Needs the extra ``hf``.
"""

from analogfx.hf.config import AnalogConfig
from analogfx.hf.lora import lora_in_tiles
from analogfx.hf.quantizer import AnalogQuantizer
from analogfx.hf.trainer import AnalogCallback

__all__ = ["AnalogCallback", "AnalogConfig", "AnalogQuantizer", "lora_in_tiles"]
