"""One local SGD step per round is gradient descent on the pooled objective.

With weights p_k and F = Σ p_k L_k, a round is −η ∂F for the shared groups and −(η/p_k) ∂F for the personal groups of
site k. The reference uses none of colora's trainer, adapter layers, tasks or aggregation. Its plain torch modules share
A and B and have their own core and head; a step is one autograd call over all sites and one subtraction.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from colora.client.training.state_store import StateStore
from colora.common.adapters.initialization import initial_shared_state, initial_values
from colora.common.config.loader import recipe_from
from colora.common.config.schema import Recipe
from colora.common.seeds import seed_from
from colora.server.rounds.checkpoint import Checkpoints
from colora.simulation.run import simulate

ROUNDS = 3
RATES = {"A": 0.8, "B": 0.8, "core": 0.6, "head": 0.4}
SGD = {"steps": 1, "batch_size": 99, "optimizer": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0}
TRAIN = {**SGD, "lr": RATES["A"], "core_lr": RATES["core"], "head_lr": RATES["head"]}
CORES: dict[str, Callable[[nn.Parameter], torch.Tensor]] = {
    "full": lambda core: core,
    "diagonal": torch.diag,
    "residual": lambda core: torch.eye(core.shape[0]) + core,
}
Values = dict[str, torch.Tensor]  # parameter name → value; personal ones begin with "site/"


# --- the reference ------------------------------------------------------------------------------------------------


class Factored(nn.Module):
    """W0 x + s · B Λ A x around a linear layer; ``core`` is None for plain LoRA."""

    def __init__(self, base: nn.Linear, a: nn.Parameter, b: nn.Parameter, core: Any, scale: float) -> None:
        super().__init__()
        self.base, self.a, self.b, self.core, self.scale = base, a, b, core, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.a if self.core is None else self.core() @ self.a
        return self.base(x) + self.scale * (x @ inner.T) @ self.b.T


@dataclass
class Member:
    """A site in the pool: its mean loss on its own copy of the model, and the number of terms in that mean."""

    name: str
    loss: Callable[[], torch.Tensor]
    terms: int


class Pool:
    """All sites of a recipe, trained centrally with shared A and B."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.parameters = recipe, dict[str, nn.Parameter]()
        self.shared = {k: nn.Parameter(torch.tensor(v)) for k, v in initial_shared_state(recipe.plan).items()}
        self.parameters |= self.shared
        build = classifier if recipe.data.task == "classification" else generator
        self.members = [build(self, site.name, rows_of(site.data.source)) for site in recipe.site]

    def adapt(self, model: nn.Module, site: str) -> nn.Module:
        """Freeze a model and wrap its target layers with the shared factors and the site's core."""
        model.requires_grad_(False).eval()
        adapter = self.recipe.adapter
        for name, layer in list(model.named_modules()):
            if name.rpartition(".")[2] not in adapter.target_modules:
                continue
            a, b = self.shared[f"{name}.lora_A.weight"], self.shared[f"{name}.lora_B.weight"]
            core = self._core(f"{site}/{name}.lora_core") if self.recipe.method.name == "colora" else None
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Factored(layer, a, b, core, adapter.alpha / adapter.rank))
        return model

    def _core(self, name: str) -> Callable[[], torch.Tensor]:
        form, rank = self.recipe.adapter.core, self.recipe.adapter.rank
        start = {"full": torch.eye(rank), "diagonal": torch.ones(rank), "residual": torch.zeros(rank, rank)}[form]
        core = self.parameters[name] = nn.Parameter(start)
        return lambda: CORES[form](core)

    def descend(self, *, pooled_steps: bool = False) -> Values:
        """Take ``ROUNDS`` gradient steps on F = Σ p_k L_k; ``pooled_steps`` omits the 1/p_k of personal groups."""
        tokens = self.recipe.server.weights == "tokens"
        weights = {m.name: float(m.terms) if tokens else 1.0 for m in self.members}
        p = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        for _ in range(ROUNDS):
            objective = sum((p[m.name] * m.loss() for m in self.members), torch.zeros(()))
            gradients = torch.autograd.grad(objective, list(self.parameters.values()))
            with torch.no_grad():
                for (name, parameter), gradient in zip(self.parameters.items(), gradients, strict=True):
                    site, personal, _ = name.partition("/")
                    step = RATES[kind_of(name)] / (p[site] if personal and not pooled_steps else 1)
                    parameter -= step * gradient
        return {name: parameter.detach() for name, parameter in self.parameters.items()}


