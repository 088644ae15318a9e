"""Reading and tokenizing a site's 100,000 rows: CPU seconds, peak memory, and how often each row is read and tokenized.

A CSV file of texts of 4 to 36 words, MiniLM-L6's tokenizer, a random BERT of width 16, 25,000 test rows. ``site`` is a
deployed site that joins and trains one step without an evaluation. ``simulation`` is one round of that site on the
local engine, which writes the rows into its run folder; the seconds of measuring are not counted. ``base`` is ``site``
with 200 rows: imports and model. Every run is a new process with one thread.
"""

from __future__ import annotations

import csv
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from figures import Figure, show
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerBase

from colora.client.data.files import READERS
from colora.client.data.source import Source
from colora.client.trainer_service.session import TrainerSession
from colora.common.adapters.initialization import initial_shared_state
from colora.common.config.loader import load_site, recipe_from
from colora.common.config.schema import Recipe, to_json
from colora.common.dataset import Row
from colora.common.models.assets import asset_folder
from colora.common.protocol.types import TrainRequest
from colora.simulation.run import simulate

ROWS, FEW, REPEATS = 100_000, 200, 3
MODES = {"base": FEW, "site": ROWS, "simulation": ROWS}
TEXT = "the engine of this old car was loud a shuttle leaves for the moon and nobody at mission control has slept"


def write_csv(path: Path, rows: int) -> None:
    """Write so many rows with one of three labels each."""
    rng = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(
            (" ".join(rng.choices(TEXT.split(), k=rng.randint(4, 36))), f"label-{i % 3}") for i in range(rows)
        )


def tiny_model(folder: Path) -> Path:
    """Write a random BERT with MiniLM-L6's tokenizer."""
    AutoTokenizer.from_pretrained(asset_folder("minilm-l6")).save_pretrained(folder)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes)).save_pretrained(folder)
    return folder


def recipe_of(source: Path, model: Path) -> Recipe:
    return recipe_from(
        {
            "name": "rows",
            "rounds": 1,
            "model": {"source": str(model), "max_length": 48},
            "train": {"steps": 1, "batch_size": 8},
            "evaluation": {"every": 0},
            "simulation": {"threads": 1},
            "site": [{"name": "large", "source": str(source)}],
        }
    )


def train_at_site(recipe: Recipe, folder: Path) -> None:
    """Join with a deployed site's session and train one round."""
    source = recipe.site[0].data.source
    (folder / "site.toml").write_text(f'name = "large"\n[data]\nsource = "{source}"\n')
    session = TrainerSession(load_site(folder / "site.toml"))
    plan = session.accept(recipe.name, to_json(recipe.plan))
    session.trainer(plan).site_info()
    shared = initial_shared_state(plan)
    request = TrainRequest(plan.name, 1, "train", 0, to_json(recipe.plan), shared, evaluate=False)
    session.answer(plan, request, lambda done, total: None)


def count_rows() -> Counter[str]:
    """Count rows as they are read, and texts as they are tokenized, from now on."""
    counts: Counter[str] = Counter()
    tokenize = PreTrainedTokenizerBase.__call__

    def counted_tokenize(self: Any, texts: Any = None, *arguments: Any, **options: Any) -> Any:
        counts["tokenized"] += len(texts) if isinstance(texts, list) else 1
        return tokenize(self, texts, *arguments, **options)

    def counted(reader: Callable[[Source], Iterable[Row]]) -> Callable[[Source], Iterator[Row]]:
        def read(source: Source) -> Iterator[Row]:
            for row in reader(source):
                counts["read"] += 1
                yield row

        return read

    READERS.update({suffix: counted(reader) for suffix, reader in READERS.items()})
    PreTrainedTokenizerBase.__call__ = counted_tokenize  # type: ignore[method-assign]
    return counts


def run(mode: str) -> None:
    """Run one mode in this process and print its figures as JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_csv(folder / "rows.csv", MODES[mode])
        recipe = recipe_of(folder / "rows.csv", tiny_model(folder / "model"))
        counts, before, measuring = count_rows(), os.times(), 0.0
        if mode == "simulation":
            events = simulate(recipe, folder / "run", resume=False).events()
            measuring = sum(event["measuring"] for event in events if event["event"] == "reply")
        else:
            train_at_site(recipe, folder)
        now = os.times()
    seconds = now.user + now.system - before.user - before.system - measuring
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps({"seconds": seconds, "peak": peak, **{key: n / MODES[mode] for key, n in counts.items()}}))


def measured(mode: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, mode], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    runs = {mode: [measured(mode) for _ in range(REPEATS)] for mode in MODES}
    units = {"seconds": "CPU s", "peak": "MB", "read": "times", "tokenized": "times"}
    figures = [
        Figure(f"{mode}, {key}", [each[key] for each in values], unit)
        for mode, values in runs.items()
        for key, unit in units.items()
    ]
    show(f"{ROWS:,} rows", figures)


if __name__ == "__main__":
    run(sys.argv[1]) if sys.argv[1:] else main()
