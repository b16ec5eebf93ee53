"""Study: the only room that joins recipes, meters and tasks.

What lives here: trials and their store, the Pareto front, samplers, the cost predictor, the worker that runs one trial
in its own process. What may not: drawing, serving, or a technique's own knowledge.
"""
