"""Compare the singular spectra of ΔW of LoRA, MultiLoRA, CoLoRA and full fine-tuning of the same layers.

python benchmarks/spectrum.py [PICTURE] [--seed 0] [--rates]     (benchmarks/spectrum.png)

MiniLM-L6 on 20 Newsgroups, query and value of every layer, 200 steps of 8 texts of at most 64 tokens; adapters of equal
total rank and equal scale alpha/r. All contenders train on the same texts in the same order, each text once, with the
same dropout and the same initial head. ``--rates`` tries half, once and twice every learning rate and writes no files;
the mean training loss, over texts not seen before, shows which is best. The measures of every layer go to a CSV
file beside the PNG picture, which needs matplotlib: pip install -e ".[plot]".
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from figures import show_table
from spectra import Spectrum, spectrum_of, spectrum_of_factors
from torch import nn

from colora.client.data.selection import load_site_rows
from colora.common.adapters.factors import factors_of
from colora.common.adapters.initialization import initial_values
from colora.common.adapters.inject import attach, layout_of
from colora.common.config.schema import (
    AdapterSettings,
    DataSettings,
    MethodSettings,
    ModelSettings,
    Plan,
    TrainSettings,
)
from colora.common.config.site_schema import SiteSettings
from colora.common.dataset import SiteDataset
from colora.common.methods import PRIVATE
from colora.common.models.architecture import skeleton
from colora.common.models.base_model import load_base_model
from colora.common.seeds import seed_from
from colora.common.tasks import build_task
from colora.common.training.loop import TrainCursor, TrainPhase, train

STEPS, BATCH, TOKENS, TEST = 200, 8, 64, 600
RANK, WIDTH = 24, 384
TARGETS = ("query", "value")
TOP = (1, 4, 8)
RANKS = ("eff. rank", "particip.")
HEAD_LR = 1e-2
Layers = dict[str, Spectrum]  # layer → its spectrum


@dataclass(frozen=True)
class Contender:
    """A training run: an adapter with a method of the method table, or all weights if ``adapter`` is None."""

    name: str
    lr: float
    colour: str
    adapter: AdapterSettings | None = None
    method: str = "local"
    line: str = "-"

    def plan(self, seed: int) -> Plan:
        settings = TrainSettings(
            batch_size=BATCH, lr=self.lr, head_lr=HEAD_LR, lr_schedule="cosine", warmup_steps=STEPS // 20
        )
        model, adapter = ModelSettings("asset:minilm-l6", max_length=TOKENS), self.adapter or AdapterSettings()
        return Plan("spectrum", 1, model, seed, adapter, MethodSettings(self.method), train=settings)


@dataclass(frozen=True)
class Outcome:
    """Result of a contender: its spectra by layer, mean training loss, and accuracy on the test texts."""

    contender: Contender
    layers: Layers
    loss: float
    accuracy: float

    def mean(self, measure: str) -> float:
        return statistics.mean(measures(spectrum)[measure] for spectrum in self.layers.values())


WHOLE = AdapterSettings(RANK, 2.0 * RANK, target_modules=TARGETS)
THREE = AdapterSettings(RANK // 3, 2.0 * RANK / 3, target_modules=TARGETS, modules=3)
CONTENDERS = (
    Contender("LoRA, rank 24", 2e-3, "#0072b2", WHOLE),
    Contender("MultiLoRA, 3 × rank 8", 4e-3, "#d55e00", THREE, "multilora"),
    Contender("CoLoRA, rank 24", 2e-3, "#009e73", WHOLE, "colora", "--"),
    Contender("full fine-tuning", 4e-4, "#666666"),
)
UNTRAINED = dataclasses.replace(CONTENDERS[1], name="MultiLoRA untrained, s = 1", lr=0.0, line=":")


def measures(spectrum: Spectrum) -> dict[str, float]:
    """Return the measures of one layer by column name."""
    return {
        **{f"top-{k}": spectrum.top(k) for k in TOP},
        "eff. rank": spectrum.effective_rank,
        "particip.": spectrum.participation,
        "‖ΔW‖": spectrum.values.norm().item(),
    }


def texts(seed: int) -> SiteDataset:
    source, test = "asset:20newsgroups/train", "asset:20newsgroups/test"
    return load_site_rows(SiteSettings("one", DataSettings(source, test, train=STEPS * BATCH, test=TEST)), seed)


def train_contender(contender: Contender, rows: SiteDataset, seed: int) -> Outcome:
    """Train a contender on a newly loaded base model."""
    plan = contender.plan(seed)
    base = load_base_model(plan.model, generates=False)
    weights = {} if contender.adapter else target_weights(base.backbone)
    before = {layer: weight.detach().clone() for layer, weight in weights.items()}
    adapter = attach(base.backbone, plan.adapter, plan.row()) if contender.adapter else {}
    task = build_task(rows, base, plan)
    adapter |= task.head
    with torch.no_grad():
        for key, value in initial_values(layout_of(adapter), plan.adapter, seed).items():
            adapter[key].copy_(value)
    # full weights belong to no parameter group, but a private parameter may have any name
    parameters = adapter | {f"{PRIVATE}{layer}.weight": weight for layer, weight in weights.items()}
    cursor = TrainCursor(0, STEPS, 0, seed_from(seed, "order"), seed_from(seed, "noise"))
    trained = train(task, parameters, [TrainPhase(STEPS, frozenset(parameters))], plan.train, cursor)
    layers = {layer: spectrum_of(weight - before[layer]) for layer, weight in weights.items()}
    layers |= {layer: spectrum_of_factors(b, a) for layer, (b, a) in factors_of(adapter, plan).items()}
    return Outcome(contender, layers, trained.loss, task.measure(generate=False)["accuracy"])


def at_start(contender: Contender, seed: int) -> Outcome:
    """Return the spectra of MultiLoRA's initial A and B with every s_i = 1, the reference without training."""
    plan = contender.plan(seed)
    layout = layout_of(attach(skeleton(plan.model), plan.adapter, plan.row()))
    values = initial_values(layout, plan.adapter, seed)
    values |= {key: torch.ones_like(value) for key, value in values.items() if key.endswith("lora_scale")}
    layers = {layer: spectrum_of_factors(b, a) for layer, (b, a) in factors_of(values, plan).items()}
    return Outcome(contender, layers, math.nan, math.nan)


