"""Folds the events of a run into its history."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ....common.errors import reason_in_words
from ....common.event_log import Event
from ....common.protocol.types import VALIDATION_LOSS
from ..events import parse_lines
from .history import Cost, History, Incident, RoundRecord

UNKNOWN = "unknown node"


def read_history(run: Path, label: str = "") -> History:
    """Read a run folder or its ``events.jsonl``, with the baseline beside it. Damaged lines are counted, not raised."""
    log = run if run.is_file() else run / "events.jsonl"
    main, baseline = (parse_lines(path) for path in (log, log.parent / "baseline" / "events.jsonl"))
    history = make_history([*main[0], *({**event, "baseline": True} for event in baseline[0])])
    history.label, history.skipped = label, " ".join(filter(None, (main[1], baseline[1])))
    return history


def make_history(events: Iterable[Event]) -> History:
    """Build the history of these events; the baseline's have ``baseline`` set to True and come last."""
    history = History()
    for event in events:
        extend(history, event)
    return history


def extend(history: History, event: Event) -> None:
    """Add the next event to a history."""
    history.events += 1
    history.summary.update(event)
    history.began = event["time"] if history.began is None else history.began
    history.ended = max(event["time"], history.ended or 0.0)
    alone = bool(event.get("baseline"))
    if event["event"] in _INCIDENTS:
        history.incidents.append(_INCIDENTS[event["event"]](event))
    handler = _ALONE.get(event["event"]) if alone else _HANDLERS.get(event["event"])
    if handler:
        handler(history, event)


def _started(history: History, event: Event) -> None:
    history.state = "running"
    history.identity = str(event.get("recipe", history.identity))
    history.at_site = event.get("site", history.at_site)
    history.settings = event.get("settings", history.settings)
    history.versions = event.get("versions", history.versions)


def _record(history: History, number: int) -> RoundRecord:
    return history.rounds.setdefault(number, RoundRecord(number))


def _round_started(history: History, event: Event) -> None:
    history.rounds[event["round"]] = RoundRecord(event["round"], asked=event["sites"], began=event["time"])


def _finalizing(history: History, event: Event) -> None:
    number = event["round"] + 1
    for later in [n for n in history.rounds if n > number]:  # of a run that was shortened
        del history.rounds[later]
    history.rounds[number] = RoundRecord(number, asked=event["sites"], began=event["time"], final=True)


def _finalized(history: History, event: Event) -> None:
    record = _record(history, event["round"] + 1)
    record.admitted, record.final = event["sites"], True
    record.seconds = event["time"] - record.began if record.began is not None else None


def _round(history: History, event: Event) -> None:
    record = _record(history, event["round"])
    record.admitted, record.weights = event["admitted"], event["weights"]
    record.seconds, record.residual = event["seconds"], event.get("residual")


def _secure_sum(history: History, event: Event) -> None:
    record, down = _record(history, event["round"]), event["bytes_down"]
    record.secure = True
    for site, up in event["bytes_up"].items():
        record.costs.setdefault(site, Cost()).add(Cost(down.get(site, 0), up, 0.0, 0.0))


def _clipped(history: History, event: Event) -> None:
    _record(history, event["round"]).clipped.add(event["site"])


def _noised(history: History, event: Event) -> None:
    _record(history, event["round"]).clipped.update(event["clipped"])


def _left_out(history: History, event: Event) -> None:
    if event["round"] in history.rounds:
        incident = history.incidents[-1]
        history.rounds[event["round"]].problems[incident.site] = incident


def _reply(history: History, event: Event) -> None:
    if event.get("kind") == "validate":
        return _validation_reply(history, event)
    t, site = event["round"], event["site"]
    record = _record(history, t)
    cost = Cost(event["bytes_down"], event["bytes_up"], event["seconds"], event.get("measuring", 0.0))
    if t == 0 and site in record.costs:  # round 0 may have several steps
        record.costs[site].add(cost)
    else:
        record.costs[site] = cost
    record.problems.pop(site, None)
    if event.get("fresh"):
        reason = "had lost its personal state and started from the shared adapter"
        history.incidents.append(Incident("fresh", t, site, reason))
    if t:
        _measure(history, event, ("base", "shared", "personal"), "personal")


