"""``colora compare``."""

# pyright: reportMissingImports=false
# (in a checkout the other packages lie beside this one, where a type checker does not look)

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .exit_codes import STOPPED
from .recipes import find_recipe

if TYPE_CHECKING:
    from rich.table import Table

    from colora.simulation.cells import Result
    from colora.simulation.method_comparison import Comparison


def compare(
    recipe: Annotated[str, typer.Argument(show_default=False)] = "demo",
    methods: Annotated[
        str, typer.Option(help="Methods; +lora or +multilora adds a private adapter. The first is the reference.")
    ] = "local,fedit,colora",
    seeds: Annotated[str, typer.Option(help="Seeds, as 0-4 or 0,2,5.")] = "0",
    set_: Annotated[list[str] | None, typer.Option("--set", help="Set a recipe key in all runs. Repeatable.")] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(help="Values to choose from for each method, as train.lr=1e-3,5e-3. Repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs. Default: runs/compare-NAME.")] = None,
) -> None:
    """Compare methods on one recipe.

    Every method runs at every seed, on the same rows. With --grid each method first chooses its settings on training
    rows that are held out; no test row is used. The same command continues an interrupted comparison.
    """
    from rich.console import Console

    from colora.common.config.loader import load_recipe
    from colora.simulation.method_comparison import Grid, points_of, seeds_of, write_results

    path, console = find_recipe(recipe), Console()
    folder = out or Path("runs") / f"compare-{load_recipe(path, tuple(set_ or ())).name}"
    arms = list(dict.fromkeys(methods.split(",")))
    cells = Grid(path, tuple(set_ or ()), arms, points_of(grid or ()), seeds_of(seeds), folder)
    console.print(f"{cells.size} runs in {folder}", highlight=False)
    try:
        compared = cells.run(lambda *told: console.print(_line(*told), highlight=False, soft_wrap=True))
    except KeyboardInterrupt:
        typer.echo("Stopped. The same command continues from the last completed round.", err=True)
        raise typer.Exit(STOPPED) from None
    write_results(compared, folder)
    for each in compared if grid else ():
        console.print(f"{each.cell.arm}: {', '.join(each.cell.point)}, the best on held-out rows", highlight=False)
    console.print(_table(compared))
    console.print(f"Results: {folder / 'results.csv'}\nReport: {folder / 'report.html'}", highlight=False)


def _line(result: Result, ran: bool, number: int, size: int) -> str:
    took = f"{result.seconds:.0f} s" if ran else "finished before"
    return f"{number}/{size} {result.cell.name}: {result.mean:.3f}, {took}"


def _table(compared: Sequence[Comparison]) -> Table:
    """Return the final table: the mean of the primary metric of the sites' final models."""
    from rich import box
    from rich.table import Table

    first = compared[0].cell.arm
    over = "seeds" if len(compared[0].results) > 1 else "sites"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=f"± standard error over {over}", caption_justify="left")
    for column in ("method", "mean", f"gain over {first}", "better", "worse", "MB", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=column == "method")
    for each in compared:
        reference = each is compared[0]
        table.add_row(
            each.cell.arm,
            _with_error(*each.mean),
            "" if reference else _with_error(*each.gain, signed=True),
            *(("", "") if reference else (str(each.better), str(each.worse))),
            f"{sum(result.bytes for result in each.results) / len(each.results) / 1e6:.1f}",
            f"{sum(result.seconds for result in each.results) / len(each.results):.0f}",
        )
    return table


def _with_error(value: float, error: float | None, *, signed: bool = False) -> str:
    return f"{value:{'+' if signed else ''}.3f}" + (f" ± {error:.3f}" if error is not None else "")
