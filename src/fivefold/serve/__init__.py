"""Serve: an artifact behind an OpenAI-compatible endpoint, with joules, dollars and bytes on every answer.

What lives here: the wire format, the one worker that owns the engine session, the bill of a request. What may not:
anything of the search; this room reads a model or an artifact and knows of no study.

    serve("runs/demo/artifacts/ab12...", port=8080)
"""

from fivefold.serve.server import serve as serve
