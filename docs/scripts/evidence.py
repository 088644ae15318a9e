"""Writes the tables and curves of docs/evidence.md from the results in ``benchmarks/results``.

python docs/scripts/evidence.py [--check]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from curves import Point, draw

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "evidence.md", ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "assets"
BEGIN, END = "<!-- {name}: written by docs/scripts/evidence.py -->", "<!-- end of {name} -->"
RATES = {  # recipe → arm of CoLoRA, without its rate
    "demo": "colora",
    "r8": "colora",
    "mixed": "colora",
    "newsgroups": "colora,rounds=8,train.lr_schedule=cosine",
}
COSINE = "rounds=8,train.lr_schedule=cosine"
PRIVATE = {  # recipe → arms of local-only training, CoLoRA, and CoLoRA with a private adapter
    "demo": ("local,train.lr=5e-3", "colora", "colora+lora,train.private_lr=2e-3"),
    "r8": ("local,train.lr=5e-3", "colora,train.lr=1e-2", "colora+lora,train.lr=1e-2,train.private_lr=2e-3"),
    "mixed": ("local,train.lr=5e-3", "colora", "colora+lora,train.private_lr=2e-3"),
    "newsgroups": (
        f"local,{COSINE},train.lr=2e-3",
        f"colora,{COSINE},train.lr=1e-2",
        f"colora+lora,{COSINE},train.lr=1e-2,train.private_lr=2e-3",
    ),
}
AIRLINES = ("americanair", "jetblue", "southwestair", "united")  # the similar sites of the recipe `mixed`
MODES = ("base", "shared", "personal")
Result = dict[str, Any]


def read(name: str) -> dict[str, dict[int, Result]]:
    """Return a recipe's results by arm and seed."""
    arms: dict[str, dict[int, Result]] = defaultdict(dict)
    for line in (RESULTS / f"{name}.jsonl").read_text().splitlines():
        result = json.loads(line)
        arms[result["arm"]][result["seed"]] = result
    return dict(sorted(arms.items()))


def arms_table(arms: dict[str, dict[int, Result]]) -> list[str]:
    """One row for each arm: the mean over sites at every seed, and mean ± standard deviation over seeds."""
    seeds = sorted({seed for results in arms.values() for seed in results})
    lines = [
        f"| arm | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |",
        f"|---|{'---|' * (len(seeds) + 1)}",
    ]
    for arm, results in arms.items():
        means = {seed: _mean(result) for seed, result in results.items()}
        cells = [f"{means[seed]:.3f}" if seed in means else "" for seed in seeds]
        lines.append(f"| `{arm}` | {' | '.join(cells)} | {_spread(list(means.values()))} |")
    return lines


def gain_table(arms: dict[str, dict[int, Result]], ours: str, baseline: str) -> list[str]:
    """One row for each seed: the mean gain over the baseline ± its standard error over sites, and sites above it."""
    lines = ["| seed | base | baseline | colora | gain | sites above the baseline |", "|---|---|---|---|---|---|"]
    for seed in sorted(arms[ours].keys() & arms[baseline].keys()):
        mine, alone = arms[ours][seed], arms[baseline][seed]
        gains = [site["personal"] - alone["sites"][name]["personal"] for name, site in mine["sites"].items()]
        error = statistics.stdev(gains) / len(gains) ** 0.5
        above = sum(gain > 0 for gain in gains)
        base = statistics.mean(site["base"] for site in mine["sites"].values())
        lines.append(
            f"| {seed} | {base:.3f} | {_mean(alone):.3f} | {_mean(mine):.3f} | {statistics.mean(gains):+.3f} ± "
            f"{error:.3f} | {above} of {len(gains)} |"
        )
    return lines


def regression_table(arms: dict[str, dict[int, Result]]) -> list[str]:
    """One row for each arm: the error over seeds, and the least share of the weight that the similar tasks had."""
    lines = [
        "| arm | seeds | median error | least | greatest | least weight of the similar |",
        "|---|---|---|---|---|---|",
    ]
    for arm, results in arms.items():
        errors = [result["error"] for result in results.values()]
        weight = min(result["weight"] for result in results.values())
        lines.append(
            f"| {arm} | {len(errors)} | {statistics.median(errors):.3f} | {min(errors):.3f} | {max(errors):.3f} | "
            f"{weight:.4f} |"
        )
    return lines


def rows_points(arms: dict[str, dict[int, Result]], ours: str, baseline: str) -> dict[int, tuple[Point, str]]:
    """By number of training rows a site: both methods at the seeds that both have, and the sites above the baseline."""
    found = {}
    for rows in (8, 16, 32, 64, 128):
        limit = "" if rows == 16 else f",data.train={rows}"
        mine, alone = arms[ours + limit], arms[baseline + limit]
        seeds = sorted(mine.keys() & alone.keys())
        pairs = [
            (site["personal"], alone[seed]["sites"][name]["personal"])
            for seed in seeds
            for name, site in mine[seed]["sites"].items()
        ]
        point = Point(str(rows), [_mean(mine[seed]) for seed in seeds], [_mean(alone[seed]) for seed in seeds])
        found[rows] = (point, f"{sum(a > b for a, b in pairs)} of {len(pairs)}")
    return found


