"""What real processes serve under /metrics, read as Prometheus reads it."""

from collections.abc import Iterable
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.cluster import Cluster


@dataclass(frozen=True)
class Scrape:
    """One process's series: (name, sorted labels) → value."""

    series: dict[tuple[str, tuple[tuple[str, str], ...]], float]
    types: dict[str, str]

    def sum(self, name: str, **labels: str) -> float:
        """Over all series of that name with those labels."""
        found = [
            value
            for (own, own_labels), value in self.series.items()
            if own == name and labels.items() <= dict(own_labels).items()
        ]
        assert found, f"no series {name} {labels}"
        return sum(found)

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.series}


def read(text: str) -> Scrape:
    series, types = {}, {}
    for family in text_string_to_metric_families(text):
        types[family.name] = family.type
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in series, f"twice: {key}"
            series[key] = sample.value
    return Scrape(series, types)


def scrape(url: str) -> Scrape:
    response = httpx.get(url, timeout=10.0)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain; version=")
    return read(response.text)


def router(cluster: Cluster) -> Scrape:
    return scrape(f"{cluster.http}/metrics")


def workers(cluster: Cluster) -> dict[str, Scrape]:
    """By role, of the workers that the router names as targets."""
    groups = httpx.get(f"{cluster.http}/metrics/targets", timeout=10.0).json()
    return {
        group["labels"]["__meta_baton_role"]: scrape(f"http://{group['targets'][0]}/metrics")
        for group in groups
    }


def all_names(scrapes: Iterable[Scrape]) -> set[str]:
    return set().union(*(one.names for one in scrapes))
