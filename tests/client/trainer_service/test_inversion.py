"""What a coordinator reads from one reply of a site, and which limits of ``[allow]`` are in its way.

The attack is that of DAGER (arXiv 2405.15586). The gradient of A in the first layer is a sum over the tokens t of
(Bᵀ g_t) x_tᵀ, where x_t is the input embedding. Its row space is spanned by the x_t while it has at least as many rows
as there are tokens. The coordinator has the base model, so it knows the embedding of every token at every position, and
looks for those in the row space. It sends A = 0, so that nothing else is in the A that returns.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from colora.client.trainer_service import plan_bounds
from colora.client.trainer_service.lower_bounds import check_lower_bounds, out_of_the_ordinary
from colora.client.trainer_service.policy import check_allowed
from colora.client.trainer_service.session import TrainerSession
from colora.common.adapters.initialization import initial_shared_state
from colora.common.config.loader import load_recipe, load_site
from colora.common.config.schema import Plan, PrivacySettings, parse, to_json
from colora.common.config.site_schema import ORDINARY, AllowSettings, SiteSettings
from colora.common.errors import RefusedError
from colora.common.protocol.types import TrainReply, TrainRequest
from colora.common.seeds import seed_from
from colora.common.training.loop import TrainCursor, batch_indices
from colora.common.training.noise import NoiseSource
from colora.server.deployment.provisioning.provision import provision

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.toml"))
VOCABULARY = [f"w{i:03}" for i in range(500)]
SPECIAL = ["[PAD]", "[UNK]", *(f"[{i}]" for i in range(7))]
LAYER = "encoder.layer.0.attention.self"
ONE_TEXT = {"steps": 1, "batch_size": 1, "optimizer": "sgd", "lr": 1.0, "max_grad_norm": 0.0}
IN_BOUNDS = {"steps": 3, "batch_size": 8, "optimizer": "adam", "max_grad_norm": 0.0}
FAINT = 1e-9  # scale of B at which gradients are below Adam's eps, so that Adam takes SGD's steps
MakeModel = Callable[[int, float], Path]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Makes a random two-layer BERT of a width and a dropout, with a tokenizer of 500 words."""

    def make(width: int, dropout: float) -> Path:
        folder = tmp_path_factory.mktemp("bert")
        torch.manual_seed(0)
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 16}
        vocabulary = {word: i for i, word in enumerate([*SPECIAL, *VOCABULARY])}
        layers = {"num_hidden_layers": 2, "max_position_embeddings": 64, "vocab_size": len(vocabulary)}
        config = BertConfig(**layers, **sizes, **rates)
        BertModel(config).save_pretrained(folder)
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
        fast.save_pretrained(folder)
        return folder

    return make


def site_in(folder: Path, *, words: int = 12, seeds: str = "secret", **allow: Any) -> SiteSettings:
    """A site of 48 texts of random words, with a secret that is the same in every run of the test."""
    (folder / "state").mkdir()
    (folder / "state" / "site.secret").write_text("1" * 64)
    rng = random.Random(0)
    rows = [f"{' '.join(rng.choices(VOCABULARY, k=words))},{('no', 'yes')[i % 2]}" for i in range(48)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *rows]))
    trainer = {"state": str(folder / "state"), "device": "cpu", "threads": 1, "seeds": seeds}
    raw = {"name": "ada", "data": {"source": str(folder / "rows.csv")}, "trainer": trainer, "allow": allow}
    return parse(SiteSettings, raw)


def plan_of(model: Path | str, train: dict[str, Any], *, rank: int = 16, length: int = 8) -> Plan:
    adapter = {
        "rank": rank,
        "alpha": float(rank),
        "target_modules": [f"{LAYER}.{m}" for m in ("query", "key", "value")],
    }
    settings = {"model": {"source": str(model), "max_length": length}, "method": {"name": "fedit"}}
    return parse(Plan, {"name": "town", "rounds": 1, **settings, "adapter": adapter, "train": train})


