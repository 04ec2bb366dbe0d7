"""A run's curves in TensorBoard or MLflow while it trains, by one setting; both are extras (`tracking`).

TensorBoard: event files in `runs/RUN/tensorboard` of the workspace, sent there after every epoch where that is object
storage. MLflow: where `MLFLOW_TRACKING_URI` says, one run of the experiment `cxr-retrieval` by the name of the run.
A run that goes on after a kill goes on there too. The first failure is said in the worker's log and ends the tracking,
not the run.
"""

import importlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from cxr_retrieval import storage
from cxr_retrieval.config import Settings, flat
from cxr_retrieval.errors import UserError
from cxr_retrieval.network.steps import PASSES

EXPERIMENT, FOLDER = "cxr-retrieval", "tensorboard"
MODULES = {"tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow"}
SERVER = "MLFLOW_TRACKING_URI"
RETRIES, FEW = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"  # its default is minutes of one call, while all workers wait
MOST_TEXT = 500  # characters of a parameter that MLflow takes
logger = logging.getLogger(__name__)


class Tracker(Protocol):
    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Tell figures of an optimizer step."""

    def send(self) -> None:
        """Make sure that others see what was told."""

    def end(self, failed: bool = False) -> None:
        """Say that the run has ended, and whether by an error."""


class Nowhere:
    """No tracker."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        pass

    def send(self) -> None:
        pass

    def end(self, failed: bool = False) -> None:
        pass


class _TensorBoard:
    def __init__(self, folder: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._staged = tempfile.TemporaryDirectory(prefix="cxr-tensorboard-") if storage.is_s3(folder) else None
        where = self._staged.name if self._staged else storage.canonical(folder)
        # What a killed run told after its last checkpoint, which holds `step`, is told again.
        self._writer = SummaryWriter(where, purge_step=step + 1)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def send(self) -> None:
        self._writer.flush()
        for file in Path(self._staged.name).iterdir() if self._staged else ():
            storage.write_bytes(storage.join(self._folder, file.name), file.read_bytes())

    def end(self, failed: bool = False) -> None:  # noqa: ARG002  # its files do not say how a run ended
        self.send()
        self._writer.close()


class _MLflow:
    def __init__(self, run: str, settings: Settings, server: str | None) -> None:
        os.environ.setdefault(RETRIES, FEW)
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=server)
        found = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT)
        known = self._client.search_runs([experiment], f"attributes.run_name = '{run}'")
        self._run = (known[0] if known else self._client.create_run(experiment, run_name=run)).info.run_id
        if known:
            self._client.update_run(self._run, status="RUNNING")
        else:
            for key, value in flat(settings.model_dump(mode="json", include={"network", "losses", "training", "seed"})):
                self._client.log_param(self._run, key, str(value)[:MOST_TEXT])

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._client.log_metric(self._run, name, value, step=step)

    def send(self) -> None:
        pass

    def end(self, failed: bool = False) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class _Quietly:
    """A tracker whose first failure is said, ends nothing, and is its last: every further one would cost its time."""

    def __init__(self, make: Callable[[], Tracker]) -> None:
        self._tracker: Tracker = Nowhere()
        self._try(lambda: setattr(self, "_tracker", make()))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._try(lambda: self._tracker.log(step, figures))

    def send(self) -> None:
        self._try(lambda: self._tracker.send())

    def end(self, failed: bool = False) -> None:
        self._try(lambda: self._tracker.end(failed))

    def _try(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        except Exception as error:  # noqa: BLE001  # of whatever server and network there are: no reason to end a run
            self._tracker = Nowhere()
            logger.warning("the run goes on untracked: %s", error)


def require_tracking(settings: Settings) -> None:
    """Refuse a tracker that is not installed or whose server is not named, before workers start."""
    kind = settings.training.tracking
    if kind is None:
        return
    try:
        importlib.import_module(MODULES[kind])
    except ImportError:
        raise UserError(
            f"training.tracking={kind}: it is not installed; pip install 'cxr-retrieval[tracking]' on every node"
        ) from None
    if kind != "mlflow":
        return
    server = tracking_server()
    if not server:
        raise UserError(f"training.tracking=mlflow: set {SERVER}, e.g. to http://host:5000")
    os.environ.setdefault(RETRIES, FEW)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        MlflowClient(tracking_uri=server).search_experiments(max_results=1)
    except MlflowException as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"training.tracking=mlflow: {SERVER}={server} does not answer: {text}") from None


def tracking_server() -> str | None:
    """The server of MLflow as the driver knows it: workers have another environment."""
    return os.environ.get(SERVER)


def tracker_of(settings: Settings, run_folder: str, step: int, server: str | None) -> Tracker:
    """The tracker that the settings name, of the run whose state lies in `run_folder` and that begins at `step`."""
    kind = settings.training.tracking
    if kind is None:
        return Nowhere()
    if kind == "tensorboard":
        return _Quietly(lambda: _TensorBoard(storage.join(run_folder, FOLDER), step))
    return _Quietly(lambda: _MLflow(run_folder.rpartition("/")[2], settings, server))


def epoch_figures(record: Mapping[str, Any]) -> dict[str, float]:
    """What is told of an epoch: losses, those of every pass and step that was seen too, speed, centres, and every
    embedding's validation figures."""
    figures = {name: record[name] for name in ("loss", "ccloss", "cross_entropy", "images_per_second")}
    figures["centre_cosine"] = sum(record["centre_cosine"]) / len(record["centre_cosine"])
    for name in ("ccloss", "cross_entropy"):
        values = record[f"{name}_by_table"]
        for table, value in enumerate(values):
            crop, step = divmod(table, len(values) // PASSES)
            if value is not None:
                figures[f"{name}/{'crop' if crop else 'whole'}/step{step + 1}"] = value
    for embedding, table in record["validation"].items():
        figures |= {f"validation/{figure}/{embedding}": value for figure, value in table.items()}
    return figures
