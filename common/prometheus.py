"""A Prometheus endpoint on the loopback interface, ``http://127.0.0.1:PORT/metrics``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import ConfigError


@dataclass
class Metric:
    """One metric. ``values`` are by the values of ``labels``; without labels, by the empty tuple."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    values: dict[tuple[str, ...], float] = field(default_factory=dict)
    kind: Literal["gauge", "counter"] = "gauge"

    def add(self, value: float, *labels: str) -> None:
        """Add to a value, which begins at 0."""
        self.values[labels] = self.values.get(labels, 0.0) + value


def serve_metrics(port: int, read: Callable[[], Iterable[Metric]]) -> int:
    """Serve what ``read`` returns at each request, from a thread; return the port, which is a free one for 0.

    Raises ConfigError if the package prometheus-client is missing or the port is in use.
    """
    try:
        import prometheus_client
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    except ImportError:
        hint = "Install it: pip install prometheus-client"
        message = "--metrics-port needs the package prometheus-client."
        raise ConfigError("--metrics-port", "an installed package", "none", message=message, hint=hint) from None
    families: Mapping[str, Any] = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}

    class Collector(prometheus_client.registry.Collector):
        def collect(self) -> Iterable[Any]:
            for metric in read():
                family = families[metric.kind](metric.name, metric.help, labels=metric.labels)
                for labels, value in metric.values.items():
                    family.add_metric(labels, value)
                yield family

    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector())
    try:
        server, _ = prometheus_client.start_http_server(port, "127.0.0.1", registry)
    except OSError as error:
        message = f"The metrics cannot be served at 127.0.0.1:{port}: {error.strerror or error}."
        raise ConfigError(
            "--metrics-port", "a free port", port, message=message, hint="Choose another --metrics-port."
        ) from None
    return server.server_address[1]
