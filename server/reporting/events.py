"""The event log of a run: ``events.jsonl``, one JSON object per line, append-only. All reports are made from it.

Every event has ``time`` (seconds since 1970) and ``event``, its name. ``round`` counts from 1. Replies and failures
of the finalization have the last round + 1, those before round 1 have 0, and those of a validation have the validated
round + 1. Failures while sites join have the round of the last checkpoint, or 0. Numbers that are not finite or beyond
1e15 are null. A site's text has at most 200 characters. A reader skips a line that
is not an event, with a warning.

=================  ====================================================================================================
event              fields
=================  ====================================================================================================
started            A coordinator process began: federation, method, model, rounds, sites (names in roster order),
                   learning_rates (by parameter group), recipe (hash of all settings that a run cannot change),
                   settings (the recipe with all defaults), versions (of Python and packages at the coordinator).
                   In a site's own log: site (its name), the settings of the plan, and the versions at the site.
extended           The run gets more rounds: rounds, before (rounds so far), inexact (the key by which the rounds so
                   far depend on their number, so that the result differs from a run of ``rounds`` rounds; or null).
resumed            It continues from a checkpoint: round (of the checkpoint), damaged (names of newer checkpoints
                   that are damaged and were skipped).
transfer_started   Sites that join write and label texts for the new base model: source_federation, sites.
site_ready         A site has its texts for the transfer: site.
waiting            Too few sites. While joining: when ("join"), quorum, present, missing (names), and when it repeats
                   seconds (of waiting). In a round, after one, two, four, … minutes without a reply: when ("round 3"),
                   round, quorum, present (sites that replied), missing, offline (of these), seconds (since they were
                   asked). After a round without quorum, which is repeated: when ("server.quorum at round 3"), reason.
joined             A site was admitted: site, task, train, test (examples), truncated, dropped (of these), steps
                   (optimizer steps of a round; they depend on the site's examples with train.epochs), rank (of the
                   site's adapter, if it is smaller than the recipe's; else 0).
agreed             What all sites have in common is fixed: weights ("tokens", "examples", "uniform", "benefit"),
                   pins (fingerprints of the base model, tokenizer and chat template).
grouped            Sites were compared before round 1: groups (lists of sites, the largest first; one if all share an
                   adapter), tests (each with the two groups and the p_value of a division), cosines (between the
                   updates of any two sites, by site).
initialized        The spectral start has ended: sites (that are connected).
round_started      round, sites (sampled for this round).
reply              A reply was admitted: round, site, kind ("trial", "initialize", "train", "validate" or "finalize"),
                   metrics (by name, for example personal.accuracy), terms (loss terms trained on), fresh (the site
                   had lost its state), bytes_down, bytes_up (payload; down, of all messages with the request),
                   whole (with communication.broadcast_bits: whether the site received the whole adapter), seconds (of
                   work at the site), measuring (of these: not training).
failed             A site sent an error or no reply: round, site, reason, silent (whether it sent nothing).
refused            A reply or a joining site was refused: round, site, field, expected, found, reason.
clipped            An update was much larger than the others of its round and was scaled: round, site, norm, bound.
distant            An update was far from the others of its round and was not averaged: round, site.
secure_sum         A sum of updates was opened (secure aggregation): round, sites (in the sum; none if it could not be
                   decoded), dropped (sites that shared keys and are not in it), threshold (sites that it takes to open
                   it), bytes_up, bytes_down (by site, of the steps after training).
noised             The updates of a round were clipped, and their mean got noise ([server.privacy]): round, sites (that
                   the mean is of), clipped (norm by site, of the updates above the bound), bound (on a norm), noise
                   (standard deviation on every number of the mean), epsilon (spent by the site that was sampled most
                   often, this round included), delta, budget (or null).
budget_spent       There are no more rounds, since another would exceed the privacy budget: round (the last).
late               A reply came after its round had ended and was ignored: round, site, reason.
round              A round ended with its quorum: round, admitted (sites), weights (by site), residual (relative
                   distance of mean(B)·mean(A) from mean(BA), or null), seconds.
validated          The personal models were measured on validation rows: round, losses (by site, null if not
                   measured), loss (mean over the measured sites, or null), best (the round with the lowest loss
                   so far).
selected           The round that the run ends with is known: round (the last), kept (that round), early (whether the
                   run ended before the recipe's number of rounds).
finalizing         Sites personalize on the final adapter and evaluate: round (the last), sites, prepares (whether
                   they also prepare a later transfer).
finalized          round (the last), sites (that replied).
compared           In the baseline's log, for tasks whose primary metric is a mean over test rows: site, gain (of the
                   personal model over local-only training, positive if better), standard_error (of the gain, paired by
                   test row), rows.
finished           The run has ended: seconds (of this process).
stopped            The coordinator stopped on request; the same command continues the run.
run_failed         The coordinator process ended with an error: reason, final (false if the supervisor retries).
restarted          The supervisor restarted a component: what ("gateway", "superlink" or "run"), reason (of
                   a run, and of a SuperLink that could not start).
tracker_failed     A tracker ended with an error and logs no more rounds: tracker (its name), reason.
=================  ====================================================================================================
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ...common.errors import ColoraError, QuorumError, reason_in_words
from ...common.event_log import Event, EventLog
from ...common.foreign_text import clean
from ...common.processes.log_tail import FileTail
from .event_fields import parse_event

FIRST_FAILURE = " First failure: "  # in the message of a missed quorum
MAX_REASON = 1000  # characters of a refusal, which quotes texts of the site; each of these is cut already
logger = logging.getLogger("colora.events")


class EventRecorder:
    """Emits events, and keeps the failures since the last quorum for the error message of the next one."""

    def __init__(self, events: EventLog) -> None:
        self.events = events
        self.failures: list[str] = []

    def emit(self, event: str, **fields: Any) -> None:
        """Emit one event."""
        self.events.emit(event, **fields)

    def failed(self, t: int, site: str, reason: str | None, *, silent: bool = False) -> None:
        """Record that a site sent an error, or nothing (``silent``), in round ``t``. ``reason`` may be its own text."""
        site, reason = clean(site), clean(reason or "an error without a reason")
        self.failures.append(f"{site}: {reason_in_words(reason, site)}")
        self.emit("failed", round=t, site=site, reason=reason, silent=silent)

    def refused(self, t: int, error: ColoraError) -> None:
        """Record that a reply or a joining site was refused in round ``t``."""
        reason = clean(error, MAX_REASON)
        self.failures.append(reason)
        details = {key: clean(getattr(error, key)) for key in ("field", "expected", "found")}
        self.emit("refused", round=t, site=error.site and clean(error.site), **details, reason=reason)

    def require_quorum(self, quorum: int, present: list[str], when: str) -> None:
        """Check that enough sites are present at ``when``: "join", "round 3" or "finalize".

        Raises QuorumError, which quotes the first failure since the last quorum.
        """
        if len(present) < quorum:
            names = f" ({', '.join(present)})" if present else ""
            counts = f"at least {quorum} sites are required, {len(present)} took part{names}"
            first = f"{FIRST_FAILURE}{self.failures[0].rstrip('.')}." if self.failures else ""
            raise QuorumError(
                f"server.quorum at {when}",
                f"at least {quorum} sites",
                f"{len(present)}{names}",
                message=f"The quorum was not reached at {when}: {counts}.{first}",
                hint=f"See events.jsonl and log.txt in {self.events.path.parent}.",
            )
        self.failures.clear()


def read_events(path: Path) -> list[Event]:
    """Return all complete events of a file, oldest first; none if there is no file.

    Lines that are not events are skipped with a warning.
    """
    events, skipped = parse_lines(path)
    if skipped:
        logger.warning("%s", skipped)
    return events


def parse_lines(path: Path) -> tuple[list[Event], str]:
    """Return the complete events of a file, and a sentence about lines that are not events; empty if there are none."""
    return _parse(path.read_bytes().rpartition(b"\n")[0], path) if path.exists() else ([], "")


def _parse(lines: bytes, path: Path) -> tuple[list[Event], str]:
    parsed = [parse_event(line) for line in lines.split(b"\n") if line.strip()]
    events = [event for event in parsed if event is not None]
    skipped = len(parsed) - len(events)
    return events, f"{path}: {skipped} of {len(parsed)} lines are not events and were skipped" if skipped else ""


class EventTail:
    """Follows a file that another process appends to, from ``start`` in bytes or, without it, from its present end."""

    def __init__(self, path: Path, start: int | None = None) -> None:
        self._tail = FileTail(path, start)

    def new(self) -> list[Event]:
        """Return the complete events since the last call. A partial last line is left for the next call."""
        events, skipped = _parse(self._tail.new(), self._tail.path)
        if skipped:
            logger.warning("%s", skipped)
        return events