def _validation_reply(history: History, event: Event) -> None:
    """Add the cost of a validation to that of the round before it, once."""
    record, site = _record(history, event["round"] - 1), event["site"]
    if site not in record.validated:
        record.validated.add(site)
        cost = Cost(event["bytes_down"], event["bytes_up"], event["seconds"], event.get("measuring", 0.0))
        record.costs.setdefault(site, Cost()).add(cost)
    _validation_loss(history, event, "validation")


def _validation_loss(history: History, event: Event, kind: str) -> None:
    if (loss := event["metrics"].get(VALIDATION_LOSS)) is not None:
        history.losses.setdefault((event["site"], kind), {})[event["round"] - 1] = loss


def _baseline_reply(history: History, event: Event) -> None:
    if event.get("kind") == "validate":
        _validation_loss(history, event, "alone validation")
    elif event["round"]:
        _measure(history, event, ("personal",), "alone")


def _measure(history: History, event: Event, modes: tuple[str, ...], kind: str) -> None:
    """Store the metrics of a reply. A site evaluates what arrives: the adapter after ``round - 1`` rounds."""
    t, site = event["round"], event["site"]
    for name, value in event["metrics"].items():
        mode, _, metric = name.partition(".")
        if mode in modes and metric and value is not None:
            mode = "alone" if kind == "alone" else mode
            history.curves.setdefault((site, mode, metric), {})[t - 1] = value
    loss = event["metrics"].get("train.loss")
    if loss is not None:
        history.losses.setdefault((site, kind), {})[t] = loss


def _grouped(history: History, event: Event) -> None:
    history.tests, history.cosines = event.get("tests") or [], event["cosines"]


def _agreed(history: History, event: Event) -> None:
    history.weighting = event["weights"]


def _state(name: str) -> Callable[[History, Event], None]:
    def handler(history: History, event: Event) -> None:
        history.state = name

    return handler


def _baseline_finished(history: History, event: Event) -> None:
    history.baseline_ended = True


_HANDLERS: Mapping[str, Callable[[History, Event], None]] = {
    "started": _started,
    "agreed": _agreed,
    "grouped": _grouped,
    "round_started": _round_started,
    "reply": _reply,
    "failed": _left_out,
    "refused": _left_out,
    "secure_sum": _secure_sum,
    "clipped": _clipped,
    "noised": _noised,
    "round": _round,
    "finalizing": _finalizing,
    "finalized": _finalized,
    "finished": _state("finished"),
    "stopped": _state("stopped"),
    "run_failed": _state("failed"),
}
_ALONE: Mapping[str, Callable[[History, Event], None]] = {"reply": _baseline_reply, "finished": _baseline_finished}


def _problem(event: Event) -> Incident:
    site = event.get("site") or UNKNOWN
    kind = "silent" if event.get("silent") else event["event"]
    reason = reason_in_words(str(event["reason"] or "an error without a reason"), site)
    return Incident(kind, event["round"], site, reason, bool(event.get("baseline")))


def _clip(event: Event) -> Incident:
    norm, bound = event["norm"], event["bound"]
    reason = "the norm of its update was above the bound"  # null is a number beyond the range of an event's
    if norm is not None and bound is not None:
        ratio = f"{norm / bound:.1f} times " if bound else ""
        reason = f"the norm of its update, {norm:.3g}, was {ratio}the bound of {bound:.3g}"
    return Incident("clipped", event["round"], event["site"], reason, bool(event.get("baseline")))


_INCIDENTS: Mapping[str, Callable[[Event], Incident]] = {
    "failed": _problem,
    "refused": _problem,
    "late": _problem,
    "clipped": _clip,
    "distant": lambda event: Incident("distant", event["round"], event["site"], "its update was far from the others"),
    "restarted": lambda event: Incident(
        "restarted", 0, "coordinator", f"the {event['what']} was restarted" + _because(event.get("reason"))
    ),
    "tracker_failed": lambda event: Incident(
        "tracker_failed", 0, "coordinator", f"the tracker {event['tracker']} stopped: {event['reason']}"
    ),
    "run_failed": lambda event: Incident("run_failed", 0, "coordinator", event["reason"]),
    "resumed": lambda event: Incident(
        "resumed",
        event["round"],
        "coordinator",
        f"continued after round {event['round']}",
        bool(event.get("baseline")),
    ),
}


def _because(reason: object) -> str:
    return f": {reason}" if reason else ""