def rows_table(found: dict[int, tuple[Point, str]]) -> list[str]:
    """One row for each number of training rows a site: both methods, and the gain ± its standard error over seeds."""
    lines = ["| rows a site | local-only | colora | gain | sites above local-only |", "|---|---|---|---|---|"]
    for rows, (point, above) in found.items():
        error = statistics.stdev(point.gains) / len(point.gains) ** 0.5
        means = f"{statistics.mean(point.alone):.3f} | {statistics.mean(point.ours):.3f}"
        lines.append(f"| {rows} | {means} | {statistics.mean(point.gains):+.3f} ± {error:.3f} | {above} |")
    return lines


def rates_table() -> list[str]:
    """One row for each recipe: CoLoRA at 1e-2 and at the best rate tried, over the seeds that all rates have."""
    lines = ["| recipe | rates tried | seeds | 1e-2 | best |", "|---|---|---|---|---|"]
    for recipe, method in RATES.items():
        arms, rates = read(recipe), ("2e-3", "5e-3", "1e-2", "2e-2")
        named = {rate: arms.get(f"{method},train.lr={rate}") for rate in rates}
        named["1e-2"] = named["1e-2"] or arms.get(method)  # the recipe's own rate
        tried = {rate: results for rate, results in named.items() if results}
        seeds = sorted(set.intersection(*(set(results) for results in tried.values())))
        means = {rate: _average(results, seeds) for rate, results in tried.items()}
        top = max(means, key=lambda rate: means[rate])
        lines.append(
            f"| `{recipe}` | {', '.join(tried)} | {len(seeds)} | {means['1e-2']:.3f} | {means[top]:.3f} at {top} |"
        )
    return lines


def sites_points(arms: dict[str, dict[int, Result]]) -> list[Point]:
    """By number of sites that share one task: CoLoRA and local-only training, at the seeds that both have.

    The accuracy of local-only training does not depend on the number of sites. It was measured at the 16 sites.
    """
    split, points = ",partition.by=iid,partition.sites=", []
    alone = arms[f"local,train.lr=5e-3{split}16"]
    for count in (2, 4, 8, 16):
        mine = arms[f"colora{split}{count}"]
        seeds = sorted(mine.keys() & alone.keys())
        points.append(Point(str(count), [_mean(mine[seed]) for seed in seeds], [_mean(alone[seed]) for seed in seeds]))
    return points


def sites_table(points: list[Point]) -> list[str]:
    """One row for each number of sites that share one task: CoLoRA, and its gain over training at one site alone."""
    lines = ["| sites | colora | gain | seeds |", "|---|---|---|---|"]
    for point in points:
        means = f"{statistics.mean(point.ours):.3f} | {statistics.mean(point.gains):+.3f}"
        lines.append(f"| {point.label} | {means} | {len(point.gains)} |")
    return lines


def share_points(arms: dict[str, dict[int, Result]], alone: dict[int, Result]) -> dict[int, Point]:
    """By number of dissimilar sites in the pool: the mean over the similar ones only."""
    points = {}
    for number in (0, 1, 2, 4):
        mine = arms[f"colora,server.groups=none,dissimilar={number}"]
        seeds = sorted(mine.keys() & alone.keys())
        means = ([_mean(results[seed], AIRLINES) for seed in seeds] for results in (mine, alone))
        points[number] = Point(f"{number / (number + len(AIRLINES)):.0%}", *means)
    return points


def share_table(points: dict[int, Point]) -> list[str]:
    """One row for each number of dissimilar sites in the pool: the similar ones, and their gain over local-only."""
    lines = ["| dissimilar sites | share | colora | gain | lowest gain of a seed |", "|---|---|---|---|---|"]
    for number, point in points.items():
        gain = f"{statistics.mean(point.gains):+.3f} | {min(point.gains):+.3f}"
        lines.append(f"| {number} | {point.label} | {statistics.mean(point.ours):.3f} | {gain} |")
    return lines


def private_table() -> list[str]:
    """One row for each recipe: local-only, CoLoRA, and CoLoRA with a private adapter at a fifth of its rate."""
    lines = ["| recipe | seeds | local-only | colora | colora, private adapter |", "|---|---|---|---|---|"]
    for recipe, arms in PRIVATE.items():
        results = read(recipe)
        seeds = sorted(set.intersection(*(set(results[arm]) for arm in arms)))
        cells = [_spread([_mean(results[arm][seed]) for seed in seeds]) for arm in arms]
        lines.append(f"| `{recipe}` | {len(seeds)} | {' | '.join(cells)} |")
    return lines


