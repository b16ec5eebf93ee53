"""Techniques: one file each, in the survey's own taxonomy. The file's name is the technique's public name.

What lives here: a frozen dataclass per file with its teaching docstring, what it needs and breaks, and `apply`.
What may not: a technique that imports another technique, a meter, a task, the study or the report. Shared algebra
goes to `_shared/`. To add one: `techniques/<stage>/<name>.py` and `tests/techniques/<stage>/test_<name>.py`.
"""
