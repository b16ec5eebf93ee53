"""Every error a user can meet.

    FivefoldError
    ├─ UserError            exit 2   the input is at fault; one sentence: what, why, what to do
    │  ├─ BudgetError                a budget or allowance that does not parse
    │  ├─ DataError                  text, labels or workload files
    │  ├─ ModelError                 a model folder or file that cannot be read or treated
    │  ├─ MissingExtra               an optional package; carries the install line
    │  ├─ RecipeError                a recipe that does not parse
    │  │  └─ Misfit                  a recipe whose techniques do not fit together, with the shortest repair
    │  ├─ StoreError                 an artifact changed by hand, a full quota, no write permission
    │  └─ Busy                       another process holds this study or run
    ├─ Infeasible           exit 3   nothing meets the budget; names the nearest misses
    ├─ Departure            exit 4   a shipped copy does not measure like its trial
    └─ TrialFailure         exit 2   a typed outcome of one trial; the study keeps it and goes on (alone, it ends)
       ├─ OutOfMemory  TimedOut  Crashed  NotFinite

Anything else that is raised is a bug of ours and keeps its traceback.
"""


class FivefoldError(Exception):
    exit_code = 1


class UserError(FivefoldError):
    exit_code = 2


class BudgetError(UserError):
    pass


class DataError(UserError):
    pass


class ModelError(UserError):
    pass


class RecipeError(UserError):
    pass


class Misfit(RecipeError):
    pass


class StoreError(UserError):
    pass


class Busy(UserError):
    pass


class MissingExtra(UserError):
    """`MissingExtra("openvino_genai", extra="openvino")` tells the exact line that installs it."""

    def __init__(self, package: str, *, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'fivefold[{extra}]'")


class Infeasible(FivefoldError):
    exit_code = 3


class Departure(FivefoldError):
    exit_code = 4


class TrialFailure(FivefoldError):
    exit_code = 2
    outcome = "failed"


class OutOfMemory(TrialFailure):
    outcome = "out of memory"


class TimedOut(TrialFailure):
    outcome = "timed out"


class Crashed(TrialFailure):
    outcome = "crashed"


class NotFinite(TrialFailure):
    outcome = "not finite"
