"""Finetuning stage: adapting weights: masks, adapters, full-parameter under limited memory.

One technique per file; none is edited to add the next.
"""
