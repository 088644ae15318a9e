"""Bytes and loss of a run whose updates have few bits, with and without error feedback.

An arm is a number of bits (32: not rounded), ``-`` after it for no error feedback at the sites, and ``+`` for as many
bits on the way down. ``sent`` are the bytes of the sites' replies to training, ``both`` those of all messages in both
directions. Losses and accuracies are means over sites: the loss of the last round's training, and both of the personal
models on the test rows at the end.

python benchmarks/bits.py [RECIPE] [SEEDS] [ARM …]     (demo, 3, 32 8 4 2 4- 2- 8+ 4+ 2+)
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from colora.cli.recipes import find_recipe
from colora.client.training import trainer
from colora.common.config.loader import load_recipe
from colora.simulation.run import simulate

RESULTS = Path(__file__).with_name("results") / "bits.jsonl"
ARMS = ("32", "8", "4", "2", "4-", "2-", "8+", "4+", "2+")
FIXED = ("simulation.baseline=false", "simulation.threads=1", "evaluation.every=0")


@contextmanager
def error_feedback(*, on: bool) -> Iterator[None]:
    """Drop the feedback of every update if it is off."""
    quantized = trainer.quantized_update
    if not on:
        trainer.quantized_update = lambda *arguments: (quantized(*arguments)[0], {})
    try:
        yield
    finally:
        trainer.quantized_update = quantized


def run(recipe: str, arm: str, seed: int) -> dict[str, Any]:
    """Run one arm once."""
    bits = arm.rstrip("-+")
    keys = () if bits == "32" else (f"communication.update_bits={bits}",)
    keys += (f"communication.broadcast_bits={bits}",) if arm.endswith("+") else ()
    settings = load_recipe(find_recipe(recipe), (f"seed={seed}", *FIXED, *keys))
    with tempfile.TemporaryDirectory() as folder, error_feedback(on=not arm.endswith("-")):
        events = simulate(settings, Path(folder) / "run", resume=False).events()
    replies = [event for event in events if event["event"] == "reply"]
    ends = [reply["metrics"] for reply in replies if reply["kind"] == "finalize"]
    sent = sum(reply["bytes_up"] for reply in replies if reply["kind"] == "train")
    both = sum(reply["bytes_up"] + reply["bytes_down"] for reply in replies)
    loss = statistics.mean(end["personal.loss"] for end in ends)
    last = [reply for reply in replies if (reply["round"], reply["kind"]) == (settings.rounds, "train")]
    trained = [reply["metrics"]["train.loss"] for reply in last]
    accuracy = statistics.mean(end["personal.accuracy"] for end in ends)
    measured = {"train": statistics.mean(trained), "test": loss, "accuracy": accuracy}
    return {"recipe": recipe, "arm": arm, "seed": seed, "sent": sent, "both": both, **measured}


def main() -> None:
    recipe, seeds, *arms = [*sys.argv[1:], "demo", "3"][: max(2, len(sys.argv) - 1)]
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    known = {(r["recipe"], r["arm"], r["seed"]): r for r in map(json.loads, lines)}
    for seed in range(int(seeds)):
        for arm in arms or ARMS:
            result = known.get((recipe, arm, seed)) or run(recipe, arm, seed)
            if (recipe, arm, seed) not in known:
                with RESULTS.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            plain = known.get((recipe, "32", seed)) or result
            known[recipe, arm, seed] = result
            print(
                f"{arm} bits, seed {seed}: {result['sent'] / plain['sent']:.3f} of the bytes of updates, "
                f"{result['both'] / plain['both']:.3f} of all bytes; loss on training rows "
                f"{result['train']:.4f}, on test rows {result['test']:.4f} "
                f"({result['test'] / plain['test'] - 1:+.2%}), accuracy {result['accuracy']:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
