"""The networks: one file each, complete in itself, because a copy of it is published with each checkpoint.

A new network is one file here and one line below; `tests/models/test_models.py` then runs on it.
"""

from hfgen.models.unet_attention import UNetAttention
from hfgen.models.unet_base import UNetBase


__all__ = ["UNetAttention", "UNetBase"]
