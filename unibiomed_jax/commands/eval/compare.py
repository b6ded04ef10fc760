"""`unibiomed eval compare`: by how much one run is better than another."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from unibiomed_jax.commands.eval.options import CompareOptions
from unibiomed_jax.commands.eval.printing import console, number
from unibiomed_jax.commands.run import DONE
from unibiomed_jax.files import shown


def compare(options: CompareOptions) -> int:
    """Run `unibiomed eval compare`."""
    from unibiomed_jax.evaluation import scoring
    from unibiomed_jax.evaluation.compare import compare as compare_runs
    from unibiomed_jax.evaluation.compare import write_csv
    from unibiomed_jax.evaluation.page import write_comparison

    runs = [scoring.read_run(run, ()) for run in (options.first, options.second)]
    differences, alone = compare_runs(*runs, (options.first, options.second))
    table = Table(title="second minus first, the same patients drawn for both", title_justify="left")
    for column in (
        "task",
        "dataset",
        "target",
        "score",
        "first",
        "second",
        "difference",
        "95 % interval",
        "n",
    ):
        table.add_column(
            column, justify="left" if column in ("task", "dataset", "target", "score") else "right"
        )
    datasets = {(found.task, found.difference.dataset) for found in differences}
    for found in differences:
        if found.difference.target is not None and not options.targets:
            continue
        if found.difference.target is None and found.difference.dataset is not None:
            if sum(task == found.task for task, _ in datasets) == 2:  # the whole, and this one
                continue
        low, high = found.difference.interval or (None, None)
        table.add_row(
            found.task,
            escape(shown(found.difference.dataset or "all")),
            escape(shown(found.difference.target or "all")),
            found.difference.score,
            number(found.first.value),
            number(found.second.value),
            f"{found.difference.value:+.4f}{' *' if found.certain else ''}",
            "-" if low is None else f"{low:+.4f} to {high:+.4f}",
            str(found.difference.cases),
        )
    console.print(table)
    console.print("* the interval leaves out 0; - fewer than 5 patients")
    for task, count in alone.items():
        if count:
            console.print(f"{task}: {count} records were scored in one run only, and are left out.")
    if options.csv is not None:
        write_csv(options.csv, differences)
    if options.page is not None:
        write_comparison(options.page, differences, (options.first, options.second))
    return DONE
