"""System stage: where and how an artifact runs: engine, threads, batch, offload.

One technique per file; none is edited to add the next.
"""