def best_part(outcome: Outcome) -> Outcome:
    """Return the first RANK directions of every ΔW, for comparison with the adapters."""
    contender = dataclasses.replace(outcome.contender, name=f"its best rank-{RANK} part", lr=0.0, line=":")
    layers = {layer: Spectrum(spectrum.values[:RANK]) for layer, spectrum in outcome.layers.items()}
    return Outcome(contender, layers, math.nan, math.nan)


def target_weights(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights (d_out, d_in) of the target layers, by layer."""
    named: Any = backbone.named_modules()
    return {name: layer.weight for name, layer in named if name.endswith(TARGETS)}


def report(outcomes: Sequence[Outcome]) -> None:
    """Print the mean of each measure over layers."""
    names = list(measures(next(iter(outcomes[0].layers.values()))))
    rows = []
    for one in outcomes:
        means = [f"{one.mean(name):.{1 if name in RANKS else 3}f}" for name in names]
        trained = [f"{one.contender.lr:g}", f"{one.loss:.3f}", f"{one.accuracy:.3f}"]
        rows.append((one.contender.name, *means, *(trained if one.contender.lr else ("", "", ""))))
    layers = len(outcomes[0].layers)
    show_table(f"Spectrum of ΔW, mean over {layers} layers", ("", *names, "lr", "loss", "accuracy"), rows)


def write_layers(outcomes: Sequence[Outcome], file: Path) -> None:
    """Write one CSV line per contender and layer."""
    lines = [
        {"contender": one.contender.name, "layer": layer}
        | {name: f"{value:.4g}" for name, value in measures(spectrum).items()}
        for one in outcomes
        for layer, spectrum in one.layers.items()
    ]
    with file.open("w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, list(lines[0]))
        table.writeheader()
        table.writerows(lines)


def draw(outcomes: Sequence[Outcome], picture: Path) -> None:
    """Draw the cumulative energy of every contender, and the effective rank of every layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    figure, axes = pyplot.subplot_mosaic(
        [["energy", "adapters"], ["energy", "full"]],
        figsize=(12, 5.6),
        layout="constrained",
        gridspec_kw={"width_ratios": [1.1, 1], "height_ratios": [1.7, 1]},
    )
    trained = [one for one in outcomes if one.contender.lr]
    draw_energy(axes["energy"], outcomes)
    draw_ranks(axes["adapters"], [one for one in trained if one.contender.adapter])
    draw_ranks(axes["full"], [one for one in trained if not one.contender.adapter])
    axes["adapters"].axhline(RANK, color="black", linewidth=0.8, linestyle=":")
    axes["adapters"].set_title(f"Effective rank of adapters (at most {RANK}, dotted)", fontsize=11)
    axes["full"].set_title(f"Effective rank of full fine-tuning (at most {WIDTH})", fontsize=11)
    axes["full"].set_xlabel("layer, q query, v value")
    figure.savefig(picture, dpi=110)
    Image.open(picture).convert("RGB").quantize(64).save(picture, optimize=True)  # a third of the size


def draw_energy(axis: Any, outcomes: Sequence[Outcome]) -> None:
    """Draw the share of ‖ΔW‖_F² in the first k directions: the mean, every layer faintly, references dotted."""
    for one in outcomes:
        curves = torch.stack([spectrum.cumulative[:RANK] for spectrum in one.layers.values()])
        ks, contender = range(1, RANK + 1), one.contender
        if contender.lr:
            axis.plot(ks, curves.T, color=contender.colour, alpha=0.18, linewidth=0.8)
        line = {"color": contender.colour, "linestyle": contender.line, "linewidth": 2.4}
        axis.plot(ks, curves.mean(0), label=contender.name, **line)
    axis.set(xlabel="k, directions of ΔW", ylabel="share of ‖ΔW‖² in the top k", xlim=(1, RANK), ylim=(0, 1.01))
    axis.set_xticks([1, *range(4, RANK + 1, 4)])
    axis.set_title("Cumulative energy (bold: mean over layers; faint: each layer)", fontsize=11)
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right")


def draw_ranks(axis: Any, outcomes: Sequence[Outcome]) -> None:
    """Draw bars of the effective rank by layer, with the contenders side by side."""
    width = 0.8 / len(outcomes)
    for i, one in enumerate(outcomes):
        positions = [at - 0.4 + (i + 0.5) * width for at in range(len(one.layers))]
        ranks = [spectrum.effective_rank for spectrum in one.layers.values()]
        axis.bar(positions, ranks, width, color=one.contender.colour)
    axis.set_xticks(range(len(outcomes[0].layers)), [short(layer) for layer in outcomes[0].layers])
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)


def short(layer: str) -> str:
    """Abbreviate ``encoder.layer.3.attention.self.query`` to ``3 q``."""
    parts = layer.split(".")
    return f"{parts[2]} {parts[-1][0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("picture", nargs="?", type=Path, default=Path(__file__).with_suffix(".png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, outcomes = texts(arguments.seed), []
    for contender in CONTENDERS:
        for lr in [contender.lr * factor for factor in ((0.5, 1, 2) if arguments.rates else (1,))]:
            outcomes.append(train_contender(dataclasses.replace(contender, lr=lr), rows, arguments.seed))
            print(f"{contender.name} at {lr:g}: loss {outcomes[-1].loss:.3f}", flush=True)
    outcomes += [best_part(outcomes[-1]), at_start(UNTRAINED, arguments.seed)]
    report(outcomes)
    if not arguments.rates:
        write_layers(outcomes, arguments.picture.with_suffix(".csv"))
        draw(outcomes, arguments.picture)


if __name__ == "__main__":
    main()
