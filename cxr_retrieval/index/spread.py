"""The shards of an index, spread over a Ray cluster: an actor for every group of them.

Why actors and not replicas of a Ray Serve deployment. Replicas are copies: a router sends a request to whichever is
free, and a search must reach every group. Ray's guide for state that is too large for one node ("Replica scheduling",
the embedding table) has a bundle for each shard too, and one replica that asks what is in them. Here that one is the
server's own process, which has the page, the token and the audit line. A deployment for every group would be reached
rightly, but adds a controller, a router and their packages to what an actor does by itself, and outlives the server
with all the memory that it holds. These actors end with the last use of their version, and with the process however
that ends.

A holder opens its shards when it is first asked, and anew when Ray has started it again, on another node if its own is
gone. What is asked of it meanwhile waits, and is asked again if it was under way: it changes nothing.
"""

import threading
import time
from collections.abc import Callable, Sequence
from itertools import cycle, pairwise
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cxr_retrieval.errors import user_error_in
from cxr_retrieval.index.groups import ShardGroup, ShardsAway
from cxr_retrieval.index.versions import Version, resolve
from cxr_retrieval.runtime import working_nodes

PATIENCE = 30.0  # seconds that a search waits for a holder, which may be starting again
PAUSE = 0.5  # seconds before it is asked again: until Ray has noticed that a node is gone, it sends there
ACTOR: dict[str, Any] = {
    "num_cpus": 0,  # searches are short, and jobs that take all CPUs must not keep a new version from opening
    "memory": 1,  # an actor that wants nothing at all is placed at random, whatever node it is meant for
    "max_concurrency": 16,
    "max_restarts": -1,
    "max_task_retries": 1,
}

P = ParamSpec("P")
T = TypeVar("T")


class ShardHolder:
    """A group of shards in a process of its own. Runs as a Ray actor."""

    def __init__(self, to: str, version: str, numbers: range) -> None:
        self._to, self._version, self._numbers = to, version, numbers
        self._group: ShardGroup | None = None
        self._opening = threading.Lock()

    def ask(self, method: str, args: Sequence[Any], named: dict[str, Any]) -> Any:
        """What the group's method answers. Not opened in the constructor, whose errors Ray tells without their type."""
        with self._opening:
            if self._group is None:
                self._group = ShardGroup(resolve(self._to, self._version), self._numbers)
        return getattr(self._group, method)(*args, **named)


class Spread:
    """The shards of a version in groups of about one size, each with a holder: one for every node, or so many."""

    def __init__(self, version: Version, shards: int, holders: int | None = None) -> None:
        """Waits until all are open. Ray must be running."""
        nodes = working_nodes()
        count = min(holders or len(nodes), shards)
        edges = np.linspace(0, shards, count + 1).astype(int).tolist()
        self.groups = [range(first, last) for first, last in pairwise(edges)]
        self.actors = [
            ray.remote(ShardHolder)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True), **ACTOR)
            .remote(version.to, version.id, group)
            for group, node in zip(self.groups, cycle(nodes), strict=False)
        ]
        self._asked(self.actors, ShardGroup.rows, (), {}, None)

    def each(self, method: Callable[Concatenate[ShardGroup, P], T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        return self._asked(self.actors, method, args, kwargs, PATIENCE)

    def of(
        self, shard: int, /, method: Callable[Concatenate[ShardGroup, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        place = next(place for place, group in enumerate(self.groups) if shard in group)
        return self._asked([self.actors[place]], method, args, kwargs, PATIENCE)[0]

    def _asked(
        self,
        actors: Sequence[Any],
        method: Callable[Concatenate[ShardGroup, P], T],
        args: tuple[Any, ...],
        named: dict[str, Any],
        patience: float | None,
    ) -> list[T]:
        waiting = [actor.ask.remote(method.__name__, args, named) for actor in actors]
        end = None if patience is None else time.monotonic() + patience
        try:
            return ray.get(waiting, timeout=patience)
        except ray.exceptions.RayTaskError as error:
            mendable = user_error_in(error)
            if mendable is None:
                raise
            raise ShardsAway(str(mendable)) from error
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            if end is not None and (left := end - time.monotonic()) > PAUSE:
                time.sleep(PAUSE)
                return self._asked(actors, method, args, named, left - PAUSE)
            raise ShardsAway(
                "some shards of this index do not answer: the process that holds them is being started again; ask again"
                " in a minute"
            ) from error
