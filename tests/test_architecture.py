"""The architecture rules, checked on the sources and by the import contracts in pyproject.toml."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import pytest

from colora.common.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("common", "client", "server", "simulation", "transfer", "colora")
FLWR_PUBLIC = ("flwr.app", "flwr.serverapp", "flwr.clientapp", "flwr.simulation")
MAY_IMPORT_FLWR = (  # public names
    "common/protocol/flower_messages.py",
    "client/client_app.py",
    "client/deployment/*",
    "server/server_app.py",
    "server/rounds/*",
    "server/deployment/*",
    "simulation/*",
)
FLWR_COMPAT = {f"{package}/flower_compat.py" for package in ("common", "server", "client")}  # public and private names
HEAVY = ("torch", "transformers", "peft")
MAX_LINES = 400
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"


@dataclass(frozen=True)
class Source:
    """A source file, by its path from the root."""

    path: str

    @property
    def package(self) -> str:
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

    def flwr_names(self) -> Iterator[str]:
        """Names of Flower that the file imports."""
        return (name for level, name in self.imports() if not level and name.split(".")[0] == "flwr")


SOURCES = [
    Source(path.relative_to(ROOT).as_posix()) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
]


def offenders(broken: Iterator[tuple[Source, object]]) -> list[str]:
    return [f"{source.path}: {what}" for source, what in broken]


def test_sources_are_found() -> None:
    """Every rule below holds for an empty list, too."""
    assert {source.package for source in SOURCES} == {*PACKAGES}
    assert len(SOURCES) > 100


def test_every_package_is_installed_and_copied() -> None:
    """A package that the wheel, the type checker or the images omit is missed only on a fresh machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    wheel = project["hatch"]["build"]["targets"]["wheel"]
    assert {*wheel["only-include"]} == {*PACKAGES, "recipes"}
    assert wheel["sources"] == {package: f"colora/{package}" for package in {*PACKAGES, "recipes"} - {"colora"}}
    assert {*project["pyright"]["include"]} == {*PACKAGES}
    image = (ROOT / "containers/Dockerfile").read_text(encoding="utf-8")
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for package in wheel["only-include"]:
        assert f"COPY {package} /src/{package}\n" in image
        assert f"!{package}" in sent