def classifier(pool: Pool, site: str, rows: list[dict]) -> Member:
    """A BERT with its pooler and a linear head that has the initial values of the federation's site."""
    from transformers import AutoTokenizer, BertModel

    source, recipe = pool.recipe.model.source, pool.recipe
    bert = pool.adapt(BertModel.from_pretrained(source), site)
    labels = sorted({row["label"] for row in rows})
    shapes = {"head.classifier.weight": (len(labels), 16), "head.classifier.bias": (len(labels),)}
    seed = seed_from(seed_from(recipe.seed, recipe.name, site), "head")
    head = {k: nn.Parameter(v) for k, v in initial_values(shapes, recipe.adapter, seed).items()}
    pool.parameters |= {f"{site}/{key}": value for key, value in head.items()}
    tokenizer = AutoTokenizer.from_pretrained(source)
    batch = tokenizer([r["text"] for r in rows], padding=True, truncation=True, max_length=16, return_tensors="pt")
    targets = torch.tensor([labels.index(row["label"]) for row in rows])

    def loss() -> torch.Tensor:
        pooled = bert(batch["input_ids"], batch["attention_mask"]).pooler_output
        return F.cross_entropy(pooled @ head["head.classifier.weight"].T + head["head.classifier.bias"], targets)

    return Member(site, loss, len(rows))


def generator(pool: Pool, site: str, rows: list[dict]) -> Member:
    """A Llama with one row per forward pass, without padding; the loss covers the completion and its end token."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(pool.recipe.model.source)
    pool.adapt(llama.model, site)
    tokenizer = AutoTokenizer.from_pretrained(pool.recipe.model.source)
    pairs = [(tokenizer(row["prompt"]).input_ids, [*tokenizer(row["completion"]).input_ids, 8]) for row in rows]
    terms = sum(len(answer) for _, answer in pairs)

    def loss() -> torch.Tensor:
        total = torch.zeros(())
        for prompt, answer in pairs:
            logits = llama(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            total = total + F.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        return total / terms

    return Member(site, loss, terms)


# --- the federation -----------------------------------------------------------------------------------------------


def federated(recipe: Recipe, folder: Path) -> Values:
    """Run a simulation and return its last checkpoint and every site's state of the last round."""
    simulate(recipe, folder, resume=False)
    state = Checkpoints(folder / "checkpoints", recipe).latest()
    assert state is not None
    assert (state.round, state.finalized) == (ROUNDS, True)
    values = {key: torch.tensor(value) for key, value in state.shared.items()}
    for site in recipe.site:
        personal = StateStore(folder / "sites" / site.name / "state", recipe.name).state(ROUNDS)
        assert personal is not None
        values |= {f"{site.name}/{key}": value for key, value in personal.tensors.items()}
    return values


def kind_of(name: str) -> str:
    kinds = {".lora_A.": "A", ".lora_B.": "B", ".lora_core": "core", "/head.": "head"}
    return next(kind for mark, kind in kinds.items() if mark in name)


def rows_of(source: str) -> list[dict]:
    return [json.loads(line) for line in Path(source).read_text().splitlines()]


def distances(one: Values, other: Values) -> dict[str, float]:
    """The largest absolute difference of each kind of parameter."""
    assert one.keys() == other.keys()
    largest: dict[str, float] = {}
    for name in one:
        kind = kind_of(name)
        largest[kind] = max(largest.get(kind, 0.0), float((one[name] - other[name]).abs().max()))
    return largest


