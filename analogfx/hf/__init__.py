"""Hugging Face: analog models in ``save_pretrained`` and ``from_pretrained``, Trainer and PEFT.

Importing this module registers the format with transformers. Needs the extra ``hf``.
"""

from analogfx.hf.config import AnalogConfig
from analogfx.hf.quantizer import AnalogQuantizer
from analogfx.hf.trainer import AnalogCallback

__all__ = ["AnalogCallback", "AnalogConfig", "AnalogQuantizer"]
