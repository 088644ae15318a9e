"""``colora provision``: keys, certificates and site files for a coordinator and its sites, from a list of names.

    keys/ca.crt ca.key                                                  the authority, which signs later sites too
    keys/coordinator/ca.crt server.crt server.key sites/NAME.pub        for the coordinator
    keys/sites/NAME/site.toml ca.crt site.key                           for one site
    keys/sites/NAME/link/ca.crt trainer.crt trainer.key node.crt node.key    between its trainer and its SuperNode

The authority of a site's link is its own, and its key is thrown away: nobody can make a third certificate.
"""

from __future__ import annotations

import ipaddress
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic.dataclasses import dataclass

from ....common.atomic_io import write_atomically
from ....common.config.loader import read_toml
from ....common.config.schema import STRICT, Name, parse
from ....common.errors import ConfigError, StateError
from .certificates import CLIENT, SERVER, Authority, Pair, hosts_of, new_site_key

ALWAYS = ("localhost", "127.0.0.1")  # where the gate reaches the SuperLink, and trials reach the coordinator
HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?")


@dataclass(frozen=True, config=STRICT)
class CoordinatorPlan:
    """Where sites find the coordinator, and what else it is called."""

    address: str  # host:port
    names: tuple[str, ...] = ()  # further host names and IP addresses


@dataclass(frozen=True, config=STRICT)
class KeyHolder:
    """A site that gets a key."""

    name: Name


@dataclass(frozen=True, config=STRICT)
class KeyPlan:
    """The TOML file of ``colora provision``."""

    coordinator: CoordinatorPlan
    site: tuple[KeyHolder, ...] = ()


def provision(plan: Path, out: Path, *, add: bool = False) -> list[str]:
    """Writes the folder ``out``, or with ``add`` the sites that it lacks, and returns the names of the new ones.

    The folder, or each added site, appears whole or not at all; nothing that exists is written again. Raises
    ConfigError for the plan, StateError for what lies on disk.
    """
    keys = read_plan(plan)
    if add:
        return _add(keys, out)
    if out.exists() or out.is_symlink():
        raise StateError(str(out), "a folder that is not there yet (--add adds new sites to one)", "one that is")
    authority, names = Authority.new("colora"), [site.name for site in keys.site]
    with _aside(out.parent, out.name) as folder:
        _write_pair(folder, "ca", authority.pair)
        coordinator, sites = _folder(folder / "coordinator"), _folder(folder / "sites")
        public = _folder(coordinator / "sites")
        server = authority.sign("coordinator", "coordinator", SERVER, hosts_for(keys.coordinator))
        _write_pair(coordinator, "server", server)
        write_public(coordinator / "ca.crt", authority.pair.certificate)
        for name in names:
            write_public(public / f"{name}.pub", _make_site(sites / name, name, keys, authority))
        _appear(folder, out)
    return names


def read_plan(path: Path) -> KeyPlan:
    """Raises ConfigError naming the key."""
    keys = parse(KeyPlan, read_toml(path))
    hosts_for(keys.coordinator)
    if not keys.site:
        raise ConfigError("site", "[[site]] tables with a name each", "none")
    names = [site.name.casefold() for site in keys.site]  # hosts and some file systems know no capitals
    twice = next((site.name for site in keys.site if names.count(site.name.casefold()) > 1), None)
    if twice:
        raise ConfigError("site.name", "a name of its own for every site, capitals aside", f"{twice!r} twice")
    return keys


def hosts_for(coordinator: CoordinatorPlan) -> tuple[str, ...]:
    """All that the coordinator's certificate is for. Raises ConfigError."""
    for name in coordinator.names:
        _check_host(name, "coordinator.names", name)
    named = (host_of(coordinator.address), *coordinator.names)
    return tuple(dict.fromkeys((*map(_plain, named), *ALWAYS)))