@dataclass(frozen=True)
class Reading:
    """A reply, and what is known of the site afterwards: for the oracle, not for the coordinator."""

    plan: Plan
    reply: TrainReply
    examples: Sequence[Sequence[int]]  # token ids by row
    seed: int  # of the site

    @property
    def trained(self) -> list[Sequence[int]]:
        """The texts that the reply comes from, in the order of training."""
        return [self.examples[i] for i in order(self.seed, len(self.examples), self.reply.examples)]

    def distances(self, mask: np.ndarray | None = None) -> np.ndarray:
        """How far every token at every position is from the row space of A, 0 to 1: shape (vocabulary, positions)."""
        rows = np.concatenate([value for key, value in self.reply.shared.items() if "lora_A" in key]).astype(np.float64)
        _, sizes, vectors = np.linalg.svd(rows / np.linalg.norm(rows), full_matrices=False)
        space = vectors[sizes > 1e-6 * sizes[0]]
        x = inputs(self.plan) * (1.0 if mask is None else mask)
        return np.linalg.norm(x - (x @ space.T) @ space, axis=-1) / np.linalg.norm(x, axis=-1)

    def read(self) -> tuple[int, int]:
        """Tokens that are found, of all. At each position, as many of the nearest are taken as tokens were there."""
        distances, found, total = self.distances(), 0, 0
        for position in range(max(map(len, self.trained))):
            true = {text[position] for text in self.trained if position < len(text)}
            nearest = np.argsort(distances[:, position])[: len(true)].tolist()
            found, total = found + len(true.intersection(nearest)), total + len(true)
        return found, total


def inputs(plan: Plan) -> np.ndarray:
    """The inputs of the first layer for every token at every position: shape (vocabulary, positions, width)."""
    parts = BertModel.from_pretrained(plan.model.source).embeddings
    with torch.no_grad():
        places = parts.position_embeddings.weight[: plan.model.max_length] + parts.token_type_embeddings.weight[0]
        return parts.LayerNorm(parts.word_embeddings.weight[:, None] + places).double().numpy()


def order(seed: int, examples: int, count: int) -> list[int]:
    return next(batch_indices(examples, count, TrainCursor(0, 1, 0, seed, 0)))


def ask(site: SiteSettings, plan: Plan, b: float = 1.0) -> Reading:
    """Send A = 0 and a random B of scale ``b``."""
    session, rng = TrainerSession(site), np.random.default_rng(1)
    shared = {
        key: ((0.0 if "lora_A" in key else b) * rng.normal(size=value.shape)).astype(np.float32)
        for key, value in initial_shared_state(plan).items()
    }
    request = TrainRequest("town", 1, "train", 0, to_json(plan), shared, evaluate=False)
    accepted = session.accept("town", to_json(plan))
    reply, _ = session.answer(accepted, request, lambda done, total: None)
    trainer = session.trainer(accepted)
    return Reading(plan, reply, [list(tokens) for tokens, _ in trainer.task.train.examples], trainer.site_seed)


def test_one_step_on_one_text_shows_all_its_tokens(bert: MakeModel, tmp_path: Path) -> None:
    """Without limits, as before there were any."""
    found = ask(site_in(tmp_path, seeds="recipe"), plan_of(bert(64, 0.0), ONE_TEXT)).read()
    print(f"read {found[0]} of {found[1]} tokens")
    assert found == (8, 8)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_secret_seeds_alone_do_not_hide_a_text(bert: MakeModel, tmp_path: Path, dropout: float) -> None:
    found = ask(site_in(tmp_path, seeds="secret"), plan_of(bert(64, dropout), ONE_TEXT)).read()
    print(f"read {found[0]} of {found[1]} tokens with secret seeds and dropout {dropout}")
    assert found == (8, 8)


@pytest.mark.parametrize(("seeds", "knows"), [("recipe", True), ("secret", False)])
def test_the_recipes_seed_tells_row_and_dropout_mask_and_a_secret_does_not(
    bert: MakeModel, tmp_path: Path, seeds: str, knows: bool
) -> None:
    """From the recipe alone the coordinator computes which row a step sees and which inputs dropout removes."""
    reading = ask(site_in(tmp_path, seeds=seeds), plan_of(bert(64, 0.1), ONE_TEXT))
    guess = seed_from(reading.plan.seed, "town", "ada")
    with torch.random.fork_rng():
        torch.manual_seed(seed_from(guess, "round", 1))
        mask = torch.nn.functional.dropout(torch.ones(1, 8, 64), 0.1)[0].numpy()
    (text,) = reading.trained
    distances = [reading.distances(mask)[token, position] for position, token in enumerate(text)]
    assert bool(max(distances) < 1e-4) is knows
    assert bool(min(distances) < 1e-4) is knows
    count = len(reading.examples)
    assert (order(guess, count, count) == order(reading.seed, count, count)) is knows


