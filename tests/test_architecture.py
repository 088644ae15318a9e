"""The laws of the house (DESIGN), read from the sources themselves."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from colora.common.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {  # room → the rooms of ours that it may import beside itself
    "common": set[str](),
    "server": {"common"},
    "transfer": {"common"},
    "client": {"common", "transfer"},
    "simulation": {"common", "client", "server", "transfer"},
    "colora": {"common", "client", "server", "simulation", "transfer"},
}
FLWR_FILES = {
    "server/rounds/strategy.py",
    "server/rounds/dispatch.py",
    "server/rounds/registry.py",
    "common/protocol/flower_messages.py",
}
FLWR_COMPAT = {f"{room}/flower_compat.py" for room in ("common", "server", "client")}
FLWR_PUBLIC = ("flwr.app", "flwr.serverapp", "flwr.clientapp", "flwr.simulation")
FLWR_NAMES = {"server_app.py", "client_app.py"}
HEAVY = ("torch", "transformers", "peft")
MAX_LINES = 400


@dataclass(frozen=True)
class Source:
    """A source file, by its path from the root."""

    path: str

    @property
    def room(self) -> str:
        return self.path.split("/")[0]

    @cached_property
    def text(self) -> str:
        return (ROOT / self.path).read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    def imports(self) -> Iterator[tuple[int, str]]:
        """(level, dotted name) of everything imported anywhere in the file; names count as modules."""
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from ((0, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((node.level, f"{node.module or ''}.{alias.name}".strip(".")) for alias in node.names)

    def rooms(self) -> Iterator[str]:
        """The rooms of ours that the file imports, however it spells them."""
        package = ["colora", *Path(self.path).parts[:-1]]
        for level, name in self.imports():
            parts = [*package[: len(package) - level + 1], *name.split(".")] if level else name.split(".")
            if parts[0] == "colora":
                yield parts[1] if len(parts) > 1 else "colora"
            elif parts[0] in MAY_IMPORT:
                yield parts[0]


SOURCES = [
    Source(path.relative_to(ROOT).as_posix())
    for room in MAY_IMPORT
    if (ROOT / room).is_dir()
    for path in sorted((ROOT / room).rglob("*.py"))
]


def offenders(broken: Iterator[tuple[Source, object]]) -> list[str]:
    return [f"{source.path}: {what}" for source, what in broken]


def test_there_is_something_to_judge() -> None:
    """Every law below holds of an empty list too."""
    assert {source.room for source in SOURCES} == {*MAY_IMPORT}
    assert len(SOURCES) > 30
    found = {room for source in SOURCES if source.path == "simulation/run.py" for room in source.rooms()}
    assert found >= {"common", "client", "server"}


def test_every_room_is_installed_and_copied() -> None:
    """A room that the wheel, the type checker or the images leave out is missed only on a fresh machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    wheel = project["hatch"]["build"]["targets"]["wheel"]
    assert {*wheel["only-include"]} == {*MAY_IMPORT, "recipes"}
    assert wheel["sources"] == {room: f"colora/{room}" for room in {*MAY_IMPORT, "recipes"} - {"colora"}}
    assert {*project["pyright"]["include"]} == {*MAY_IMPORT}
    image = (ROOT / "containers/Dockerfile").read_text(encoding="utf-8")
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for room in wheel["only-include"]:
        assert f"COPY {room} /src/{room}\n" in image
        assert f"!{room}" in sent


def test_server_and_client_meet_only_in_common_and_simulation_stands_above() -> None:
    rooms = ((s, room) for s in SOURCES for room in s.rooms() if room in MAY_IMPORT)
    assert offenders((s, room) for s, room in rooms if room not in MAY_IMPORT[s.room] | {s.room}) == []


def test_common_imports_nothing_of_ours_outside() -> None:
    assert {room for s in SOURCES if s.room == "common" for room in s.rooms()} == {"common"}


def test_rooms_name_each_other_relatively() -> None:
    """So that a checkout, an installed wheel and a Flower bundle are the same code under the name ``colora``."""
    absolute = ((s, name) for s in SOURCES for level, name in s.imports() if not level)
    ours = ((s, name) for s, name in absolute if name.split(".")[0] in MAY_IMPORT)
    assert offenders((s, name) for s, name in ours if s.room != "colora" or not name.startswith("colora")) == []


def test_flower_stays_at_the_edges() -> None:
    """Training, aggregation and the adapters are plain functions that a notebook can call."""
    users = {s.path for s in SOURCES for level, name in s.imports() if not level and name.split(".")[0] == "flwr"}
    allowed = {s.path for s in SOURCES if s.room == "simulation" or Path(s.path).name in FLWR_NAMES} | FLWR_FILES
    assert users - allowed - FLWR_COMPAT == set()
    assert {"server/rounds/strategy.py", "client/client_app.py"} <= users