def host_of(address: str) -> str:
    """The host of ``host:port`` or ``[IPv6]:port``. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError("coordinator.address", "host:port", repr(address))
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError("coordinator.address", "host:port, an IPv6 address in brackets", repr(address))
    _check_host(host, "coordinator.address", address)
    return host


def _check_host(host: str, key: str, found: str) -> None:
    numbers = host.rpartition(".")[2].isdigit()  # as in a mistyped IP address
    if not _is_ip(host) and (numbers or not HOST.fullmatch(host)):
        wanted = "a host name (other letters than ASCII as xn--…) or an IP address"
        raise ConfigError(key, f"host:port with {wanted}" if key.endswith("address") else wanted, repr(found))


def _is_ip(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host)) and "%" not in host
    except ValueError:
        return False


def _plain(host: str) -> str:
    return str(ipaddress.ip_address(host)) if _is_ip(host) else host.lower()


def _add(keys: KeyPlan, out: Path) -> list[str]:
    """A site is known when it has its folder, which may have gone to the site, or its public key."""
    authority = _authority_of(out, keys)
    sites, public = out / "sites", out / "coordinator" / "sites"
    known = {path.stem.casefold() for path in public.glob("*.pub")}
    new = [site.name for site in keys.site if site.name.casefold() not in known]
    here = {path.name.casefold() for path in sites.glob("*")}
    orphan = next((name for name in new if name.casefold() in here), None)
    if orphan:
        wanted = f"{public / orphan}.pub beside it (delete the folder for a new key, or leave the site out)"
        raise StateError(str(sites / orphan), wanted, "no such file")
    if not new:
        return []
    with _aside(out, "new") as folder:
        made = [(name, _make_site(folder / name, name, keys, authority)) for name in new]
        _folder(sites, there=True)
        for name, key in made:
            _appear(folder / name, sites / name)
            try:
                write_public(public / f"{name}.pub", key)
            except StateError:
                shutil.rmtree(sites / name)
                raise
    return new


def _authority_of(out: Path, keys: KeyPlan) -> Authority:
    """The one in ``out``. The coordinator's certificate must be for the address that new sites are told."""
    try:
        authority = Authority.read(Pair((out / "ca.crt").read_bytes(), (out / "ca.key").read_bytes()))
        served = hosts_of((out / "coordinator" / "server.crt").read_bytes())
    except OSError as error:
        found = f"{error.strerror}: {error.filename}"
        raise StateError(str(out), "a folder that colora provision wrote", found) from None
    except (ValueError, TypeError) as error:
        raise StateError(str(out), "ca.crt and ca.key as colora provision writes them", error) from None
    missing = [host for host in hosts_for(keys.coordinator) if host not in served]
    if missing:
        wanted = f"names that {out / 'coordinator' / 'server.crt'} is for ({', '.join(sorted(served))})"
        raise ConfigError("coordinator", wanted, f"also {missing[0]}")
    return authority


def _make_site(folder: Path, name: str, keys: KeyPlan, authority: Authority) -> bytes:
    """A site's whole folder; returns its public key."""
    _folder(folder)
    private, public = new_site_key(name)
    write_private(folder / "site.key", private)
    write_public(folder / "ca.crt", authority.pair.certificate)
    write_public(folder / "site.toml", SITE.format(name=name, address=keys.coordinator.address).encode())
    link, own = _folder(folder / "link"), Authority.new(f"link of {name}")
    write_public(link / "ca.crt", own.pair.certificate)
    _write_pair(link, "trainer", own.sign("trainer", name, SERVER, (*ALWAYS, "trainer", f"trainer-{name}".lower())))
    _write_pair(link, "node", own.sign("node", name, CLIENT))
    return public


def write_private(path: Path, data: bytes) -> None:
    """For the owner's eyes: mode 0600, from the first byte on."""
    write_atomically(path, data)


def write_public(path: Path, data: bytes) -> None:
    """For anybody who may enter the folder."""
    write_atomically(path, data)
    path.chmod(0o644)


def _write_pair(folder: Path, name: str, pair: Pair) -> None:
    write_public(folder / f"{name}.crt", pair.certificate)
    write_private(folder / f"{name}.key", pair.key)


def _folder(path: Path, *, there: bool = False) -> Path:
    path.mkdir(mode=0o700, exist_ok=there)
    return path


@contextmanager
def _aside(parent: Path, name: str) -> Iterator[Path]:
    """A private folder beside the goal, on its disk; gone at the end with what was not renamed away."""
    folder = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{name}."))
        yield folder
    except OSError as error:
        raise StateError(str(parent), "room and permission to write", error.strerror or error) from None
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _appear(made: Path, goal: Path) -> None:
    if goal.exists():
        raise StateError(str(goal), "a name that is free", "something that was put there meanwhile")
    made.rename(goal)


SITE = """\
# Site {name}. Relative paths start at this file's folder; site.key is the site's alone.
#
#   colora client site.toml --check     says what is still missing
#   colora client site.toml             serves the federation

name = "{name}"

[data]
source = ""                        # FILL IN: "rows.csv" (.jsonl .tsv .parquet), asset:NAME/SPLIT, or a hub data set id
# test_source = "test.csv"         # unset: a quarter of the rows is held out (test_fraction)
# task = "classification"          # or "generation", with columns prompt and completion
# text = "text"                    # the columns
# label = "label"

[coordinator]
address = "{address}"
ca = "ca.crt"
key = "site.key"

[trainer]                          # the process that holds the base model, the data and the personal state
# listen = "unix:state/trainer.sock"   # or HOST:PORT between containers, with TLS by the certificates in link/
# state = "state"
# device = "auto"                  # or "cpu", "cuda:0"
# threads = 4                      # unset: all cores
# precision = "int4"               # of the base model, instead of the recipe's: for a small GPU
# gradient_checkpointing = true
# micro_batch = 2                  # examples at once; unset: as many as fit

[allow]                            # what the coordinator may ask; most that is left out may be anything
# federations = ["my-federation"]
# models = ["sentence-transformers/all-MiniLM-L6-v2"]
# methods = ["colora"]             # "colora+head" lets a recipe share the head as well, which only this line can
# max_rank = 16
# max_steps = 100                  # optimiser steps in one round
# max_seconds = 600                # of training in one round
# max_tokens = 256                 # of one text
# precision = ["fp32"]
# max_seeds = 5                    # of its texts that it keeps for a move to a new base model; 0: no such move
# tuned_generator = false          # true: it may also keep a LoRA fine-tuned on its texts, which may repeat them

# [private]                        # an adapter of this site's own beside the shared one, instead of the recipe's
# kind = "multilora"               # or "lora"
"""
