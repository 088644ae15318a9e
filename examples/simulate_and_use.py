"""Run a simulation, compare its models, and use the personal model of one site.

    python examples/simulate_and_use.py [RECIPE] [OUT]

The default recipe is ``demo``, which takes under three minutes on two cores. A finished run in OUT is not repeated.
"""

from __future__ import annotations

import sys

import torch

import colora

TEXTS = ["Two hours late, and nobody could tell us why.", "Thank you for the upgrade, what a lovely crew!"]


def main(recipe: str = "demo", out: str = "runs/demo") -> None:
    """Run ``recipe`` in the folder ``out``, then use its results."""
    run = colora.simulate(recipe, out=out, resume=True)

    print("Final metric of every site:")
    print(run.results())

    frame = run.to_frame()
    losses = frame[(frame["mode"] == "train") & (frame["metric"] == "loss")]
    print("\nMean training loss by round:")
    print(losses.groupby("round")["value"].mean())

    site = run.site(run.sites[0])
    print(f"\nPredictions of site {run.sites[0]}:")
    for text, prediction in zip(TEXTS, site.predict(TEXTS), strict=True):
        print(f"  {prediction['label']}: {text}")

    model, tokenizer = site.load()  # a PeftModel, for use without colora
    batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        print(f"\nProbabilities:\n{model(**batch).logits.softmax(dim=-1)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
