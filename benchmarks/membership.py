"""Can a coordinator tell which texts a site trained on? Membership inference on the adapters that leave the sites.

The demo with one shared head, so that the coordinator holds the whole model of each site after its last round: the
easiest case for the attacker. Members are the site's training texts, and non-members its test texts.

``loss``: a text is a member if its loss is low (Yeom et al. 2018, arXiv 1709.01604). ``shadow``: its loss is compared
with its losses in the models of the other sites, which never saw it (the offline attack of Carlini et al. 2022,
arXiv 2112.03570, with the other sites' models as shadow models). AUC 0.5 is guessing. ``TPR``: members found while at
most 1 % of the non-members are taken for members.

python benchmarks/membership.py [SEEDS] [ARM …]     (3, none 8 1)
An arm is a privacy budget ε, or ``none``.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve

from colora.cli.recipes import find_recipe
from colora.client.training.trainer import Trainer
from colora.client.training.validation_rows import row_losses
from colora.common.atomic_io import load_arrays
from colora.common.config.loader import load_recipe
from colora.common.models.saved import TRAINED
from colora.common.protocol.types import Arrays
from colora.simulation.run import simulate
from colora.simulation.site_pool import SitePaths, SitePool

RESULTS = Path(__file__).with_name("results") / "membership.jsonl"
FIXED = (
    "method.name=fedit",
    "method.head=shared",
    "simulation.baseline=false",
    "simulation.threads=1",
    "evaluation.every=0",
    "train.final_steps=0",
)
FALSE_POSITIVES = 0.01


def losses(trainer: Trainer, sent: Arrays) -> np.ndarray:
    """The losses of a site's training texts and then of its test texts, with the model that a site sent."""
    trainer.load(sent, {})
    return np.array([*row_losses(trainer.task, trainer.task.train.examples), *_test_losses(trainer)])


def _test_losses(trainer: Trainer) -> list[float]:
    return row_losses(trainer.task, trainer.task.test.examples)


def run(arm: str, seed: int) -> dict[str, Any]:
    """Run the demo once and attack the last update of every site."""
    private = () if arm == "none" else (f"privacy.epsilon={float(arm)}", "privacy.metrics=all")
    recipe = load_recipe(find_recipe("demo"), (f"seed={seed}", *FIXED, *private))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        run_folder = simulate(recipe, folder, resume=False)
        names = tuple(site for site, _ in run_folder.read_roster())
        sites = folder / "sites"
        sent = {
            name: load_arrays(sites / name / "state" / f"round-{recipe.rounds:06d}.safetensors", prefix=TRAINED)[0]
            for name in names
        }
        pool = SitePool(SitePaths(sites, sites, names, 1, folder / "log.txt"), recipe.plan)
        of_site = {name: np.stack([losses(pool.trainer(name), sent[other]) for other in names]) for name in names}
        members = {name: pool.trainer(name).examples for name in names}
    attacks: dict[str, list[float]] = {"loss": [], "shadow": [], "shadow_tpr": []}
    for i, name in enumerate(names):
        table = of_site[name]
        is_member = np.arange(table.shape[1]) < members[name]
        others = np.delete(table, i, axis=0)
        shadow = (others.mean(0) - table[i]) / (others.std(0) + 1e-3)
        attacks["loss"].append(roc_auc_score(is_member, -table[i]))
        attacks["shadow"].append(roc_auc_score(is_member, shadow))
        false, true, _ = roc_curve(is_member, shadow)
        attacks["shadow_tpr"].append(float(true[false <= FALSE_POSITIVES].max()))
    return {"arm": arm, "seed": seed, **{name: statistics.mean(values) for name, values in attacks.items()}}


def main() -> None:
    seeds = int(sys.argv[1]) if sys.argv[1:] else 3
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    known = {(result["arm"], result["seed"]): result for result in map(json.loads, lines)}
    for seed in range(seeds):
        for arm in sys.argv[2:] or ("none", "8", "1"):
            result = known.get((arm, seed)) or run(arm, seed)
            if (arm, seed) not in known:
                with RESULTS.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            print(
                "ε {arm}, seed {seed}: AUC by loss {loss:.3f}, by shadow models {shadow:.3f}, "
                "TPR {shadow_tpr:.3f}".format(**result),
                flush=True,
            )


if __name__ == "__main__":
    main()
