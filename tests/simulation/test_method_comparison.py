"""Methods are compared on the same rows, each with settings that were chosen without a test row."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import pytest
import tomli_w
from typer.testing import CliRunner

from colora.cli import app
from colora.common.config.loader import load_recipe
from colora.common.errors import ConfigError
from colora.server.reporting.summary import summarize
from colora.simulation.cells import Cell, Result
from colora.simulation.method_comparison import Grid, points_of, seeds_of, write_results
from colora.simulation.run import simulate
from tests.conftest import WORDS, write_lines

POINTS = points_of(["train.lr=1e-2,5e-2"])


@pytest.fixture
def recipe(tiny_recipe: dict, tmp_path: Path) -> Path:
    """A recipe whose test rows are in files of their own, and have a word that no training row has."""
    for site in tiny_recipe["site"]:
        labels = {json.loads(line)["label"] for line in Path(site["source"]).read_text().splitlines()}
        rows = [{"text": f"unseen {word}", "label": label} for word in WORDS[:4] for label in sorted(labels)]
        site["test_source"] = str(write_lines(tmp_path / f"{site['name']}-test.jsonl", rows))
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(tiny_recipe))
    return path


def test_the_table_has_the_results_of_single_runs(recipe: Path, tmp_path: Path) -> None:
    told: list[tuple[str, bool]] = []
    grid = Grid(recipe, (), ("local", "colora+lora"), POINTS, (0, 3), tmp_path / "out")
    compared = grid.run(lambda result, ran, number, size: told.append((result.cell.name, ran)))
    assert len(told) == grid.size == 2 * 2 * 2 + 2 * 2
    assert all(ran for _, ran in told)
    for comparison in compared:
        for result in comparison.results:
            single = simulate(
                result.cell.recipe(recipe, ()), tmp_path / f"single-{result.cell.arm}-{result.cell.seed}", resume=False
            )
            rows = summarize(single.events()).rows
            assert result.metrics == {site: row.metric("personal") for site, row in rows.items()}
        assert comparison.mean[0] == pytest.approx(statistics.mean(result.mean for result in comparison.results))
    local, colora = compared
    assert local.gain[0] == 0
    differences = [c.mean - x.mean for c, x in zip(colora.results, local.results, strict=True)]
    assert colora.gain[0] == pytest.approx(statistics.mean(differences))
    assert colora.gain[1] == pytest.approx(statistics.stdev(differences) / 2**0.5)
    assert {json.dumps(r.recipe.private.kind) for r in colora.results} == {'"lora"'}
    assert {r.recipe.private.kind for r in local.results} == {"none"}
    write_results(compared, tmp_path / "out")
    with (tmp_path / "out" / "results.csv").open() as file:
        written = {(row["method"], int(row["seed"]), row["site"]): float(row["value"]) for row in csv.DictReader(file)}
    assert written == {
        (r.cell.arm, r.cell.seed, site): value for c in compared for r in c.results for site, value in r.metrics.items()
    }
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000


def test_settings_are_chosen_by_the_best_mean_on_held_out_rows(recipe: Path, tmp_path: Path) -> None:
    results: list[Result] = []
    grid = Grid(recipe, (), ("local",), POINTS, (0, 1), tmp_path / "out")
    (compared,) = grid.run(lambda result, *_: results.append(result))
    tuned = {p: [r.quality for r in results if r.cell.tuning and r.cell.point == p] for p in POINTS}
    means = {point: tuple(map(statistics.mean, zip(*found, strict=True))) for point, found in tuned.items()}
    assert compared.cell.point == max(means, key=means.__getitem__)
    for result in results:
        texts = [path.read_text() for path in result.run.path.rglob("data/*.jsonl")]
        assert any("unseen" in text for text in texts) is not result.cell.tuning


def test_a_finished_run_is_never_repeated(recipe: Path, tmp_path: Path) -> None:
    def run(stop: int) -> list[tuple[str, bool]]:
        told: list[tuple[str, bool]] = []

        def report(result: Result, ran: bool, number: int, size: int) -> None:
            told.append((result.cell.name, ran))
            if number == stop:
                raise KeyboardInterrupt

        grid = Grid(recipe, (), ("local", "colora"), POINTS, (0,), tmp_path / "out")
        grid.run(report)
        return told

    for stop in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            run(stop)
    told = run(99)
    assert [ran for _, ran in told] == [False] * 4 + [True] * 2
    logs = list((tmp_path / "out").rglob("events.jsonl"))
    assert len(logs) == 6
    for log in logs:
        assert [json.loads(line)["event"] for line in log.read_text().splitlines()].count("started") == 1


def test_another_recipe_in_the_same_folder_is_refused(recipe: Path, tmp_path: Path) -> None:
    Grid(recipe, (), ("local",), [()], (0,), tmp_path / "out").run(lambda *_: None)
    with pytest.raises(ConfigError, match=r"train\.steps"):
        Grid(recipe, ("train.steps=1",), ("local",), [()], (0,), tmp_path / "out").run(lambda *_: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "local,fedavg"], "Did you mean 'fedit'?"),
        (["--methods", "colora+private"], "private"),
        (["--seeds", "a-b"], "--seeds a-b is not of the form 0-4 or 0,2,5."),
        (["--grid", "train.lr"], "--grid train.lr is not KEY=VALUE,VALUE."),
        (["--grid", "train.rl=1,2"], "train.rl"),
    ],
)
def test_wrong_options_are_named_before_a_run(arguments: list[str], message: str, recipe: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", str(recipe), "--out", str(tmp_path / "out"), *arguments])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_a_table(recipe: Path, tmp_path: Path) -> None:
    arguments = ["compare", str(recipe), "--methods", "local,colora", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "2 runs in" in result.output
    assert "gain over local" in result.output
    again = CliRunner().invoke(app, arguments)
    assert again.output.count("finished before") == 2


def test_seeds_and_points() -> None:
    assert seeds_of("0-2,5,1") == [0, 1, 2, 5]
    assert points_of(["a=1,2", "b=x"]) == [("a=1", "b=x"), ("a=2", "b=x")]
    assert points_of([]) == [()]
    assert Cell("colora", ("train.lr=1e-2",), 3, tuning=True).folder == Path("tuning/colora/train.lr=1e-2/seed-3")


def test_measuring_on_validation_rows_needs_some(recipe: Path, tmp_path: Path) -> None:
    settings = load_recipe(recipe, ('data.evaluate_on="validation"',))
    with pytest.raises(Exception, match=r"data\.evaluate_on: expected validation rows, found none"):
        simulate(settings, tmp_path / "run", resume=False)
