"""Inference stage: compression (pruning, quantization, distillation) and dynamic acceleration.

One technique per file; none is edited to add the next.
"""