def lint_imports(folder: Path, added: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the import contracts on the installed layout, with ``added`` lines at the end of some files.

    import-linter reads no package whose ``__path__`` is extended at run time, as in a checkout.
    """
    for source in SOURCES:
        copy = folder / "colora" / source.path.removeprefix("colora/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(f"{source.text}\n{added.pop(source.path, '')}\n", encoding="utf-8")
    assert not added
    (folder / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-c", LINT], cwd=folder, capture_output=True, text=True, env=environment)


def test_import_contracts_are_kept(tmp_path: Path) -> None:
    done = lint_imports(tmp_path, {})
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Analyzed {len(SOURCES)} files" in done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "line", "contract"),
    [
        ("server/reporting/events.py", "from ...client import client_app", "The server and the client"),
        ("common/seeds.py", "def f():\n    from ..server import rounds", "The server and the client"),
        ("server/server_app.py", "from ..transfer import sampling", "The server does not use transfer"),
        ("common/config/rules.py", "from ..training import loop", "Layers of common"),
        ("client/training/trainer.py", "from ..artifacts import export", "Layers of the client"),
        ("server/reporting/events.py", "from ..rounds import strategy", "Layers of the server"),
        ("server/rounds/admission.py", "def f():\n    from . import strategy", "No import cycles"),
    ],
)
def test_a_broken_import_contract_is_found(path: str, line: str, contract: str, tmp_path: Path) -> None:
    done = lint_imports(tmp_path, {path: line})
    assert done.returncode == 1
    assert any(text.startswith(contract) and text.endswith("BROKEN") for text in done.stdout.splitlines()), done.stdout


def test_packages_import_each_other_relatively() -> None:
    """So that a checkout, an installed wheel and a Flower bundle are the same code under the name ``colora``."""
    absolute = ((s, name) for s in SOURCES for level, name in s.imports() if not level)
    ours = ((s, name) for s, name in absolute if name.split(".")[0] in PACKAGES)
    assert offenders((s, name) for s, name in ours if s.package != "colora" or not name.startswith("colora")) == []


def test_flower_is_imported_at_the_edges_only() -> None:
    """Public names of Flower are imported only by the two apps, rounds, messages, deployment and simulation.

    Training, aggregation and the adapters are plain functions that a notebook can call.
    """
    users = {s.path for s in SOURCES if any(s.flwr_names())}
    inside = {path for path in users - FLWR_COMPAT if not any(fnmatch(path, pattern) for pattern in MAY_IMPORT_FLWR)}
    assert inside == set()
    assert {"server/rounds/strategy.py", "client/client_app.py"} <= users


def test_private_names_of_flower_are_in_one_module_per_side() -> None:
    """So that there is one place to look when a new version of Flower breaks them."""
    private = [(s, n) for s in SOURCES for n in s.flwr_names() if ".".join(n.split(".")[:2]) not in FLWR_PUBLIC]
    assert offenders((s, name) for s, name in private if s.path not in FLWR_COMPAT) == []
    assert {s.path for s, _ in private} == FLWR_COMPAT


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "server.deployment.supervisor",
        "server.flower_compat",
        "client.deployment.supervisor",
        "client.deployment.clientapp_main",
    ],
)
def test_commands_import_flower_only_when_they_need_it(module: str) -> None:
    code = f"import sys, colora.{module}; print('flwr' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "False", done.stderr


def test_the_client_app_and_the_coordinator_import_no_torch() -> None:
    """Flower starts a ClientApp process for every message, and the coordinator has no model."""
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


def test_the_client_app_does_not_build_the_settings() -> None:
    """Building them takes a tenth of a ClientApp's start, and its messages carry the plan as text."""
    built = "[m for m in sys.modules if m.startswith('colora.common.config')]"
    code = f"import sys, colora.client.client_app; print({built})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "[]", done.stderr


def test_only_the_method_table_names_a_method() -> None:
    """A new method is one more row. ``colora`` and ``local`` also name the package and an engine: see the next test."""
    other_words = {"colora", "local"}
    names = set(METHODS) - other_words
    texts = ((s, node.value) for s in SOURCES for node in s.nodes if isinstance(node, ast.Constant))
    assert offenders((s, text) for s, text in texts if text in names and s.path != "common/methods.py") == []
    assert names
    defaults = {(s.path, node.value) for s, node in assignments("name", "BASELINE") if node.value in METHODS}
    assert defaults == {("common/config/model_schema.py", "colora"), ("simulation/run.py", "local")}


def assignments(*targets: str) -> Iterator[tuple[Source, ast.Constant]]:
    for source in SOURCES:
        for node in source.nodes:
            target = node.target if isinstance(node, ast.AnnAssign) else None
            target = node.targets[0] if isinstance(node, ast.Assign) else target
            value = getattr(node, "value", None)
            if isinstance(target, ast.Name) and target.id in targets and isinstance(value, ast.Constant):
                yield source, value


def test_nothing_is_decided_by_a_methods_name() -> None:
    """No comparison, match or look-up contains a method's name, and ``method.name`` is read only to show it."""

    def decided(source: Source) -> Iterator[str]:
        for node in source.nodes:
            if isinstance(node, ast.Compare | ast.MatchValue | ast.Subscript):
                places = (node.slice,) if isinstance(node, ast.Subscript) else (node,)
                words = {n.value for place in places for n in ast.walk(place) if isinstance(n, ast.Constant)}
                if words & set(METHODS) and "Literal" not in ast.unparse(node):
                    yield ast.unparse(node)

    assert offenders((s, text) for s in SOURCES for text in decided(s)) == []
    reads = {s.path for s in SOURCES for node in s.nodes if isinstance(node, ast.Attribute) and _is_name_of(node)}
    shown = {
        "server/server_app.py",
        "server/deployment/status.py",
        "client/artifacts/export.py",
        "client/trainer_service/site_events.py",
        "client/artifacts/model_card.py",
        "client/personalize.py",
        "common/config/rules.py",
    }
    compared = {
        "client/trainer_service/policy.py",  # with the site's own list
        "simulation/cells.py",  # with the recipe's own method, which keeps its other keys
    }
    assert reads <= shown | compared


def _is_name_of(node: ast.Attribute) -> bool:
    owner = node.value
    return node.attr == "name" and isinstance(owner, ast.Attribute) and owner.attr == "method"


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [s.path for s in SOURCES if Path(s.path).stem in ("utils", "helpers", "util", "helper", "misc")] == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.path)
def test_every_file_has_a_docstring_and_a_maximum_length(source: Source) -> None:
    assert ast.get_docstring(source.tree), f"{source.path} has no docstring"
    assert len(source.text.splitlines()) < MAX_LINES


def test_benchmarks_import_names_that_exist() -> None:
    """Benchmarks are run by hand and rarely, so that a missing name would go unnoticed."""
    missing = []
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("colora."):
                module = importlib.import_module(str(node.module))
                missing += [f"{path.name}: {node.module}.{a.name}" for a in node.names if not hasattr(module, a.name)]
    assert missing == []
