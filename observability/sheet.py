"""The families of one scrape, made from plain numbers. The one door of the Prometheus client.

Every label is a fixed word or comes from a fixed list (a role, a state, a cause), so that the
number of series cannot grow with what clients send.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from observability.histogram import Histogram

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""Media type of `Sheet.render`."""

K = TypeVar("K", bound=str | tuple[str, ...])
"""The value of a label, or the values of several."""


class Sheet(Collector):
    """Collects families; all their series carry the same common labels."""

    def __init__(self, common: Mapping[str, str] | None = None) -> None:
        self._common = dict(common or {})
        self._families: list[Metric] = []

    def gauge(
        self, name: str, text: str, value: float | Mapping[K, float], *, by: Sequence[str] = ()
    ) -> None:
        """What is now. `by`: the labels whose values are the keys of `value`."""
        family = GaugeMetricFamily(name, text, labels=[*self._common, *by])
        for labels, one in self._cells(value):
            family.add_metric(labels, one)
        self._families.append(family)

    def counter(
        self, name: str, text: str, value: float | Mapping[K, float], *, by: Sequence[str] = ()
    ) -> None:
        """What has happened since the start; `name` ends in _total."""
        family = CounterMetricFamily(name, text, labels=[*self._common, *by])
        for labels, one in self._cells(value):
            family.add_metric(labels, one)
        self._families.append(family)

    def histogram(
        self,
        name: str,
        text: str,
        value: Histogram | Mapping[K, Histogram],
        *,
        by: Sequence[str] = (),
    ) -> None:
        """How what has happened since the start is spread."""
        family = HistogramMetricFamily(name, text, labels=[*self._common, *by])
        for labels, one in self._cells(value):
            family.add_metric(labels, one.cumulative(), one.sum)
        self._families.append(family)

    def _cells(self, value: Any) -> list[tuple[list[str], Any]]:
        """(label values, what they hold) of one value or of a mapping of them."""
        shared = list(self._common.values())
        if not isinstance(value, Mapping):
            return [(shared, value)]
        return [
            ([*shared, *((key,) if isinstance(key, str) else key)], one)
            for key, one in value.items()
        ]

    def extend(self, other: "Sheet") -> None:
        """Takes over another's families, with the labels that they have there."""
        self._families += other.collect()

    def collect(self) -> list[Metric]:
        return self._families

    def render(self) -> bytes:
        """The text exposition format."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)
