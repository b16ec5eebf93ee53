"""Optimisers other than AdamW, one per file: each is what an update technique puts into the one training loop.

What lives here: a state per parameter and its update, in torch. What may not live here: techniques, loops, models.
"""
