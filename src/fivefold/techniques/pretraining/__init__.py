"""Pretraining stage: how weights come to be: distributed training, precision, data, objectives.

One technique per file; none is edited to add the next.
"""
