"""What a server tells Prometheus."""

from collections.abc import Iterator

from fastapi import Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cxr_retrieval.index.search import Answer
from cxr_retrieval.serve.live import LiveIndex

# What a client may call a method is without end, and each would be a series of its own.
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Requests, searches and the state of the index, in a registry of their own."""

    def __init__(self, live: LiveIndex) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Index(live))
        self._requests = Counter(
            "cxr_requests", "Requests answered", ["method", "path", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "cxr_request_seconds",
            "Time from a request to its answer",
            ["path"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._searches = Counter("cxr_searches", "Searches by what they found", ["found"], registry=self._registry)

    def answered(self, request: Request, status: int, seconds: float) -> None:
        """Count a request under its route, never under the path that was asked: that names images."""
        route = request.scope.get("route")
        path = route.path if route is not None else "none"
        method = request.method if request.method in METHODS else "other"
        self._requests.labels(method, path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def searched(self, answer: Answer) -> None:
        """Count a search."""
        found = "similar" if answer.warning is None else "nothing_similar" if answer.cases else "nothing"
        self._searches.labels(found).inc()

    def exposition(self) -> Response:
        """All figures in Prometheus' text format."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class _Index(Collector):
    """The live index, read at every scrape."""

    def __init__(self, live: LiveIndex) -> None:
        self._live = live

    def collect(self) -> Iterator[Metric]:
        live = self._live
        images = GaugeMetricFamily("cxr_index_images", "Images of the index that is served", labels=["version"])
        images.add_metric([live.retriever.version.version.id], live.retriever.images)
        yield images
        yield CounterMetricFamily("cxr_alias_moves", "Versions exchanged because the alias moved", value=live.moves)
        yield CounterMetricFamily(
            "cxr_alias_failures", "Looks at the alias, or at who was removed, that failed", value=live.failures
        )
