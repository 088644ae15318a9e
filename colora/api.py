"""The Python API: run a simulation, read its results, and use a site's personal model.

```python
import colora

run = colora.simulate("demo", out="runs/demo")
run.results()                          # one row per site: base, shared, personal, alone
run.to_frame()                         # one row per site, round and metric
model, tokenizer = run.site("united").load()
```
"""

# pyright: reportMissingImports=false
# (in a checkout the other packages lie beside this one, where a type checker does not look)

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from colora.cli.recipes import find_recipe

if TYPE_CHECKING:
    from pandas import DataFrame

    from colora.common.config.schema import Recipe
    from colora.common.models.saved import SavedModel

Event = dict[str, Any]
Part = Literal["all", "shared", "personal"]
MODES = ("base", "shared", "personal", "alone")  # columns of Run.results


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe from a ``.toml`` file, or a shipped one by its name.

    ``overrides`` are ``"key.path=value"`` strings, as for ``colora simulate --set``. Raises ConfigError.
    """
    from colora.common.config.loader import load_recipe as load

    return load(find_recipe(str(recipe)), tuple(overrides))


def simulate(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> Run:
    """Run a simulation to its end in the folder ``out`` (default: ``runs/NAME``) and return it.

    ``resume`` continues an interrupted run in that folder. ``on_event`` receives every event as it is recorded.
    Raises ConfigError, DataError, ModelError or AssetError for bad input, StateError when the folder holds another run,
    QuorumError when too few sites replied.
    """
    from colora.simulation.run import simulate as run

    settings = load_recipe(recipe) if isinstance(recipe, str | Path) else recipe
    folder = Path(out) if out is not None else Path("runs") / settings.name
    return Run(run(settings, folder, resume=resume, listener=on_event).path)


def open_run(path: str | Path) -> Run:
    """Open a run folder, finished or not. Raises StateError when there is none."""
    from colora.common.errors import StateError

    run = Run(Path(path))
    if not (run.path / "recipe.toml").is_file():
        raise StateError(str(path), "a run folder", "no recipe.toml", message=f"{path} is not a run folder.")
    return run


def read_events(path: str | Path) -> list[Event]:
    """Read the events of a run folder, or of an ``events.jsonl``, in the order they were recorded.

    Events of the local-only baseline have ``baseline: True`` (run folders only).
    """
    from colora.server.reporting.events import read_events as read
    from colora.server.reporting.run_folder import RunFolder

    return RunFolder(Path(path)).events() if Path(path).is_dir() else read(Path(path))


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder: the recipe, the events and the models of its sites."""

    path: Path

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run, with every key resolved."""
        return load_recipe(self.path / "recipe.toml")

    @property
    def sites(self) -> tuple[str, ...]:
        """Site names in roster order."""

        from colora.server.reporting.run_folder import RunFolder

        return tuple(site for site, _ in RunFolder(self.path).read_roster())

    def events(self) -> list[Event]:
        """All events, in order; see ``read_events``."""
        return read_events(self.path)

    def to_frame(self) -> DataFrame:
        """Return every measured value as a data frame, one row a site, round and metric.

        Columns: ``site``, ``round`` (the final personalization is the last round + 1), ``mode`` (``base``, ``shared``,
        ``personal``, ``alone`` for the local-only baseline, or ``train``), ``metric`` (``accuracy``, ``loss``, …) and
        ``value`` (float). A round that was repeated after a restart counts once, with its last values.
        """
        from pandas import DataFrame

        values: dict[tuple[str, int, str, str], float] = {}
        for event in self.events():
            if event["event"] != "reply":
                continue
            for name, value in event["metrics"].items():
                mode, _, metric = name.partition(".")
                if event.get("baseline"):
                    if mode != "personal":
                        continue
                    mode = "alone"
                if value is not None:
                    values[event["site"], event["round"], mode, metric] = float(value)
        rows = [(*key, value) for key, value in values.items()]
        return DataFrame(rows, columns=["site", "round", "mode", "metric", "value"])

    def results(self) -> DataFrame:
        """Return the final table: one row a site, indexed by site, with the task's primary metric.

        Columns: ``task``, ``train`` and ``test`` (numbers of rows), ``base``, ``shared``, ``personal`` and ``alone``
        (floats; NaN where nothing was measured).
        """
        from pandas import DataFrame

        from colora.server.reporting.summary import summarize

        summary = summarize(self.events())
        rows = [
            {"site": site.site, "task": site.task, "train": site.train, "test": site.test}
            | {mode: _number(site.metric(mode)) for mode in MODES}
            for site in summary.rows.values()
        ]
        return DataFrame(rows, columns=["site", "task", "train", "test", *MODES]).set_index("site")

    def site(self, name: str) -> SiteModel:
        """The personal model of a site. Raises StateError when there is no such site or it has trained nothing."""
        from colora.common.errors import StateError

        folder = self.path / "sites" / name
        if not folder.is_dir():
            names = ", ".join(self.sites)
            raise StateError("site", f"one of {names}", name, message=f"This run has no site {name!r}, only {names}.")
        return SiteModel(folder)


@dataclasses.dataclass(frozen=True)
class SiteModel:
    """A site's personal model. ``path`` is the site's folder, its state folder or one of its state files."""

    path: Path

    def saved(self) -> SavedModel:
        """Read the newest state: arrays by group, plan and metadata. Raises StateError."""
        from colora.common.models.saved import read_saved_model

        return read_saved_model(Path(self.path))

    def load(self, device: str = "cpu") -> tuple[Any, Any]:
        """Return ``(model, tokenizer)``: a stock ``PeftModel`` on its base model, in evaluation mode.

        The core and a private adapter are folded into one LoRA, as ``export`` writes it.
        """
        from peft import PeftModel
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        from colora.common.dataset import TASKS
        from colora.common.models.architecture import stock_class
        from colora.common.models.hf_logging import quiet_transformers
        from colora.common.models.sources import source_folder

        saved = self.saved()
        options: dict[str, Any] = {"trust_remote_code": False}
        if saved.metadata.labels:
            options["ignore_mismatched_sizes"] = True
        with tempfile.TemporaryDirectory() as folder, quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT uses names that Transformers 5.23 deprecates
            adapter = Path(folder) / "adapter"
            export(self.path, adapter)
            options["config"] = AutoConfig.from_pretrained(adapter, subfolder="config")
            base = stock_class(saved.metadata.task).from_pretrained(source_folder(saved.plan.model), **options)
            if TASKS[saved.metadata.task].needs_causal_lm:
                base.generation_config = GenerationConfig.from_pretrained(adapter / "config")
            model = PeftModel.from_pretrained(base, str(adapter))
            tokenizer = AutoTokenizer.from_pretrained(adapter)
        return model.to(device).eval(), tokenizer

    def export(self, out: str | Path, *, merge: bool = False, only: Part = "all") -> Path:
        """Write the model to the new folder ``out``; see ``export``."""
        return export(self.path, out, merge=merge, only=only)

    def predict(
        self, rows: Sequence[str | Mapping[str, Any]], *, device: str = "auto", batch_size: int | None = None
    ) -> list[dict[str, Any]]:
        """Predict for texts or rows; see ``predict``."""
        return predict(self.path, rows, device=device, batch_size=batch_size)


def export(
    state: str | Path,
    out: str | Path,
    *,
    merge: bool = False,
    only: Part = "all",
    group: int | None = None,
    round_number: int | None = None,
) -> Path:
    """Write a personal model as a stock PEFT adapter, or with ``merge`` as a full model, and return the folder.

    ``state`` is a site's folder or a state file; with ``only="shared"`` also a run folder or checkpoint, of which
    ``group`` selects a group of sites, 1 being the largest. ``round_number`` selects the model of a round, where all
    rounds' models were kept (``train.keep_states``).
    Raises StateError or ConfigError for what cannot be exported.
    """
    from colora.client.artifacts.export import export as write
    from colora.common.models.saved import read_saved_model

    write(read_saved_model(Path(state), group, round_number), Path(out), only, merge=merge)
    return Path(out)


def predict(
    state: str | Path,
    rows: Sequence[str | Mapping[str, Any]],
    *,
    device: str = "auto",
    batch_size: int | None = None,
) -> list[dict[str, Any]]:
    """Predict with a personal model, one result a row, in order.

    ``rows`` are texts (or prompts), or mappings with ``text``, ``prompt`` or ``messages``. A classifier's results have
    ``label`` and ``probabilities`` (label → float), a generator's have ``completion``; ``truncated`` says whether the
    input was longer than ``model.max_length``. Raises StateError when ``state`` is no site's model.
    """
    from colora.client.artifacts.predict import Predictor
    from colora.common.dataset import TASKS
    from colora.common.models.saved import read_saved_model

    saved = read_saved_model(Path(state))
    spec = TASKS.get(saved.metadata.task)
    field = (spec and spec.input_column) or "text"
    inputs = [{field: row} if isinstance(row, str) else dict(row) for row in rows]
    if saved.metadata.chat:
        inputs = [
            row if "messages" in row else {"messages": [{"role": "user", "content": row[field]}]} for row in inputs
        ]
    return list(Predictor(saved, device=device, batch_size=batch_size).predict(inputs))


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
