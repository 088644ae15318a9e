"""Settings of rows: sources, columns, splits, and how a simulation makes sites out of them."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ..dataset import TaskKind
from .field_types import STRICT, Name, Positive, PositiveFloat
from .model_schema import Private


@dataclass(frozen=True, config=STRICT)
class DataSettings:
    """Where rows come from and what their columns mean."""

    source: str = ""
    """A .jsonl, .csv, .tsv, .parquet or .npz file, ``asset:NAME/PART``, or a hub data set: ``ID`` or ``ID:SPLIT``.
    Required at every site."""

    test_source: str | None = None
    """Source of the test rows. Unset: a part of ``source`` is held out."""

    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Fraction of ``source`` that is held out for testing. Used without ``test_source``, unless both ``train`` and
    ``test`` are set."""

    task: TaskKind = "classification"
    """The task that the site trains for."""

    text: str = "text"
    """Column of the input text, in classification and regression."""

    label: str = "label"
    """Column of the label, in classification."""

    label_columns: tuple[str, ...] | None = None
    """Multi-label classification: one column of 0 and 1 for each label, instead of ``label``."""

    labels: tuple[str, ...] | None = None
    """Labels to keep, in the order of the head's classes. Unset: all labels in the training rows, sorted."""

    prompt: str = "prompt"
    """Column of the prompt, in generation."""

    completion: str = "completion"
    """Column of the completion, in generation."""

    messages: str | None = None
    """Column of chat messages, a list of ``{role, content}``. Replaces ``prompt`` and ``completion``."""

    chat: bool = False
    """Wrap prompt and completion as a user and an assistant turn of the chat template."""

    where: dict[str, str] | None = None
    """Column values that a row must have. Unset: all rows are kept."""

    train: Positive | None = None
    """Maximum number of training rows per site. Unset: no limit."""

    test: Positive | None = None
    """Maximum number of test rows per site. Unset: no limit."""

    stratify: bool = False
    """Hold out the same fraction of every label, as scikit-learn's ``stratify`` does. Otherwise the held-out rows are
    drawn from all rows. Used without ``test_source``."""

    shuffle: bool = True
    """Shuffle the rows before ``train`` and ``test`` are applied. The order derives from seed, site and source."""


@dataclass(frozen=True, config=STRICT)
class PartitionSettings:
    """How a simulation makes sites out of one data set, instead of ``[[site]]`` tables."""

    by: Literal["column", "iid", "dirichlet"]
    """One site per value of a column, a random split, or a Dirichlet split over labels."""

    column: str | None = None
    """Column whose values become sites. Required with ``by = "column"``."""

    sites: Positive = 8
    """Number of sites, with ``iid`` and ``dirichlet``."""

    alpha: PositiveFloat = 0.5
    """Concentration of the Dirichlet distribution. Smaller values give sites with fewer labels."""


@dataclass(frozen=True, config=STRICT)
class SimulatedSiteSettings:
    """A site: its name, its data, and the round in which it joins. Keys of ``[data]`` can be written here directly."""

    name: Name
    """Unique name: a letter or digit, then at most 63 letters, digits, ``.``, ``_`` or ``-``. Seeds derive from it."""

    data: DataSettings = field(default_factory=DataSettings)
    """Keys of ``[data]`` that differ at this site."""

    from_round: Positive = 1
    """First round in which the site takes part. With ``rounds`` + 1 it joins after training and trains only its
    personal groups."""

    private: Private | None = None
    """Private adapter of this site: a kind, or a table. Unset: the recipe's."""
