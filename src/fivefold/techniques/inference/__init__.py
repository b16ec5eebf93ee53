"""Inference stage: compression (pruning, quantization, distillation) and dynamic acceleration. One technique per file, none edited to add the next."""