def distances_from_start(recipe: Recipe, values: Values) -> dict[str, float]:
    """How far each kind of parameter has moved; without movement agreement would prove nothing."""
    return distances({name: value.detach() for name, value in Pool(recipe).parameters.items()}, values)


@pytest.fixture
def scaled_weights(tmp_path: Path) -> Callable[[Path], str]:
    """Copy a model with weights of size 0.2 instead of 0.02, whose gradients would hardly reach the adapter."""

    def copy(folder: Path) -> str:
        shutil.copytree(folder, tmp_path / folder.name)
        weights = load_file(folder / "model.safetensors")
        scaled = {key: 10 * value if value.dim() == 2 else value for key, value in weights.items()}
        save_file(scaled, tmp_path / folder.name / "model.safetensors", {"format": "pt"})
        return str(tmp_path / folder.name)

    return copy


@pytest.fixture
def classifying(tiny_recipe: dict, tiny_bert: Path, scaled_weights: Callable[[Path], str]) -> dict:
    """Three sites with 12, 9 and 6 rows, so that uniform weights differ from weights by examples."""
    for site, count in zip(tiny_recipe["site"], (12, 9, 6), strict=True):
        lines = Path(site["source"]).read_text().splitlines(keepends=True)
        Path(site["source"]).write_text("".join(lines[:count]))
    return {
        **tiny_recipe,
        "rounds": ROUNDS,
        "train": TRAIN,
        "server": {"quorum": 3, "weights": "uniform"},
        "model": {"source": scaled_weights(tiny_bert), "max_length": 16},
        "adapter": {**tiny_recipe["adapter"], "alpha": 16.0},
    }


CASES = [("colora", "full"), ("colora", "diagonal"), ("colora", "residual"), ("fedit", "full")]


@pytest.mark.parametrize(("method", "core"), CASES)
def test_one_sgd_step_a_round_is_pooled_training(classifying: dict, tmp_path: Path, method: str, core: str) -> None:
    adapter = {**classifying["adapter"], "core": core}
    recipe = recipe_from({**classifying, "method": {"name": method}, "adapter": adapter})
    mine, pooled = federated(recipe, tmp_path / "run"), Pool(recipe).descend()
    assert max(distances(mine, pooled).values()) < 1e-5
    assert min(distances_from_start(recipe, mine).values()) > 1e-3


def test_the_pooled_gradient_without_one_over_p_is_another_model(classifying: dict, tmp_path: Path) -> None:
    """With equal steps for all groups the personal parameters differ, so the test above can fail."""
    recipe = recipe_from(classifying)
    apart = distances(federated(recipe, tmp_path / "run"), Pool(recipe).descend(pooled_steps=True))
    assert min(apart["core"], apart["head"]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["tokens", "uniform"])
def test_generation_is_pooled_training_with_either_weight(
    generation_recipe: dict, tiny_llama: Path, scaled_weights: Callable[[Path], str], tmp_path: Path, weights: str
) -> None:
    """Token weights are exact here: one step covers all answer tokens of a site, 12 at one and 50 at the other."""
    sites = []
    for name, words, count in (("short", "sun", 6), ("long", "a b c d", 10)):
        rows = [{"prompt": f"red {'cat ' * (i % 3)}dog", "completion": words} for i in range(count)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sites.append({"name": name, "source": str(path), "test_source": generation_recipe["site"][0]["source"]})
    raw = {**generation_recipe, "rounds": ROUNDS, "site": sites, "server": {"quorum": 2, "weights": weights}}
    raw |= {"train": TRAIN, "adapter": {**generation_recipe["adapter"], "alpha": 4.0}}
    recipe = recipe_from({**raw, "model": {"source": scaled_weights(tiny_llama), "max_length": 32}})
    pool = Pool(recipe)
    assert [m.terms for m in pool.members] == [12, 50]
    mine = federated(recipe, tmp_path / "run")
    assert max(distances(mine, pool.descend()).values()) < 1e-5
    assert min(distances_from_start(recipe, mine).values()) > 1e-3