def test_private_names_of_flower_stand_in_one_module_a_side() -> None:
    """What a new Flower may break is found in one place."""
    named = ((s, name) for s in SOURCES for level, name in s.imports() if not level and name.split(".")[0] == "flwr")
    private = [(s, name) for s, name in named if ".".join(name.split(".")[:2]) not in FLWR_PUBLIC]
    assert offenders((s, name) for s, name in private if s.path not in FLWR_COMPAT) == []
    assert {s.path for s, _ in private} == FLWR_COMPAT


@pytest.mark.parametrize(
    "module",
    [
        "server.deployment.supervisor",
        "server.flower_compat",
        "client.deployment.supervisor",
        "client.deployment.clientapp_main",
    ],
)
def test_commands_load_flower_when_they_need_it(module: str) -> None:
    code = f"import sys, colora.{module}; print('flwr' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "False", done.stderr


def test_what_flower_starts_for_every_message_imports_no_torch() -> None:
    """The thin ClientApp and the coordinator are processes without a model."""
    modules = (
        "client.client_app",
        "server.server_app",
        "server.rounds.strategy",
        "common.protocol.flower_messages",
        "cli",
    )
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(f"colora.{{module}}")
    print(module, [name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.stdout.splitlines() == [f"{module} []" for module in modules], done.stderr


def test_no_file_but_the_table_names_a_method() -> None:
    """A new method is one more row. The package's and an engine's name are words of their own: see the next law."""
    other_words = {"colora", "local"}
    names = set(METHODS) - other_words
    texts = ((s, node.value) for s in SOURCES for node in s.nodes if isinstance(node, ast.Constant))
    assert offenders((s, text) for s, text in texts if text in names and s.path != "common/methods.py") == []
    assert names
    defaults = {(s.path, node.value) for s, node in assignments("name", "BASELINE") if node.value in METHODS}
    assert defaults == {("common/config/schema.py", "colora"), ("simulation/run.py", "local")}


def assignments(*targets: str) -> Iterator[tuple[Source, ast.Constant]]:
    for source in SOURCES:
        for node in source.nodes:
            target = node.target if isinstance(node, ast.AnnAssign) else None
            target = node.targets[0] if isinstance(node, ast.Assign) else target
            value = getattr(node, "value", None)
            if isinstance(target, ast.Name) and target.id in targets and isinstance(value, ast.Constant):
                yield source, value


def test_nothing_is_decided_by_a_methods_name() -> None:
    """No comparison, match or look-up with a method's name in it, and nobody reads ``method.name`` to decide."""

    def decided(source: Source) -> Iterator[str]:
        for node in source.nodes:
            if isinstance(node, ast.Compare | ast.MatchValue | ast.Subscript):
                places = (node.slice,) if isinstance(node, ast.Subscript) else (node,)
                words = {n.value for place in places for n in ast.walk(place) if isinstance(n, ast.Constant)}
                if words & set(METHODS) and "Literal" not in ast.unparse(node):
                    yield ast.unparse(node)

    assert offenders((s, text) for s in SOURCES for text in decided(s)) == []
    reads = {s.path for s in SOURCES for node in s.nodes if isinstance(node, ast.Attribute) and _is_name_of(node)}
    told = {
        "server/server_app.py",
        "server/deployment/status.py",
        "client/artifacts/export.py",
        "client/artifacts/model_card.py",
        "client/personalize.py",
        "common/config/loader.py",
    }
    assert reads <= told | {"client/trainer_service/policy.py"}, "told to people, and compared with a site's own list"


def _is_name_of(node: ast.Attribute) -> bool:
    owner = node.value
    return node.attr == "name" and isinstance(owner, ast.Attribute) and owner.attr == "method"


def test_no_module_is_a_drawer_for_anything() -> None:
    assert [s.path for s in SOURCES if Path(s.path).stem in ("utils", "helpers", "util", "helper", "misc")] == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.path)
def test_every_file_has_a_docstring_and_an_end(source: Source) -> None:
    assert ast.get_docstring(source.tree), f"{source.path} does not say what it is"
    assert len(source.text.splitlines()) < MAX_LINES


def test_what_benchmarks_import_of_ours_is_there() -> None:
    """They are run by hand, and rarely: a name that moved would be missed on the day that it is needed."""
    missing = []
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("colora."):
                module = importlib.import_module(str(node.module))
                missing += [f"{path.name}: {node.module}.{a.name}" for a in node.names if not hasattr(module, a.name)]
    assert missing == []