@pytest.mark.parametrize(("noise", "least", "most"), [(1e-6, 8, 8), (1e-2, 0, 2), (1.0, 0, 1)])
def test_the_noise_of_differential_privacy_hides_the_text(
    bert: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: float, least: int, most: int
) -> None:
    """The one text is drawn for certain. The attack takes the token with the largest share in A at each position.

    With next to no noise it reads what it reads without privacy, so the noise is what hides the text.
    """
    monkeypatch.setattr(NoiseSource, "sample", lambda self, count, rate, step: [0])
    monkeypatch.delitem(plan_bounds.LOWEST, "privacy.noise_multiplier")  # type: ignore[arg-type]
    plan = dataclasses.replace(plan_of(bert(64, 0.0), ONE_TEXT), privacy=PrivacySettings(noise_multiplier=noise))
    reading = ask(site_in(tmp_path), plan)
    rows = np.concatenate([value for key, value in reading.reply.shared.items() if "lora_A" in key]).astype(np.float64)
    space = np.linalg.svd(rows)[2][:8]  # the strongest directions, one for each token
    x = inputs(plan)
    distances = np.linalg.norm(x - (x @ space.T) @ space, axis=-1) / np.linalg.norm(x, axis=-1)
    found = sum(int(distances[:, i].argmin()) == token for i, token in enumerate(reading.examples[0]))
    print(f"read {found} of 8 tokens with noise multiplier {noise}")
    assert least <= found <= most


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "train.steps: expected at least 24 examples (allow.min_examples), found 1 × batch size 1"),
        ({"steps": 24}, "train.batch_size: expected at least 8 (allow.min_batch_size), found 1"),
        ({"steps": 3, "batch_size": 8}, "model.max_length: expected at least 32 (allow.min_max_length), found 8"),
    ],
)
def test_a_provisioned_site_refuses_the_plan(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """The site file is the one that ``colora provision`` writes. One change of the plan does not get through."""
    (tmp_path / "sites.toml").write_text('[coordinator]\naddress = "a:1"\n[[site]]\nname = "ada"\n')
    provision(tmp_path / "sites.toml", tmp_path / "keys")
    session = TrainerSession(load_site(tmp_path / "keys" / "sites" / "ada" / "site.toml"))
    plan = plan_of("asset:minilm-l6", {**ONE_TEXT, **change})
    with pytest.raises(RefusedError) as caught:
        session.accept("town", to_json(plan))
    assert str(caught.value) == f"site ada: {message}"
    assert len(out_of_the_ordinary(plan, session.site)) >= 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_are_within_the_ordinary_limits(path: Path) -> None:
    plan = load_recipe(path).plan
    site = parse(SiteSettings, {"name": "ada", "data": {"source": "a.csv"}})
    site = dataclasses.replace(site, allow=ORDINARY)
    check_allowed(plan, plan.name, site)
    check_lower_bounds(plan, site)
    assert out_of_the_ordinary(plan, site) == ()


@pytest.mark.parametrize("lr", [1e-3, 1.0])
def test_within_the_ordinary_limits_some_tokens_can_still_be_read(bert: MakeModel, tmp_path: Path, lr: float) -> None:
    """The strongest plan we found: Adam with faint gradients takes SGD's steps. Texts of 12 words, width 384.

    With 24 texts, a guess of the nearest tokens would be right for 24 of 500, or 5 %.
    """
    limits = {"max_rank": ORDINARY.max_rank, "min_examples": 24, "min_batch_size": 8, "min_max_length": 32}
    site = site_in(tmp_path, **limits, optimizers=["adamw", "adam"])
    plan = plan_of(bert(384, 0.0), {**IN_BOUNDS, "lr": lr}, rank=32, length=32)
    found, total = ask(site, plan, FAINT).read()
    print(f"read {found} of {total} tokens with learning rate {lr}")
    assert 0.05 < found / total < 0.5


@pytest.mark.parametrize(
    ("privacy", "message"),
    [
        ({"epsilon": 8.0, "metrics": "all"}, "privacy.metrics: expected none (all is for simulations), found all"),
        ({"epsilon": 8.0, "delta": 0.01}, "privacy.delta: expected at most 1e-05 (allow.max_delta), found 0.01"),
        ({"noise_multiplier": 0.4}, "privacy.noise_multiplier: expected noise of at least 0.5 (allow.min_noise)"),
        ({"epsilon": 8.0, "noise_multiplier": 0.6}, ""),
    ],
)
@pytest.mark.parametrize("method", ["colora", "local"])
def test_a_deployed_site_does_not_take_the_coordinators_word_on_privacy(
    privacy: dict[str, Any], message: str, method: str
) -> None:
    """Also for a method that shares nothing, whose metrics would leave."""
    site = parse(SiteSettings, {"name": "ada", "data": {"source": "a.csv"}, "allow": {"min_noise": 0.5}})
    raw = {"name": "town", "rounds": 1, "model": {"source": "m"}, "method": {"name": method}, "privacy": privacy}
    if not message:
        check_lower_bounds(parse(Plan, raw), site)
        return
    with pytest.raises(RefusedError) as caught:
        check_lower_bounds(parse(Plan, raw), site)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("allow", "train", "message"),
    [
        ({"min_examples": 40}, {"steps": 5, "batch_size": 8}, ""),
        ({"min_examples": 41}, {"steps": 5, "batch_size": 8}, "train.steps: expected at least 41 examples"),
        (
            {"min_examples": 16},
            {"schedule": "alternating", "personal_steps": 99, "shared_steps": 1, "batch_size": 8},
            "train.shared_steps: expected at least 16 examples",
        ),
        (
            {"min_examples": 16},
            {
                "schedule": "phases",
                "batch_size": 8,
                "phase": [{"steps": 1, "groups": ["A"]}, {"steps": 9, "groups": ["B", "head"]}],
            },
            "train.phase.steps: expected at least 16 examples (allow.min_examples), found 1 × batch size 8",
        ),
        ({"optimizers": ["sgd"]}, {}, "train.optimizer: expected one of sgd (allow.optimizers), found adamw"),
        ({"require_clipping": True}, {"max_update_norm": 1.0}, ""),
        (
            {"require_clipping": True},
            {},
            "train.max_update_norm: expected a number (allow.require_clipping), found none",
        ),
        ({"max_epsilon": 5.0}, {}, "privacy: expected differential privacy (allow.max_epsilon), found none"),
        ({"min_noise": 0.5}, {}, "privacy: expected differential privacy (allow.min_noise), found none"),
        ({"metrics": "none"}, {"report_benefit": True}, "train.report_benefit: expected false"),
        ({"metrics": "rounded"}, {"report_benefit": True}, ""),
    ],
)
def test_each_lower_bound_holds_to_the_number(allow: dict[str, Any], train: dict[str, Any], message: str) -> None:
    """Steps count on the shared group that has the fewest, since its update shows the fewest examples."""
    raw = {"name": "ada", "data": {"source": "a.csv"}, "allow": allow}
    site = parse(SiteSettings, raw)
    plan = parse(Plan, {"name": "town", "rounds": 1, "model": {"source": "m"}, "train": train})
    assert isinstance(site.allow, AllowSettings)
    if not message:
        check_lower_bounds(plan, site)
        return
    with pytest.raises(RefusedError) as caught:
        check_lower_bounds(plan, site)
    assert str(caught.value).startswith(f"site ada: {message}")
    local = dataclasses.replace(plan, method=dataclasses.replace(plan.method, name="local"))
    if not train.get("report_benefit") and not allow.keys() & {"max_epsilon", "min_noise"}:
        check_lower_bounds(local, site)  # only metrics are sent
