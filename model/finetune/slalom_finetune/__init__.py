"""Fine-tuning of SLA and SALAD attention for Wan2.1.  `python -m slalom_finetune --help` trains and converts."""

from .options import AttentionOptions
from .salad import SaladAttention
from .sla import SparseLinearAttention

__all__ = ["AttentionOptions", "SaladAttention", "SparseLinearAttention"]
