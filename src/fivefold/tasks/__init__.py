"""Tasks: quality scores on real data, taken through an engine's session.

What lives here: one small file per task, the texts they read, and the statistics of comparing two models item by
item. A task takes a `Session` and returns a `Measurement` together with its per-item results, so that two candidates
can be compared paired. What may not: measuring a resource, or knowing a technique or a recipe.
"""
