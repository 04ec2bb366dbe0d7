"""Starting or joining Ray, quietly: a job's own lines are what a person reads. And what its processes may take."""

import contextlib
import ctypes
import logging
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cxr_retrieval import config, storage
from cxr_retrieval.config import Settings
from cxr_retrieval.errors import UserError

# Set before Ray starts its processes, which inherit them.
ENVIRONMENT = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",  # a hospital's jobs tell nobody that they ran
    "RAY_task_oom_retries": "20",  # without an end a task that no node has the memory for is begun again for ever
    "HF_HUB_DISABLE_TELEMETRY": "1",  # network.weights=hf:// may ask the hub, and tells it of nothing else
    "TRANSFORMERS_VERBOSITY": "error",
}
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of mallopt(3)
KEPT_BYTES = 32 << 20  # the most that mallopt takes for the first
TRIES = 4  # of a task whose process dies: lost nodes cost one each, and a file that kills every reader all
DIED = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError)


def keep_freed_memory() -> None:
    """Let this process use again what it has freed, a few images' worth.

    By default glibc gives blocks of megabytes back to the system and asks for them anew, image by image; to fault
    their pages in again takes as long as to decode an uncompressed film. Of other C libraries nothing is asked.
    """
    with contextlib.suppress(AttributeError):  # a libc that has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(TRIM_THRESHOLD, 2 * KEPT_BYTES)


def require_cpus(workers: int, cpus_per_worker: float, reading: float, gpus: int) -> None:
    """Refuse a training run that leaves Ray Data not the CPUs that one task of its `reading` takes, or wants more GPUs
    than there are: it would wait for ever.

    Raises UserError with the numbers. Ray must be running.
    """
    nodes = nodes_cpus()
    found = ray.cluster_resources().get("GPU", 0.0)
    if not leaves_room(nodes, workers, cpus_per_worker, reading):
        raise UserError(
            f"training.workers={workers} with training.cpus_per_worker={cpus_per_worker:g} leave Ray Data under"
            f" {reading:g} CPUs on every node (CPUs of the nodes: {', '.join(f'{cpus:g}' for cpus in nodes)}):"
            " lower one of them"
        )
    if gpus > found:
        raise UserError(
            f"training.workers={workers} want a GPU each, and the cluster has {found:g}: lower training.workers"
        )


def nodes_cpus() -> list[float]:
    """The CPUs of every node that is alive. Ray must be running."""
    return [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]


def nodes_memory() -> list[int]:
    """The bytes that Ray may give to tasks on every node that is alive and has CPUs. Ray must be running."""
    return [int(node["Resources"]["memory"]) for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def reserved_memory(wanted: int) -> int:
    """Bytes that Ray keeps for a task that takes about so many: a node that has less does one such task at a time,
    where Ray would wait for ever for one that has them. Ray must be running."""
    return min([wanted, *nodes_memory()])


def working_nodes() -> list[str]:
    """The ids of the nodes that are alive and have CPUs, which a head may lack; of all where none has any."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [node["NodeID"] for node in alive if node["Resources"].get("CPU")] or [node["NodeID"] for node in alive]


def leaves_room(nodes: Sequence[float], workers: int, cpus_per_worker: float, reading: float) -> bool:
    """Whether nodes of so many CPUs hold the workers and, on one of them, a task of `reading` CPUs beside."""

    def held(cpus: float) -> int:
        return max(0, int((cpus + 1e-9) / cpus_per_worker))

    everywhere = sum(map(held, nodes))
    return any(cpus + 1e-9 >= reading and everywhere - held(cpus) + held(cpus - reading) >= workers for cpus in nodes)


def start_ray(settings: Settings | None = None) -> None:
    """Join the cluster that RAY_ADDRESS names (set under `ray job submit`), else start Ray on this machine.

    Raises UserError where no cluster answers, where Ray does not come up here in its time, and where the settings name
    a local folder that other nodes of the cluster do not see.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") or "local"
        try:
            # With its dashboard: what gives the workers of a stopped trial back asks there (Ray Train 2.60).
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise UserError(
                f"no Ray cluster answers at RAY_ADDRESS={address}: {' '.join(str(error).split())[:200]};"
                " start it, unset RAY_ADDRESS, or give its token in RAY_AUTH_TOKEN"
            ) from error
        except Exception as error:
            if "timed out during startup" not in str(error):  # Ray has no type of its own for it
                raise
            raise UserError(
                "Ray did not start within 30 seconds: this machine is too busy, or has too little memory: run the same"
                " command again when it is not, it goes on"
            ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    if settings is not None:
        _require_shared(settings)


def _require_shared(settings: Settings) -> None:
    """Refuse a local folder that is not the same folder on every node (a network mount is)."""
    local = {key: storage.canonical(uri) for key, uri in config.places(settings).items() if not storage.is_s3(uri)}
    others = _other_nodes()
    if not others or not local:
        return
    tokens = {key: Path(local[key]) / f".seen-by-all-{secrets.token_hex(4)}" for key in config.WRITTEN if key in local}
    for token in tokens.values():
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
    try:
        _require_seen(local | {key: str(token) for key, token in tokens.items()}, local, others)
    finally:
        for token in tokens.values():
            token.unlink(missing_ok=True)


def require_readable(key: str, uri: str) -> None:
    """Refuse a local folder that a node of the cluster does not see. Ray must be running."""
    if not storage.is_s3(uri):
        local = {key: storage.canonical(uri)}
        _require_seen(local, local, _other_nodes())


def _other_nodes() -> list[str]:
    mine = ray.get_runtime_context().get_node_id()
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != mine]


def _require_seen(wanted: dict[str, str], local: dict[str, str], nodes: Sequence[str]) -> None:
    """Refuse the first key of `local` whose path in `wanted` is here and not on one of the nodes."""
    there = {key: path for key, path in wanted.items() if os.path.exists(path)}
    look = ray.remote(num_cpus=0)(_missing)
    for missing in ray.get(
        [
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(there)
            for node in nodes
        ]
    ):
        refuse_unshared(missing, local)


def refuse_unshared(missing: Iterable[str], local: dict[str, str]) -> None:
    """Raises UserError for the first of the keys whose folder another node does not see."""
    for key in missing:
        raise UserError(
            f"{key}={local[key]} lies on this node's own disk, and the cluster has several nodes:"
            " give s3://bucket/prefix, or a folder that every node mounts"
        )


def _missing(paths: dict[str, str]) -> list[str]:
    """The keys of the paths that this node does not see. Runs in a Ray task on every other node."""
    return [key for key, path in paths.items() if not os.path.exists(path)]
