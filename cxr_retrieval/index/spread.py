"""The shards of an index, spread over a Ray cluster: a Ray Serve deployment for every group of them.

Replicas of a deployment are copies, and a search must reach every group: so each group has a deployment of its own, and
the server's process, which has the page, the token and the audit line, asks them all. Serve starts a replica again that
died or hangs, on another node if its own is gone, and sends what is asked to one of a group's replicas that is there.
What was under way is asked again: it changes nothing.

Deployments outlive who made them. These look, whenever Serve asks for their health, whether their Spread still lives,
by an actor that ends with it: with the last use of a version, and with the process however that ends.
"""

import asyncio
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cxr_retrieval.errors import UserError, user_error_in
from cxr_retrieval.index.groups import ShardGroup, ShardsAway
from cxr_retrieval.index.versions import Version, resolve
from cxr_retrieval.runtime import working_nodes
from cxr_retrieval.tombstones import Tombstones

PATIENCE = 30.0  # seconds that a search waits for a holder, which may be starting again
ATTEMPT = 10.0  # seconds before another replica may be asked: what hangs is noticed by Serve much later
PAUSE = 0.5  # seconds before asking again
AT_ONCE = 16  # searches in one replica
NAMESPACE = "cxr-retrieval"
logging.getLogger("ray.serve").setLevel(logging.ERROR)  # of this process
QUIET = LoggingConfig(log_level="ERROR", enable_access_log=False)
DEPLOYMENT: dict[str, Any] = {
    "name": "ShardHolder",
    "max_ongoing_requests": AT_ONCE,
    "health_check_period_s": 5,
    "health_check_timeout_s": 30,
    "graceful_shutdown_timeout_s": 20,
}
ACTOR: dict[str, Any] = {
    "num_cpus": 0,  # searches are short, and jobs that take all CPUs must not keep a new version from opening
    "memory": 1,  # an actor that wants nothing at all is placed at random, whatever node it is meant for
}

P = ParamSpec("P")
T = TypeVar("T")


class ShardHolder:
    """A group of shards in a process of its own. Runs as a Ray Serve replica."""

    def __init__(self, owner: str, to: str, version: str, numbers: range) -> None:
        self._owner, self._to, self._version, self._numbers = owner, to, version, numbers
        self._group: ShardGroup | None = None
        self._turn = threading.Lock()  # of opening the group, and of telling it who was removed
        self._told = set[str]()  # of whom the group knows that they were removed
        self._threads = ThreadPoolExecutor(AT_ONCE)
        self._trouble: UserError | None = None
        try:
            self._open()
        except (
            UserError
        ) as error:  # Serve would tell it without its type: who asks first is told, then it is tried again
            self._trouble = error

    async def ask(
        self, removed: Sequence[ray.ObjectRef], method: str, args: Sequence[Any], named: dict[str, Any]
    ) -> Any:
        """What the group's method answers, of nobody who was removed."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, removed, method, args, named)

    def check_health(self) -> None:
        """Ends the deployment where its Spread has ended."""
        try:
            ray.get_actor(self._owner, NAMESPACE)
        except ValueError:
            serve.delete(serve.get_replica_context().app_name, _blocking=False)

    def _ask(self, removed: Sequence[ray.ObjectRef], method: str, args: Sequence[Any], named: dict[str, Any]) -> Any:
        group = self._open()
        for tombstones in removed:
            if tombstones.hex() not in self._told:
                with self._turn:
                    group.honour(ray.get(tombstones))
                    self._told.add(tombstones.hex())
        return getattr(group, method)(*args, **named)

    def _open(self) -> ShardGroup:
        with self._turn:
            if self._trouble is not None:
                trouble, self._trouble = self._trouble, None
                raise trouble
            if self._group is None:
                self._group = ShardGroup(resolve(self._to, self._version), self._numbers)
            return self._group


class Spread:
    """The shards of a version in groups of about one size, one for every node or so many, each with its replicas."""

    def __init__(self, version: Version, shards: int, groups: int | None = None, replicas: int = 1) -> None:
        """Waits until all are open. Ray must be running."""
        nodes = working_nodes()
        count = min(groups or len(nodes), shards)
        edges = np.linspace(0, shards, count + 1).astype(int).tolist()
        self.groups = [range(first, last) for first, last in pairwise(edges)]
        name = f"{version.id}-{secrets.token_hex(4)}"
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._owner = (  # an actor of any class that takes no import
            ray.remote(threading.Event)
            .options(name=name, namespace=NAMESPACE, num_cpus=0, max_restarts=-1, scheduling_strategy=here)
            .remote()
        )
        self._removed: list[ray.ObjectRef] = []
        serve.start(proxy_location="Disabled", logging_config=QUIET)  # nothing listens: the server asks by handles
        self.apps = [f"{name}-{number}" for number in range(count)]
        self._handles = serve.run_many(
            [
                serve.RunTarget(
                    serve.deployment(**DEPLOYMENT, **_placed(nodes, number, replicas))(ShardHolder).bind(
                        name, version.to, version.id, group
                    ),
                    name=app,
                    route_prefix=None,
                    logging_config=QUIET,
                )
                for number, (app, group) in enumerate(zip(self.apps, self.groups, strict=True))
            ]
        )
        self._asked(self._handles, ShardGroup.rows, (), {})

    def honour(self, tombstones: Tombstones) -> None:
        # Told with every question: what is told once, some replicas do not hear, nor one that starts later.
        self._removed = [ray.put(tombstones)]

    def each(self, method: Callable[Concatenate[ShardGroup, P], T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        return self._asked(self._handles, method, args, kwargs)

    def of(
        self, shard: int, /, method: Callable[Concatenate[ShardGroup, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        place = next(place for place, group in enumerate(self.groups) if shard in group)
        return self._asked([self._handles[place]], method, args, kwargs)[0]

    def _asked(
        self,
        handles: Sequence[Any],
        method: Callable[Concatenate[ShardGroup, P], T],
        args: tuple[Any, ...],
        named: dict[str, Any],
    ) -> list[T]:
        end = time.monotonic() + PATIENCE
        while True:
            waiting = [handle.ask.remote(self._removed, method.__name__, args, named) for handle in handles]
            late = min(end, time.monotonic() + ATTEMPT)
            try:
                return [answer.result(timeout_s=max(0.0, late - time.monotonic())) for answer in waiting]
            except ray.exceptions.RayTaskError as error:
                mendable = user_error_in(error)
                if mendable is None:
                    raise
                raise ShardsAway(str(mendable)) from error
            except (ray.exceptions.RayActorError, RayServeException, TimeoutError) as error:
                for answer in waiting:
                    answer.cancel()
                if time.monotonic() + PAUSE > end:
                    raise ShardsAway(
                        "some shards of this index do not answer: the process that holds them is being started again;"
                        " ask again in a minute"
                    ) from error
            time.sleep(PAUSE)


def _placed(nodes: Sequence[str], number: int, replicas: int) -> dict[str, Any]:
    """Options of a group's deployment that put its replicas on as many nodes, group by group on the next ones; on
    others where those are gone."""
    mine = [nodes[(number + place) % len(nodes)] for place in range(min(replicas, len(nodes)))]
    wish = {
        "label_selector": {"ray.io/node-id": f"in({','.join(mine)})"},
        "fallback_strategy": [{"label_selector": {}}],
    }
    return {
        "num_replicas": replicas,
        "max_replicas_per_node": math.ceil(replicas / len(mine)),
        "ray_actor_options": ACTOR | wish,
    }
