"""Settings of rows: sources, columns, splits, and how a simulation makes sites out of them."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ..dataset import TaskKind
from .field_types import STRICT, Count, Name, Positive, PositiveFloat
from .model_schema import Private


@dataclass(frozen=True, config=STRICT)
class DataSettings:
    """Where rows come from and what their columns mean."""

    source: str = ""
    """A file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .xlsx or .npz, compressed or not), a folder of
    ``save_to_disk``, ``asset:NAME/PART``, or a hub data set: ``ID`` or ``ID:SPLIT``. Required at every site."""

    test_source: str | None = None
    """Source of the test rows. Unset: a part of ``source`` is held out."""

    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Fraction of ``source`` that is held out for testing. Used without ``test_source``, unless both ``train`` and
    ``test`` are set."""

    config: str | None = None
    """Configuration of a hub data set. Unset: its default."""

    delimiter: Annotated[str, Field(pattern=r"^[^\r\n\"]$")] | None = None
    """Character between the columns of a .csv or .tsv file. Unset: a comma or a tab, or another one that the first
    lines show."""

    encoding: str | None = None
    """Encoding of a text file, such as ``cp1252``. Unset: UTF-8, UTF-16 with a byte order mark, or the most likely
    one."""

    task: TaskKind = "classification"
    """The task that the site trains for."""

    text: str = "text"
    """Column of the input text, in classification, or a template such as ``{title}: {body}``."""

    text_pair: str | None = None
    """Column of a second text, for tasks on pairs of texts. Unset: one text per row."""

    label: str = "label"
    """Column of the label, in classification."""

    label_columns: tuple[str, ...] | None = None
    """Multi-label classification: one column of 0 and 1 for each label, instead of ``label``."""

    labels: tuple[str, ...] | None = None
    """Labels to keep, in the order of the head's classes. Unset: all labels in the training rows, sorted, whole numbers
    by value."""

    format: Literal["prompt-completion", "alpaca", "sharegpt", "messages"] | None = None
    """Format of instruction data, in generation. Unset: the one that the columns show."""

    prompt: str = "prompt"
    """Column of the prompt, in generation, or a template such as ``{question} {choices}``."""

    completion: str = "completion"
    """Column of the completion, in generation, or a template."""

    messages: str | None = None
    """Column of chat messages: a list of ``{role, content}`` or of ShareGPT's ``{from, value}``, or its JSON. Replaces
    ``prompt`` and ``completion``."""

    system: str | None = None
    """Column of a system message, in generation. Unset: a column ``system`` of a conversation."""

    chat: bool = False
    """Wrap prompt and completion, or an Alpaca row, as a user and an assistant turn of the chat template."""

    where: dict[str, str] | None = None
    """Column values that a row must have. Unset: all rows are kept."""

    train: Positive | None = None
    """Maximum number of training rows per site. They are taken from each label in turn, so rare labels get a larger
    share. Unset: no limit."""

    test: Positive | None = None
    """Maximum number of test rows per site. They are taken from each label in turn, so accuracy then counts rare labels
    more. Unset: no limit."""

    stratify: bool = False
    """Hold out the same fraction of every label, as scikit-learn's ``stratify`` does. Otherwise the held-out rows are
    drawn from all rows. Used without ``test_source``."""

    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the training rows that a site does not train on. ``train.fallback`` compares two models on them."""

    evaluate_on: Literal["test", "validation"] = "test"
    """Rows that models are measured on. ``validation``: those that ``validation_fraction`` holds out of the training
    rows. Use it to choose settings without the test rows."""

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

    min_rows: Count = 8
    """Minimum number of rows per site, with ``dirichlet``. Sites with fewer get rows of the largest sites."""

    min_labels: Count = 2
    """Minimum number of labels per site, with ``dirichlet``."""

    max_ranks: tuple[Positive, ...] | None = None
    """``max_rank`` of the first, second, … site, and again from the first. Unset: none."""


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

    max_rank: Positive | None = None
    """``allow.max_rank`` of this site: with a smaller one than ``adapter.rank``, it trains an adapter of that rank."""
