"""The shards of an index, spread over a Ray cluster: a Ray Serve deployment for every group of them.

Replicas of a deployment are copies, and a search must reach every group: so each group has a deployment of its own, and
the server's process, which has the page, the token and the audit line, asks them all. Serve starts a replica again that
died or hangs, on another node if its own is gone, and sends what is asked to one of a group's replicas that is there.
What was under way is asked again: it changes nothing.

Serve's controller is the cluster's, and what it starts has the environment of whoever asked for Serve first, as far as
the server's own says nothing else. A replica of another environment than the server's, and so perhaps with other code,
answers nothing.

Deployments outlive who made them. These look, whenever Serve asks for their health, whether their Spread still lives,
by an actor that ends with it: with the last use of a version, and with the process however that ends.
"""

import asyncio
import contextlib
import logging
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
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.schema import LoggingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cxr_retrieval.errors import UserError, user_error_in
from cxr_retrieval.index.groups import ShardGroup, ShardsAway
from cxr_retrieval.index.versions import Version, resolve
from cxr_retrieval.runtime import working_nodes
from cxr_retrieval.tombstones import Tombstones

PATIENCE = 30.0  # seconds that a search waits for a holder, which may be starting again
ATTEMPT = 10.0  # seconds before another replica may be asked: what hangs is noticed by Serve much later
LOOK = 0.2  # seconds between two looks whether a version's shards are open
PAUSE = 0.5  # seconds before asking again
AT_ONCE = 16  # searches in one replica
NAMESPACE = "cxr-retrieval"
QUIET = LoggingConfig(log_level="ERROR", enable_access_log=False)
STARTS = 5  # of Serve, which fails where another server starts it at the same time
FOREIGN = (
    "Ray Serve of this cluster was started by a job of another runtime environment, which what holds the shards would"
    " get too: `serve shutdown` ends it, and all that it serves; the next server to look starts it anew"
)
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

logging.getLogger("ray.serve").setLevel(logging.ERROR)  # of this process; of its replicas, QUIET

P = ParamSpec("P")
T = TypeVar("T")


class ShardHolder:
    """A group of shards in a process of its own. Runs as a Ray Serve replica."""

    def __init__(self, owner: str, environment: dict[str, Any], to: str, version: str, numbers: range) -> None:
        self._owner, self._to, self._version, self._numbers = owner, to, version, numbers
        self._foreign = _environment() != environment
        self._group: ShardGroup | None = None
        self._turn = threading.Lock()  # of opening the group, and of telling it who was removed
        self._told = set[str]()  # of whom the group knows that they were removed
        self._threads = ThreadPoolExecutor(AT_ONCE)
        self._trouble: UserError | None = None
        try:
            self._open()
        except UserError as error:
            self._trouble = error  # Serve would lose its type: who asks first is told it, then it is tried again

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
            if self._foreign:
                raise UserError(FOREIGN)
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
        self.lost = False
        self._attempt = ATTEMPT if replicas > 1 else PATIENCE
        self.apps = [f"{name}-{number}" for number in range(count)]
        environment = _environment()
        _start_serve()
        try:
            self._handles = serve.run_many(
                [
                    serve.RunTarget(
                        serve.deployment(
                            num_replicas=replicas,
                            ray_actor_options=ACTOR | _near(nodes, number, replicas) | {"runtime_env": environment},
                            **DEPLOYMENT,
                        )(ShardHolder).bind(name, environment, version.to, version.id, group),
                        name=app,
                        route_prefix=None,
                        logging_config=QUIET,
                    )
                    for number, (app, group) in enumerate(zip(self.apps, self.groups, strict=True))
                ],
                wait_for_applications_running=False,
            )
            self._wait_until_open()
            self._asked(self._handles, ShardGroup.rows, (), {})
        except BaseException:
            # Those that never lived look for nobody.
            with contextlib.suppress(RayServeException, ray.exceptions.RayError):
                for app in self.apps:
                    serve.delete(app, _blocking=False)
            raise

    def _wait_until_open(self) -> None:
        """However long it takes, as long as Serve does not give up."""
        while True:
            found = serve.status().applications
            applications = [found[app] for app in self.apps if app in found]
            if len(applications) == len(self.apps) and all(app.status == "RUNNING" for app in applications):
                return
            failed = [app for app in applications if app.status not in ("RUNNING", "DEPLOYING")]
            if failed or len(applications) < len(self.apps):
                told = [deployment.message for app in failed for deployment in app.deployments.values()]
                raise ShardsAway(
                    "Ray Serve could not start what holds the shards of this index:"
                    f" {' '.join(' '.join(told).split())[:500] or 'somebody has deleted it'}; look into the logs of"
                    " its replicas"
                )
            time.sleep(LOOK)

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
            late = min(end, time.monotonic() + self._attempt)
            try:
                return [answer.result(timeout_s=max(0.0, late - time.monotonic())) for answer in waiting]
            except ray.exceptions.RayTaskError as error:
                mendable = user_error_in(error)
                if mendable is None:
                    raise
                raise ShardsAway(str(mendable)) from error
            except DeploymentUnavailableError as error:
                self.lost = True
                raise ShardsAway(
                    "the shards of this index are held no more: somebody has ended what Ray Serve held; a server opens"
                    " them again"
                ) from error
            except (ray.exceptions.RayError, RayServeException, TimeoutError) as error:
                for answer in waiting:
                    with contextlib.suppress(ray.exceptions.RayError, RayServeException):
                        answer.cancel()
                if time.monotonic() + PAUSE > end:
                    raise ShardsAway(
                        "some shards of this index do not answer: the process that holds them is being started again;"
                        " ask again in a minute"
                    ) from error
            time.sleep(PAUSE)


def _environment() -> dict[str, Any]:
    """Ray's runtime environment of this process."""
    return dict(ray.get_runtime_context().runtime_env)


def _start_serve() -> None:
    """Serve of this cluster, without HTTP proxies: the server asks by handles."""
    for start in range(STARTS):
        try:
            serve.start(proxy_location="Disabled", logging_config=QUIET)
        except ray.exceptions.ActorAlreadyExistsError:
            if start == STARTS - 1:
                raise
            time.sleep(PAUSE)
        else:
            return


def _near(nodes: Sequence[str], number: int, replicas: int) -> dict[str, Any]:
    """Options that put a group's replicas on as many nodes, group by group on the next ones; on others where those are
    gone."""
    mine = [nodes[(number + place) % len(nodes)] for place in range(min(replicas, len(nodes)))]
    return {
        "label_selector": {"ray.io/node-id": f"in({','.join(mine)})"},
        "fallback_strategy": [{"label_selector": {}}],
    }
