"""Fixtures that all tests share: one Ray for the session, and small archives in NIH's layout."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from cluster.object_store import BUCKET, HOST, PORTS, ObjectStore, running
from tests.proxy import FaultProxy, fault_proxy

# Read by Ray when it starts: a lost worker is noticed in a fraction of a second instead of in several.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
for name in ("STATE_ACTOR_RECONCILIATION", "PREEMPTION_WATCHER"):
    os.environ.setdefault(f"RAY_TRAIN_ENABLE_{name}", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ["CXR_PRIVACY_KEY"] = "a key that all tests share"  # as whoever runs jobs has one
# Tests run in several processes: a thread that spins at a barrier takes the core from another one's work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Worker processes wait for the next test instead of ending after a second: what they have imported stays imported.
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
os.environ.setdefault("RAY_num_workers_soft_limit", "6")

# Decided before Ray starts, whose processes inherit it; the server itself starts with the first test that wants it.
STORE = ObjectStore(Path(tempfile.gettempdir()) / f"cxr-s3-{os.getpid()}")
PROXY_PORT = STORE.port + PORTS - 1  # all requests pass through it, and break when a test wants them to
os.environ.update(STORE.variables | {"AWS_ENDPOINT_URL": f"http://{HOST}:{PROXY_PORT}"})
for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3"):
    os.environ.pop(name, None)

# No example has a deadline: a busy machine is no failure. `fuzz` is what `make fuzz` asks for; how many files that are,
# tests/unit/test_fuzz.py says.
for name in ("tests", "fuzz"):
    hypothesis.settings.register_profile(name, deadline=None)
hypothesis.settings.load_profile("tests")

NIH_SAMPLE = Path(__file__).parents[2] / "shared" / "data" / "nih"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for all tests of a session, started as jobs start it."""
    import ray

    from cxr_retrieval.runtime import start_ray

    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """A real S3 server with ports of its own, for all tests of a session."""
    with running(STORE) as store:
        yield store
    shutil.rmtree(store.data, ignore_errors=True)


@pytest.fixture(scope="session")
def proxy_of_session(object_store: ObjectStore) -> Iterator[FaultProxy]:
    with fault_proxy(object_store.port, PROXY_PORT) as proxy:
        yield proxy


@pytest.fixture
def faults(proxy_of_session: FaultProxy) -> Iterator[FaultProxy]:
    """What lies between every client of this session and the server: it passes all on until it is told otherwise."""
    proxy_of_session.reset()
    yield proxy_of_session
    proxy_of_session.reset()


@pytest.fixture
def s3(faults: FaultProxy, tmp_path: Path) -> str:  # noqa: ARG001  # the door to the server
    """A prefix of the server's bucket that no other test writes to."""
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture(scope="session")
def nih_sample() -> Path:
    """The sample of real NIH X-rays beside the project; tests that need it are skipped where it is not."""
    if not (NIH_SAMPLE / "dev").is_dir():
        pytest.skip(f"the NIH sample is not at {NIH_SAMPLE.name}/: real X-rays are not part of this project")
    return NIH_SAMPLE


@pytest.fixture(scope="session")
def phantom_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of 96 small phantom radiographs in NIH's layout. Tests that change it copy it first."""
    import cv2

    from cxr_retrieval.corpus.phantom import radiographs

    folder = tmp_path_factory.mktemp("phantoms")
    (folder / "images").mkdir()
    images = [
        image for patient in radiographs.patients_for(96, 0) for image in radiographs.draw_patient(patient, 0, 128)
    ]
    for image in images[:96]:
        assert cv2.imwrite(str(folder / "images" / image.image_id), image.pixels)
    rows = [radiographs.data_entry_header(), *(radiographs.data_entry_row(image) for image in images[:96])]
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join(rows) + "\n")
    boxes = [radiographs.bbox_header(), *(line for image in images[:96] for line in radiographs.bbox_rows(image))]
    (folder / "BBox_List_2017.csv").write_text("\n".join(boxes) + "\n")
    return folder


@pytest.fixture(scope="session")
def large_archive(phantom_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom archive in films so large that preparing them takes a while."""
    import cv2

    copy = Path(shutil.copytree(phantom_archive, tmp_path_factory.mktemp("large") / "archive"))
    for path in (copy / "images").iterdir():
        film = cv2.resize(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), (1000, 1000), interpolation=cv2.INTER_CUBIC)
        assert cv2.imwrite(str(path), film, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    return copy
