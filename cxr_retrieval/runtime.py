"""Starting or joining Ray, quietly: a job's own lines are what a person reads."""

import logging
import os

import ray

from cxr_retrieval.errors import UserError

# Set before Ray starts its processes, which inherit them.
QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def require_cpus(workers: int, cpus_per_worker: float, gpus: int) -> None:
    """Refuse a training run that leaves Ray Data no CPU, or wants more GPUs than there are: it would wait for ever.

    Raises UserError with the numbers. Ray must be running.
    """
    cpus, found = ray.cluster_resources().get("CPU", 0.0), ray.cluster_resources().get("GPU", 0.0)
    if cpus - workers * cpus_per_worker < 1:
        raise UserError(
            f"training.workers={workers} with training.cpus_per_worker={cpus_per_worker:g} leave Ray Data under one of"
            f" {cpus:g} CPUs: lower one of them"
        )
    if gpus > found:
        raise UserError(
            f"training.workers={workers} want a GPU each, and the cluster has {found:g}: lower training.workers"
        )


def start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names (set under `ray job submit`), else start Ray on this machine."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not ray.is_initialized():
        ray.init(
            address=os.environ.get("RAY_ADDRESS") or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
