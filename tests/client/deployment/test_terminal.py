"""What ``colora client`` tells on the site's terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from colora.client.deployment.supervisor import NodeSupervisor, TrainerSupervisor
from colora.client.trainer_service.client import TrainerError
from colora.common.config.loader import load_site
from colora.common.config.schema import to_json
from colora.server.deployment.provisioning.provision import provision

if TYPE_CHECKING:
    from tests.client.conftest import SiteSetup, TrainerProcess

PLAN = '[coordinator]\naddress = "127.0.0.1:9"\n[[site]]\nname = "north"\n'


def told(setup: SiteSetup, trainer: TrainerProcess) -> list[str]:
    """What the supervisor prints of a trainer's output."""
    path, lines = setup.file, []
    supervisor = TrainerSupervisor(path, load_site(path), lines.append)
    supervisor.child = SimpleNamespace(due=False)  # type: ignore[assignment]
    log = setup.state / "logs" / "trainer.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text(trainer.log + "\n")
    supervisor.ensure_running()
    return lines


def test_the_site_sees_its_rows_every_round_and_the_end(site_setup: SiteSetup) -> None:
    """24 rows of two labels in turn, of which a quarter is held out: 18 + 6."""
    trainer = site_setup.configure().start()
    plan, client = site_setup.plan(rounds=1), site_setup.client()
    client.site_info(plan.name, to_json(plan))
    reply = client.handle(site_setup.request(plan))
    client.handle(site_setup.request(plan))
    client.handle(site_setup.request(plan, 2, kind="finalize"))
    trainer.wait_for("has ended")
    rows, first, again, last, end = told(site_setup, trainer)
    assert rows.startswith("site ada: 18 training + 6 test rows; no ")
    assert first.startswith(f"town round 1: loss {reply.metrics['train.loss']:.4f}, 2 steps, ")
    assert again.startswith(f"town round 1: loss {reply.metrics['train.loss']:.4f}, stored reply, ")
    assert last.startswith("town final personalization: personal.accuracy ")
    assert end.startswith("town has ended after round 1 and the final personalization.")
    assert f"The site's model is in {site_setup.state}" in end


def test_the_site_sees_its_own_errors_in_full_and_the_coordinator_their_kind(site_setup: SiteSetup) -> None:
    trainer = site_setup.configure('[allow]\nmethods = ["fedit"]').start()
    plan, client = site_setup.plan(), site_setup.client()
    with pytest.raises(TrainerError) as refused:
        client.site_info(plan.name, to_json(plan))
    assert refused.value.public() == "RefusedError: method.name"
    rows = site_setup.folder / "rows.csv"
    rows.write_text("text,label\na red cat,\n")
    plan = site_setup.plan(method="fedit")
    for _ in range(2):
        with pytest.raises(TrainerError) as wrong:
            client.site_info(plan.name, to_json(plan))
        assert wrong.value.public() == "DataError: data.label"
    assert told(site_setup, trainer) == [
        "refused: site ada: method.name: expected one of fedit (allow.methods), found 'colora'",
        "site ada: data.label: expected a label, found an empty one in row 1",
    ], "once, although the coordinator asks again"


def test_a_coordinator_that_stops_after_the_end_is_not_reported(site_setup: SiteSetup) -> None:
    """The SuperNode ends and cannot connect again: between two federations neither is news."""
    coordinator = '[coordinator]\naddress = "127.0.0.1:9"\ninsecure = true'
    site = load_site(site_setup.configure(coordinator).file)
    lines: list[str] = []
    trainer = TrainerSupervisor(site_setup.file, site, lines.append)
    trainer.child = SimpleNamespace(due=False)  # type: ignore[assignment]
    node = NodeSupervisor(site, lines.append, trainer)

    def retries_after(report: str) -> list[str]:
        lines.clear()
        log = site_setup.state / "logs" / "trainer.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"2026-11-28 12:00:00,000 INFO colora.report: {report}\n")
        trainer.ensure_running()
        for running in (False, True):
            child = SimpleNamespace(running=running, due=True, starts=1, killed=False, start=lambda: None)
            node.node = SimpleNamespace(  # type: ignore[assignment]
                child=child,
                start=lambda: None,
                exit_reason=lambda: "see its log",
                stuck_reason=lambda: "",
                connected=False,
                is_retrying=True,
                connection_problem=lambda: "connection refused",
            )
            node.ensure_running()
        return lines[1:]

    assert retries_after("town has ended after round 2 and the final personalization.") == []
    assert retries_after("town round 1: loss 0.5, 2 steps") == [
        "no connection to the coordinator: see its log; retrying",
        "cannot reach the coordinator: connection refused; retrying",
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({'source = "rows.csv"': 'source = ""'}, "site north: data.source is empty."),
        ({'source = "rows.csv"': 'source = "now.csv"'}, "site north: data.source: the file "),
        (
            {'source = "rows.csv"': 'source = "rows.csv"\ntext = "body"'},
            "data.text: expected a column 'body', found only",
        ),
        ({'name = "north"': 'nam = "north"'}, "There is no key nam. Did you mean 'name'?"),
        ({"site.key": None}, "site north: coordinator.key: "),
    ],
)
def test_what_is_free_to_check_stops_the_command_before_torch(change: dict, told: str, tmp_path: Path) -> None:
    (tmp_path / "sites.toml").write_text(PLAN)
    provision(tmp_path / "sites.toml", tmp_path / "keys")
    folder = tmp_path / "keys" / "sites" / "north"
    (folder / "rows.csv").write_text("text,label\na,no\nb,yes\n")
    text = 'name = "north"\n[data]\nsource = "rows.csv"\n[coordinator]\naddress = "127.0.0.1:9"\n'
    for old, new in change.items():
        if new is None:
            (folder / old).unlink()
        text = text.replace(old, new or old)
    (folder / "site.toml").write_text(text)
    code = (
        "import sys\nfrom colora.cli import main\n"
        f"sys.argv = ['colora', 'client', {str(folder / 'site.toml')!r}]\n"
        "try: main()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules, 'datasets' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert told in done.stderr
    assert done.stdout.split() == ["2", "False", "False"]
    assert not (folder / "state").exists(), "no process was started"


def test_the_check_shows_missing_rows_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('name = "north"\n[data]\nsource = "no.csv"\n')
    code = (
        "import sys\nfrom pathlib import Path\nfrom colora.client.deployment.checks.preflight import preflight\n"
        f"results = preflight(Path({str(tmp_path / 'site.toml')!r}))\n"
        "print(next(results).ok, next(results).detail, 'torch' in sys.modules, sep='|')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True|data.source: the file no.csv does not exist.|False\n"
