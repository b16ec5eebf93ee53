"""The command line: each verb is one public function of `fivefold.verbs`, shown by `fivefold.display`. No logic here.

Exit codes: 0 done; 2 bad input, one sentence; 3 nothing meets the budget; 4 a shipped copy departs from its trial;
130 stopped by the user (the same command resumes).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fivefold.errors import FivefoldError

app = typer.Typer(
    help="Make a language model cheaper to own, and prove it.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode=None,
)

ModelName = Annotated[str, typer.Argument(help="Hugging Face folder, GGUF file, artifact folder or bundled name.")]
StudyFolder = Annotated[Path, typer.Argument(help="Folder of a study, as given to optimize --out.")]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a study or of a training run: its --out.")]
BudgetText = Annotated[str, typer.Option("--budget", help='Limits on the result: "memory<=260MB, agreement>=0.85".')]
Objectives = Annotated[str, typer.Option("--minimize", help="Metrics to improve and trade off, comma-separated.")]
AllowanceText = Annotated[str, typer.Option("--allowance", help='Limits on the search: "8min", "1h, 50Wh, 4GB".')]
WorkloadName = Annotated[str, typer.Option("--workload", help="chat, summarize, batch, or a JSONL file.")]
TextSource = Annotated[str, typer.Option("--text", help="Held-out text: encyclopedia, shakespeare or a file.")]
Tasks = Annotated[list[str] | None, typer.Option("--task", help="Labelled task (piqa) or JSONL; may be repeated.")]
Items = Annotated[int, typer.Option("--items", min=8, help="Items of each task.")]
Attack = Annotated[int, typer.Option("--attack", min=0, help="Items of each task to attack, ~100 passes each.")]
Country = Annotated[str, typer.Option("--country", help="Grid intensity and tariffs: ISO code, or world.")]
Sampler = Annotated[str, typer.Option("--sampler", help="fivefold, random, tpe or nsga2.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the search.")]


@app.command()
def optimize(
    model: ModelName,
    out: Annotated[Path, typer.Option("--out", help="Folder of the study; the same command resumes.")],
    budget: BudgetText = "", minimize: Objectives = "latency,energy,size", allowance: AllowanceText = "30min",
    workload: WorkloadName = "chat", text: TextSource = "encyclopedia", country: Country = "world",
    sampler: Sampler = "fivefold", seed: Seed = 0, task: Tasks = None, items: Items = 100,
    memory: Annotated[str, typer.Option("--memory", help='Cap on each trial: "1GB"; above it, out of memory.')] = "",
) -> None:
    """Search for cheaper recipes within a budget; leaves a measured front, a report and artifacts."""
    from fivefold import display, verbs
    from fivefold.study.feasible import NothingFits

    try:
        with display.LiveStudy() as live:
            study = verbs.optimize(
                model, out=out, budget=budget, minimize=minimize, allowance=allowance, workload=workload, text=text,
                country=country, sampler=sampler, seed=seed, memory=memory, task=task or (), items=items,
                events=live,
            )
    except NothingFits as error:
        display.nothing_fits(error, out)
        raise
    except KeyboardInterrupt:
        print("\nfivefold: stopped; nothing is lost, the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    display.result(study)


@app.command()
def plan(
    model: ModelName, budget: BudgetText = "", minimize: Objectives = "latency,energy,size",
    allowance: AllowanceText = "30min", workload: WorkloadName = "chat", text: TextSource = "encyclopedia",
    task: Tasks = None, items: Items = 100,
) -> None:
    """Show what optimize would do, with predicted time, energy and disk, before spending any."""
    from fivefold import display, verbs

    display.plan(verbs.plan(
        model, budget=budget, minimize=minimize, allowance=allowance, workload=workload, text=text, task=task or (),
        items=items,
    ))


@app.command()
def train(
    model: ModelName,
    data: Annotated[Path, typer.Option("--data", help="Rows to learn, .jsonl or .csv; see above.")],
    out: Annotated[str, typer.Option("--out", help="Folder of the run, by default runs/ and the name of the data; the"
                                                   " same command goes on with it.")] = "",
    budget: Annotated[str, typer.Option("--budget", help='Limits on the run: "memory<=2GB, time<=20min, energy<=5Wh,'
                                                         ' money<=$0.1".')] = "",
    recipe: Annotated[str, typer.Option("--recipe", help='The way, such as "lora(rank=8)"; else one is chosen.')] = "",
    task: Annotated[str, typer.Option("--task", help="accuracy (of the labels), or a set such as sst2.")] = "",
    test: Annotated[str, typer.Option("--test", help="File of rows to judge by, instead of a held-out part.")] = "",
    template: Annotated[str, typer.Option("--template", help='How a label is asked for: "{text}\\nLabel:".')] = "",
    epochs: Annotated[float, typer.Option("--epochs", min=0.001, help="Rounds over the rows.")] = 1.0,
    steps: Annotated[int, typer.Option("--steps", min=0, help="Steps, instead of rounds.")] = 0,
    tokens_per_step: Annotated[int, typer.Option("--tokens-per-step", min=32, help="Tokens of a step.")] = 1024,
    patience: Annotated[int, typer.Option("--patience", min=0, help="End after so many checks (of 5) in vain.")] = 0,
    items: Annotated[int, typer.Option("--items", min=2, help="Rows to judge by, at most.")] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the order of rows and of what is drawn.")] = 0,
) -> None:
    """Fine-tune on your rows within a budget of memory, time, energy or money.

    A row is {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ..., "label": ...}, one JSON object a
    line; or a CSV has the columns text and label. The loss is on answers only. Every way of fine-tuning is forecast
    first, and one that fits is trained. The result, OUT/model, is a model like any other.
    """
    from fivefold import verbs
    from fivefold.display import train as display

    try:
        with display.LiveTraining() as live:
            done = verbs.train(
                model, data=data, out=out, budget=budget, recipe=recipe, task=task, test=test,
                template=template.replace("\\n", "\n"), epochs=epochs, steps=steps, tokens_per_step=tokens_per_step,
                patience=patience, items=items, seed=seed, events=live,
            )
    except KeyboardInterrupt:
        print("\nfivefold: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None
    display.trained(done)


@app.command()
def pick(
    study: StudyFolder, budget: BudgetText = "",
    by: Annotated[str, typer.Option("--by", help="knee, or the one metric to put first.")] = "knee",
) -> None:
    """Choose again from stored trials under another budget; nothing is run."""
    from fivefold import display, verbs

    display.pick(verbs.pick(study, budget=budget, by=by))


@app.command()
def explain(study: StudyFolder) -> None:
    """Marginal effect of each technique, interactions, and what backfired here and why."""
    from fivefold import display, verbs

    display.explanation(verbs.explain(study))


@app.command()
def compare(
    a: ModelName, b: ModelName,
    task: Annotated[str, typer.Option("--task", help="fidelity, a labelled task (piqa), or a JSONL.")] = "fidelity",
    margin: Annotated[float, typer.Option("--margin", help="Loss of quality that is acceptable.")] = 0.01,
    items: Annotated[int, typer.Option("--items", min=8, help="Items (or text windows of 512 tokens) to use.")] = 200,
    workload: WorkloadName = "chat", text: TextSource = "encyclopedia", attack: Attack = 0,
) -> None:
    """Paired verdict on B against A: ACCEPT, REGRESSION or INCONCLUSIVE, quality by subgroup of inputs, and the
    resources side by side."""
    from fivefold import display, verbs

    display.comparison(verbs.compare(
        a, b, task=task, margin=margin, items=items, workload=workload, text=text, attack=attack,
    ))


@app.command()
def ship(
    study: RunFolder, to: Annotated[Path, typer.Option("--to", help="New folder for the shipped model.")],
    budget: BudgetText = "",
    trial: Annotated[int | None, typer.Option("--trial", help="Ship this trial instead of the recommendation.")] = None,
) -> None:
    """Copy the chosen artifact, or the model of a training run, measure the copy again, write its card; refuses if it
    departs."""
    from fivefold import display, verbs

    display.shipped(verbs.ship(study, to=to, budget=budget, trial=trial))


@app.command()
def serve(
    model: ModelName, host: Annotated[str, typer.Option("--host")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8080,
    key: Annotated[str | None, typer.Option("--key", envvar="FIVEFOLD_KEY", help="Bearer key to ask for.")] = None,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Requests that may wait; more get 429.")] = 16,
) -> None:
    """Serve over an OpenAI-compatible API with joules, dollars and bytes of every request."""
    from fivefold import verbs

    verbs.serve(model, host=host, port=port, key=key, queue=queue)


@app.command()
def measure(
    model: ModelName, workload: WorkloadName = "chat", text: TextSource = "encyclopedia", country: Country = "world",
    recipe: Annotated[str, typer.Option("--recipe", help="Run-time techniques to measure under.")] = "",
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=1000)] = 5,
    quality: Annotated[bool, typer.Option("--quality/--no-quality", help="Log-loss on held-out text.")] = True,
    task: Tasks = None, items: Items = 100, attack: Attack = 0,
) -> None:
    """Five resources and quality of any model folder, GGUF file or artifact, each number with its method."""
    from fivefold import display, verbs

    display.measurement(verbs.measure(
        model, workload=workload, text=text, country=country, recipe=recipe, rounds=rounds, quality=quality,
        task=task or (), items=items, attack=attack,
    ))


@app.command()
def doctor(refresh: Annotated[bool, typer.Option("--refresh", help="Calibrate again.")] = False) -> None:
    """The machine: what is measured, what is modelled, achievable rates, and how to improve what is missing."""
    from fivefold import display, verbs

    display.machine(verbs.doctor(refresh=refresh))


@app.command()
def catalogue(
    name: Annotated[str | None, typer.Argument(help="One technique in full.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="The page as Markdown.")] = False,
) -> None:
    """Techniques by stage: resources they aim at, needs and breaks, fields."""
    from fivefold import display, verbs

    entries = verbs.catalogue(name)
    if markdown:
        print(verbs.catalogue_page(entries), end="")
    else:
        display.catalogue(entries)


def main(arguments: list[str] | None = None) -> Any:
    try:
        app(arguments, standalone_mode=True)
    except FivefoldError as error:
        print(f"fivefold: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