def shared_table() -> list[str]:
    """One row for each recipe: CoLoRA's base, shared and personal models, and a personal one with a fitted head.

    The seeds are those at which a head was fitted again, or all where none was.
    """
    lines = ["| recipe | seeds | base | shared | personal | personal, head fitted again |", "|---|---|---|---|---|---|"]
    for recipe, (_, arm, _) in PRIVATE.items():
        trained, fitted = (read(recipe).get(name, {}) for name in (arm, f"{arm},train.final_head=probe"))
        seeds = sorted(trained.keys() & fitted.keys() or trained.keys())
        means = [statistics.mean(_mean(trained[seed], mode=mode) for seed in seeds) for mode in MODES]
        again = f"{_average(fitted, seeds):.3f}" if fitted else ""
        lines.append(f"| `{recipe}` | {len(seeds)} | {' | '.join(f'{mean:.3f}' for mean in means)} | {again} |")
    return lines


def groups_table() -> list[str]:
    """One row for each recipe: the p-value and the number of groups at every seed."""
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for line in (RESULTS / "groups.jsonl").read_text().splitlines():
        result = json.loads(line)
        p_value, count = result["tests"][0]["p_value"], len(result["groups"])
        found[result["recipe"]][result["seed"]] = f"{p_value:.4f}: {count} group{'s' * (count > 1)}"
    seeds = sorted({seed for row in found.values() for seed in row})
    lines = [f"| recipe | {' | '.join(f'seed {seed}' for seed in seeds)} |", f"|---|{'---|' * len(seeds)}"]
    return lines + [f"| `{name}` | {' | '.join(row.get(s, '') for s in seeds)} |" for name, row in found.items()]


def best(arms: dict[str, dict[int, Result]], method: str) -> str:
    """Return the arm of a method with the best mean over the seeds that all its arms have."""
    candidates = [arm for arm in arms if arm == method or arm.startswith(f"{method},")]
    common = set.intersection(*(set(arms[arm]) for arm in candidates))
    return max(candidates, key=lambda arm: statistics.mean(_mean(arms[arm][seed]) for seed in common))


def pictures() -> dict[str, str]:
    """Return every picture by the name of its file."""
    demo = read("demo")
    rows = [point for point, _ in rows_points(demo, "colora", "local,train.lr=5e-3").values()]
    share = share_points(read("share"), read("mixed")["local,train.lr=5e-3"])
    return {
        "evidence-rows.svg": draw("Accuracy of the airlines", "training rows per site", rows),
        "evidence-sites.svg": draw("Accuracy, all sites with one task", "number of sites", sites_points(demo)),
        "evidence-share.svg": draw(
            "Accuracy of the four airlines", "share of dissimilar sites in the pool", list(share.values())
        ),
    }


def page() -> str:
    """Return the page with its tables written anew."""
    everything = read("demo")
    other = ("data.train", "partition")  # keys of arms on other rows
    demo = {arm: results for arm, results in everything.items() if not any(key in arm for key in other)}
    tables = {
        "rows": rows_table(rows_points(everything, "colora", "local,train.lr=5e-3")),
        "sites": sites_table(sites_points(everything)),
        "rates": rates_table(),
        "r8": arms_table(read("r8")),
        "arms": arms_table(demo),
        "gain": gain_table(demo, best(demo, "colora"), best(demo, "local")),
        "regression": regression_table(read("regression")),
        "mixed": arms_table(read("mixed")),
        "share": share_table(share_points(read("share"), read("mixed")["local,train.lr=5e-3"])),
        "newsgroups": arms_table(read("newsgroups")),
        "private": private_table(),
        "shared": shared_table(),
        "instructions": arms_table(read("instructions")),
        "groups": groups_table(),
    }
    text = PAGE.read_text()
    for name, lines in tables.items():
        begin, end = BEGIN.format(name=name), END.format(name=name)
        before, _, rest = text.partition(begin)
        text = "\n".join([before + begin, "", *lines, "", end + rest.partition(end)[2]])
    return text


def _mean(result: Result, names: Collection[str] = (), *, mode: str = "personal") -> float:
    """The mean over all sites, or over these."""
    return statistics.mean(site[mode] for name, site in result["sites"].items() if not names or name in names)


def _average(results: dict[int, Result], seeds: list[int]) -> float:
    return statistics.mean(_mean(results[seed]) for seed in seeds)


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def main() -> int:
    """Write the page and its pictures, or with --check return 1 if one of them is out of date."""
    files = {PAGE: page()} | {PICTURES / name: text for name, text in pictures().items()}
    if "--check" in sys.argv[1:]:
        return int(any(not path.exists() or text != path.read_text() for path, text in files.items()))
    for path, text in files.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
