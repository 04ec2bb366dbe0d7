"""Promises of the files that start a cluster and submit to it: they fit each other, the code and the configuration."""

import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cxr_retrieval.config import Settings, load_settings
from cxr_retrieval.index.removal import FOLDERS
from cxr_retrieval.tombstones import FOLDER as TOMBSTONES
from cxr_retrieval.training.input import READ_CPUS

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints" / "requirements.txt").read_text(), re.MULTILINE))
NIH_FULL = "jobs/configs/nih_full.yaml"
OPERATOR = {"app.kubernetes.io/component": "kuberay-operator"}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text(encoding="utf-8")))


def aws() -> dict[str, Any]:
    [config] = documents("aws.yaml")
    return config


def ray_job() -> dict[str, Any]:
    [job] = documents("rayjob.yaml")
    spec: dict[str, Any] = job["spec"]
    return spec


def cluster_spec(name: str) -> dict[str, Any]:
    """The RayCluster spec of a manifest: its own, or the one in a RayJob."""
    [document] = documents(name)
    spec: dict[str, Any] = document["spec"]
    return spec["rayClusterSpec"] if document["kind"] == "RayJob" else spec


def pod_templates(name: str) -> dict[str, dict[str, Any]]:
    """Every pod that a manifest leads to, by its role."""
    spec = cluster_spec(name)
    templates = {"head": spec["headGroupSpec"]["template"]}
    templates |= {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    if name == "rayjob.yaml":
        templates["submitter"] = ray_job()["submitterPodTemplate"]
    return templates


def containers(name: str) -> Iterator[dict[str, Any]]:
    for template in pod_templates(name).values():
        yield from template["spec"]["containers"]


def workers(name: str) -> list[tuple[int, int, int]]:
    """The GPU worker nodes of a file that is always there: how many, GPUs and CPUs of each."""
    if name == "aws.yaml":
        config = aws()
        kinds = (kind for key, kind in config["available_node_types"].items() if key != config["head_node_type"])
        return [(kind["min_workers"], kind["resources"].get("GPU", 0), kind["resources"]["CPU"]) for kind in kinds]
    found = []
    for group in cluster_spec(name)["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        found.append((group["minReplicas"], int(limits.get("nvidia.com/gpu", 0)), int(limits["cpu"])))
    return found


def nih_full() -> Settings:
    return load_settings([str(ROOT / NIH_FULL)])


MANIFESTS = ("raycluster.yaml", "rayjob.yaml")
STARTERS = ("aws.yaml", *MANIFESTS)


# --- ray up


def test_ray_accepts_the_aws_file_once_its_defaults_are_filled_in() -> None:
    validate_config(prepare_config(aws()))


def test_rays_defaults_install_nothing_on_an_aws_node_everything_is_in_the_image() -> None:
    filled = prepare_config(aws())
    assert filled["head_setup_commands"] == filled["worker_setup_commands"] == []


def test_no_aws_node_type_leaves_its_security_group_to_ray_which_would_open_ssh_to_everyone() -> None:
    for kind in aws()["available_node_types"].values():
        assert kind["node_config"]["SecurityGroupIds"]
    assert "0.0.0.0" not in (CLUSTER / "aws.yaml").read_text(encoding="utf-8")


def test_every_aws_node_has_an_image_and_an_instance_profile_of_ours_and_an_encrypted_disk() -> None:
    for kind in aws()["available_node_types"].values():
        node = kind["node_config"]
        assert node["ImageId"]  # Ray's own default is an Ubuntu of 2018
        assert node["IamInstanceProfile"]["Name"].startswith("cxr-retrieval-")  # Ray's own may do anything to S3
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])


def test_aws_nodes_demand_the_token_that_is_mounted_from_outside_the_repository() -> None:
    config = aws()
    options = [option for option in config["docker"]["run_options"] if option.startswith("--env ")]
    variables = dict(option.removeprefix("--env ").split("=", 1) for option in options)
    assert variables["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_TOKEN" not in variables
    mounted, local = next(iter(config["file_mounts"].items()))
    assert Path(variables["RAY_AUTH_TOKEN_PATH"]).parent == Path(mounted)
    assert local.startswith("~/")
    assert variables["AWS_REGION"] == config["provider"]["region"]


def test_the_aws_dashboard_listens_on_loopback_only() -> None:
    [start] = [line for line in aws()["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in shlex.split(start)


# --- what all three offer


@pytest.mark.parametrize("name", STARTERS)
def test_the_workers_hold_the_training_of_nih_full_and_leave_ray_data_a_cpu(name: str) -> None:
    training = nih_full().training
    assert training.gpu
    nodes = workers(name)
    assert sum(count * gpus for count, gpus, _ in nodes) >= training.workers
    assert sum(count * cpus for count, _, cpus in nodes) >= training.workers * training.cpus_per_worker + READ_CPUS


@pytest.mark.parametrize("name", STARTERS)
def test_a_worker_node_has_the_cpus_for_every_gpu_it_has(name: str) -> None:
    for count, gpus, cpus in workers(name):
        assert count > 0
        assert gpus * nih_full().training.cpus_per_worker + READ_CPUS <= cpus


@pytest.mark.parametrize("name", STARTERS)
def test_the_number_of_nodes_is_fixed_because_jobs_do_not_wait_for_more(name: str) -> None:
    if name == "aws.yaml":
        config = aws()
        kinds = [kind for key, kind in config["available_node_types"].items() if key != config["head_node_type"]]
        assert sum(kind["max_workers"] for kind in kinds) == config["max_workers"]
        assert all(kind["min_workers"] == kind["max_workers"] for kind in kinds)
    else:
        groups = cluster_spec(name)["workerGroupSpecs"]
        assert all(group["minReplicas"] == group["replicas"] == group["maxReplicas"] for group in groups)
        assert not cluster_spec(name).get("enableInTreeAutoscaling")


@pytest.mark.parametrize("name", STARTERS)
def test_the_head_offers_no_cpu_so_that_work_runs_on_workers(name: str) -> None:
    if name == "aws.yaml":
        assert aws()["available_node_types"][aws()["head_node_type"]]["resources"] == {"CPU": 0}
    else:
        assert cluster_spec(name)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", STARTERS)
def test_images_carry_the_projects_version_and_a_target_of_the_dockerfile(name: str) -> None:
    images = {aws()["docker"]["image"]} if name == "aws.yaml" else {c["image"] for c in containers(name)}
    assert images <= {f"registry.example.org/cxr-retrieval:{VERSION}-{target}" for target in ("gpu", "cpu")}
    assert any(image.endswith("-gpu") for image in images)


def test_every_starter_uses_one_instance_type_for_its_gpu_nodes() -> None:
    [kind] = [kind for key, kind in aws()["available_node_types"].items() if key != aws()["head_node_type"]]
    for name in MANIFESTS:
        selector = pod_templates(name)["gpu"]["spec"]["nodeSelector"]
        assert selector["node.kubernetes.io/instance-type"] == kind["node_config"]["InstanceType"]
        [(_, _, pod_cpus)] = workers(name)
        assert pod_cpus < kind["resources"]["CPU"]  # Kubernetes keeps a part of a node for itself


# --- Kubernetes


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_manifests_name_the_ray_that_the_image_holds(name: str) -> None:
    assert cluster_spec(name)["rayVersion"] == PINNED["ray"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_container_demands_the_token_and_takes_it_from_the_secret_that_the_operator_reads(name: str) -> None:
    options = cluster_spec(name)["authOptions"]
    assert options["mode"] == "token"
    for container in containers(name):
        variables = {entry["name"]: entry for entry in container["env"]}
        assert variables["RAY_AUTH_MODE"]["value"] == "token"
        assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {
            "name": options["secretName"],
            "key": "auth_token",  # the one that the operator reads
        }


@pytest.mark.parametrize("name", MANIFESTS)
def test_no_secret_is_written_into_a_manifest(name: str) -> None:
    for container in containers(name):
        for entry in container["env"]:
            if any(word in entry["name"] for word in ("TOKEN", "KEY", "SECRET", "PASSWORD")):
                assert set(entry) == {"name", "valueFrom"}
                assert set(entry["valueFrom"]) == {"secretKeyRef"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_dashboard_has_no_address_outside_the_kubernetes_cluster(name: str) -> None:
    head = cluster_spec(name)["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert head["enableIngress"] is False
    for container in containers(name):
        assert all("hostPort" not in port for port in container.get("ports", []))
    assert all(not template["spec"].get("hostNetwork") for template in pod_templates(name).values())


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_run_as_a_plain_user_without_rights_in_kubernetes(name: str) -> None:
    for template in pod_templates(name).values():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"] == container["resources"]["requests"]


def test_the_ray_job_and_the_ray_cluster_describe_the_same_nodes() -> None:
    one, other = (cluster_spec(name) for name in MANIFESTS)
    for spec in (one, other):
        spec["headGroupSpec"]["template"].pop("metadata")
        [group] = spec["workerGroupSpecs"]
        group["template"].pop("metadata")
    assert one == other


def test_the_ray_job_runs_a_job_that_exists_with_settings_that_the_schema_accepts() -> None:
    words = shlex.split(ray_job()["entrypoint"])
    assert words[:2] == ["python", "-m"]
    assert importlib.util.find_spec(words[2]) is not None
    settings = job_settings(words[3:])
    assert settings.training == nih_full().training
    assert settings.workspace.startswith("s3://")
    assert (settings.corpus.archive or "").startswith("s3://")


def job_settings(words: list[str]) -> Settings:
    """The settings of a job's command line, its config file read from the repository."""
    files = [str(ROOT / words[place + 1]) for place, word in enumerate(words) if word == "--config"]
    return load_settings(files, [word for word in words if "=" in word and not word.startswith("-")])


def test_a_ray_job_that_fails_is_tried_again_and_takes_its_cluster_down_in_the_end() -> None:
    job = ray_job()
    assert job["backoffLimit"] >= 1
    assert job["shutdownAfterJobFinishes"] is True
    assert job["activeDeadlineSeconds"] > 0
    assert job["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


# --- network policy


def pods() -> dict[str, dict[str, str]]:
    """The labels of every pod, as KubeRay completes them."""
    found: dict[str, dict[str, str]] = {"stranger": {"app": "other"}}
    for name in MANIFESTS:
        for role, template in pod_templates(name).items():
            kuberay = {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head" if role == "head" else "worker"}
            found[f"{name}/{role}"] = template["metadata"]["labels"] | ({} if role == "submitter" else kuberay)
    return found


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def open_ports(source: str, target: str, way: str) -> set[int] | None:
    """The ports of `target` that the policies open to `source` (Ingress) or from it (Egress); None: all of them."""
    labels = pods()
    subject, peer = (target, source) if way == "Ingress" else (source, target)
    ports: set[int] = set()
    for policy in documents("networkpolicy.yaml"):
        spec = policy["spec"]
        if not matches(spec["podSelector"], labels[subject]):
            continue
        for rule in spec.get(way.lower(), []):
            for end in rule["from" if way == "Ingress" else "to"]:
                here = "namespaceSelector" not in end and "ipBlock" not in end
                if here and matches(end["podSelector"], labels[peer]):
                    if "ports" not in rule:
                        return None
                    ports |= {port["port"] for port in rule["ports"]}
    return ports


def test_every_pod_is_denied_what_no_rule_allows() -> None:
    denying = [p["spec"] for p in documents("networkpolicy.yaml") if not p["spec"].keys() & {"ingress", "egress"}]
    [deny] = denying
    assert deny["policyTypes"] == ["Ingress", "Egress"]
    for name, labels in pods().items():
        assert matches(deny["podSelector"], labels) is (name != "stranger")


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_nodes_of_a_cluster_reach_each_other_on_every_port_and_nobody_elses(name: str) -> None:
    other = next(manifest for manifest in MANIFESTS if manifest != name)
    for way in ("Ingress", "Egress"):
        assert open_ports(f"{name}/head", f"{name}/gpu", way) is None
        assert open_ports(f"{name}/gpu", f"{name}/head", way) is None
        assert open_ports(f"{name}/gpu", f"{name}/gpu", way) is None
        assert open_ports(f"{name}/gpu", f"{other}/head", way) == set()
    assert open_ports("stranger", f"{name}/head", "Ingress") == set()
    assert open_ports("stranger", f"{name}/gpu", "Ingress") == set()


def test_the_submitter_reaches_the_dashboard_and_nothing_else_of_a_cluster() -> None:
    [dashboard] = port_of("head", "dashboard")
    for way in ("Ingress", "Egress"):
        assert open_ports("rayjob.yaml/submitter", "rayjob.yaml/head", way) == {dashboard}
        assert open_ports("rayjob.yaml/submitter", "rayjob.yaml/gpu", way) == set()
    assert open_ports("stranger", "rayjob.yaml/submitter", "Ingress") == set()


def port_of(role: str, name: str) -> set[int]:
    """The number of a named port in both manifests, which must be the one that Ray is told to use."""
    found = set()
    for manifest in MANIFESTS:
        spec = cluster_spec(manifest)
        told = spec["headGroupSpec"] if role == "head" else spec["workerGroupSpecs"][0]
        [port] = [p for p in told["template"]["spec"]["containers"][0]["ports"] if p["name"] == name]
        option = {"dashboard": "dashboard-port", "metrics": "metrics-export-port"}[name]
        assert told["rayStartParams"][option] == str(port["containerPort"])
        found.add(port["containerPort"])
    return found


def test_the_ports_opened_to_other_namespaces_are_the_dashboards_and_the_metrics_own() -> None:
    opened: dict[str, set[int]] = {}
    for policy in documents("networkpolicy.yaml"):
        for rule in policy["spec"].get("ingress", []):
            for end in rule["from"]:
                if "namespaceSelector" in end:
                    assert end["namespaceSelector"]["matchLabels"]  # never every namespace
                    who = "operator" if end["podSelector"]["matchLabels"] == OPERATOR else "prometheus"
                    opened[who] = {port["port"] for port in rule["ports"]}
    assert opened == {"operator": port_of("head", "dashboard"), "prometheus": port_of("head", "metrics")}
    assert port_of("gpu", "metrics") == port_of("head", "metrics")


def test_nodes_get_out_to_names_and_https_only_and_never_to_the_instances_metadata() -> None:
    out: dict[str, set[tuple[str, int]]] = {}
    for policy in documents("networkpolicy.yaml"):
        for rule in policy["spec"].get("egress", []):
            for end in rule["to"]:
                if "podSelector" not in end:
                    key = "outside" if "ipBlock" in end else "kube-system"
                    out.setdefault(key, set()).update((port["protocol"], port["port"]) for port in rule["ports"])
                    assert "ipBlock" not in end or "169.254.0.0/16" in end["ipBlock"]["except"]
    assert out == {"outside": {("TCP", 443)}, "kube-system": {("UDP", 53), ("TCP", 53)}}


# --- rights in S3


JOBS, REMOVAL = "iam-policy.json", "iam-policy-removal.json"


def statements(policy: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((CLUSTER / policy).read_text(encoding="utf-8"))["Statement"]
    return found


def allowed(action: str, key: str | None = None, prefix: str | None = None, policy: str = JOBS) -> bool:
    """What a policy says to a request for a key of BUCKET, or (ListBucket) for a prefix or for none."""
    arn = "arn:aws:s3:::BUCKET" + (f"/{key}" if key is not None else "")
    for statement in statements(policy):
        if action not in listed(statement["Action"]):
            continue
        if not any(fnmatchcase(arn, pattern) for pattern in listed(statement["Resource"])):
            continue
        condition = statement.get("Condition", {})
        assert set(condition) <= {"StringLikeIfExists", "StringLike"}
        if prefix is None and "StringLike" in condition:
            continue
        patterns = next(iter(condition.values()), {}).get("s3:prefix", ["*"])
        if prefix is None or any(fnmatchcase(prefix, pattern) for pattern in patterns):
            return True
    return False


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def policy_actions(policy: str = JOBS) -> set[str]:
    assert all(statement["Effect"] == "Allow" for statement in statements(policy))
    return {action for statement in statements(policy) for action in listed(statement["Action"])}


def test_the_rights_are_named_one_by_one_and_are_those_that_storage_and_ray_use() -> None:
    uses = {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload", "s3:DeleteObject"}
    assert policy_actions() == uses


def test_storage_asks_s3_for_nothing_that_the_rights_do_not_cover() -> None:
    code = (ROOT / "cxr_retrieval" / "s3.py").read_text(encoding="utf-8")
    asked = set(re.findall(r"client\([^()]*\)\.(\w+)[(,]", code))
    jobs = {
        "list_objects_v2": "s3:ListBucket",
        "head_object": "s3:GetObject",
        "get_object": "s3:GetObject",
        "put_object": "s3:PutObject",
        "delete_object": "s3:DeleteObject",
    }
    removal = {"get_bucket_versioning": "s3:GetBucketVersioning", "list_object_versions": "s3:ListBucketVersions"}
    assert asked == jobs.keys() | removal.keys()
    assert set(jobs.values()) <= policy_actions()
    assert set(removal.values()) <= policy_actions(REMOVAL)
    named = re.findall(r"_needing\(\w+, \"(s3:\w+)\"", code)
    assert {"s3:DeleteObjectVersion", *removal.values()} <= set(named) <= policy_actions(REMOVAL)


PURGED = (*FOLDERS, "runs")


@pytest.mark.parametrize("folder", PURGED)
def test_who_removes_patients_may_delete_every_version_of_all_that_a_purge_deletes(folder: str) -> None:
    key = f"cxr/{folder}/x/objects/0123"
    for action in ("s3:DeleteObject", "s3:DeleteObjectVersion"):
        assert allowed(action, key, policy=REMOVAL)
    assert allowed("s3:ListBucketVersions", prefix=key, policy=REMOVAL)
    assert allowed("s3:GetBucketVersioning", policy=REMOVAL)
    assert not allowed("s3:DeleteObjectVersion", key)


def test_who_removes_patients_may_mark_them_and_neither_delete_marks_nor_touch_an_archive() -> None:
    for place in ("cxr", "cxr/indexes/chest"):
        assert allowed("s3:PutObject", f"{place}/{TOMBSTONES}/0123.json", policy=REMOVAL)
    assert not allowed("s3:PutObject", "cxr/indexes/chest/objects/0123", policy=REMOVAL)
    assert not allowed("s3:DeleteObject", f"cxr/{TOMBSTONES}/0123.json", policy=REMOVAL)
    assert not allowed("s3:ListBucketVersions", policy=REMOVAL)
    for action in policy_actions(REMOVAL):
        assert not allowed(action, "nih/images/00000001_000.png", "nih/", policy=REMOVAL)
    uses = {"s3:DeleteObject", "s3:DeleteObjectVersion", "s3:GetBucketVersioning", "s3:ListBucketVersions"}
    assert policy_actions(REMOVAL) == uses | {"s3:PutObject"}


def test_the_prefixes_are_those_of_the_ray_job() -> None:
    settings = job_settings(shlex.split(ray_job()["entrypoint"])[3:])
    for uri in (settings.workspace, settings.corpus.archive or ""):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        assert bucket == "BUCKET"
        assert allowed("s3:ListBucket", prefix=prefix)  # how a job asks first whether it may
        assert allowed("s3:ListBucket", prefix=f"{prefix}/")
        assert allowed("s3:GetObject", f"{prefix}/images/00000001_000.png")


def test_a_missing_file_is_told_from_a_forbidden_one() -> None:
    assert allowed("s3:ListBucket")  # a HEAD request has no prefix: without this right S3 answers 403 for 404


def test_other_prefixes_of_the_bucket_can_be_neither_listed_nor_read() -> None:
    assert not allowed("s3:ListBucket", prefix="other/")
    assert not allowed("s3:ListBucket", prefix="")
    assert not allowed("s3:GetObject", "other/file")
    assert not allowed("s3:GetObject", "cxr-of-others/file")


def test_the_archive_is_read_only() -> None:
    for action in policy_actions() - {"s3:GetObject", "s3:ListBucket"}:
        assert not allowed(action, "nih/images/00000001_000.png")


def test_every_folder_that_the_code_makes_in_a_workspace_may_be_written() -> None:
    folders = set()
    for file in [*(ROOT / "cxr_retrieval").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]:
        text = file.read_text(encoding="utf-8")
        names = dict(re.findall(r"^([A-Z_]+) = \"(\w+)\"", text, flags=re.MULTILINE))
        made = re.findall(r"join\(\s*(?:(?:settings|self)\.)?(?:workspace|place),\s*(?:\"(\w+)\"|([A-Z_]+)\b)", text)
        folders |= {written or names[constant] for written, constant in made if constant != "SUMMARY_FILE"}
    assert {"corpora", "runs", "models", "embeddings", "indexes", "reports", "tombstones"} <= folders
    for folder in folders:
        for action in ("s3:PutObject", "s3:AbortMultipartUpload", "s3:GetObject"):
            assert allowed(action, f"cxr/{folder}/x/manifest.json"), folder
    assert allowed("s3:PutObject", "cxr/summary.json")
    assert allowed("s3:PutObject", "cxr/")  # pyarrow marks the folders on the way to a run's
    assert not allowed("s3:PutObject", "cxr/other")


def test_nothing_is_deleted_but_a_runs_old_checkpoints() -> None:
    assert allowed("s3:DeleteObject", "cxr/runs/x/checkpoint_1/state.pt")
    for folder in ("corpora", "models", "embeddings", "indexes", "reports"):
        assert not allowed("s3:DeleteObject", f"cxr/{folder}/x/manifest.json")


# --- image


def dockerfile() -> dict[str, list[str]]:
    """The instructions of every target, those of the stages that it builds on first."""
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    stages: dict[str, list[str]] = {}
    current: list[str] = []
    for line in filter(None, map(str.strip, lines.splitlines())):
        if line.startswith("FROM "):
            _, parent, _, name = line.split()
            current = stages[name] = list(stages.get(parent, [line]))
        else:
            current.append(" ".join(line.split()))
    return stages


def copied(target: str) -> list[str]:
    """What a target copies from the repository."""
    return [source for line in dockerfile()[target] if line.startswith("COPY ") for source in line.split()[1:-1]]


def installs(target: str) -> list[str]:
    return [line for line in dockerfile()[target] if line.startswith("RUN pip install")]


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_an_image_installs_torch_first_at_the_version_that_was_tested(target: str) -> None:
    first = installs(target)[0]
    assert "$(grep '^torch==' constraints/requirements.txt)" in first
    assert not re.search(r"torch==\d", first)


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_an_image_installs_the_package_with_one_faiss_under_the_constraints(target: str) -> None:
    *_, last = installs(target)
    assert "-c constraints/requirements.txt" in last
    assert f"'.[{target}]'" in last


def test_the_faiss_of_the_gpu_image_is_pinned_to_the_version_of_the_tested_one() -> None:
    assert f"ARG FAISS_GPU={PINNED['faiss-cpu']}" in dockerfile()["gpu"]
    assert '"faiss-gpu==$FAISS_GPU"' in installs("gpu")[-1]


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_an_image_ends_as_the_user_that_the_manifests_run_as(target: str) -> None:
    users = [line.split()[1] for line in dockerfile()[target] if line.startswith("USER ")]
    assert users == dockerfile()[target][-1].split()[1:]
    for name in MANIFESTS:
        for template in pod_templates(name).values():
            assert users[-1] == str(template["spec"]["securityContext"]["runAsUser"]) != "0"


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_an_image_holds_every_folder_that_jobs_need_and_what_starts_them(target: str) -> None:
    sources = copied(target)
    assert {"jobs", "cxr_retrieval", "tune_spaces", "pyproject.toml"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
    for tool in ("wget", "rsync", "openssh-client"):
        assert tool in dockerfile()["base"][1]


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_what_an_image_copies_is_all_that_reaches_the_build(target: str) -> None:
    rules = [r for r in (ROOT / ".dockerignore").read_text().splitlines() if r and not r.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(copied(target))


def test_the_image_has_the_python_that_the_project_runs_on() -> None:
    [line] = [line for line in dockerfile()["base"] if line.startswith("FROM ")]
    assert line.split()[1] == "python:3.11-slim"


def test_an_image_lets_training_ask_the_hub_for_weights() -> None:
    assert not [line for line in dockerfile()["base"] if "OFFLINE" in line]


# --- the page


def commands() -> list[str]:
    """The command lines in the page's blocks, continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_page_names_only_files_that_exist() -> None:
    named = set(re.findall(r"(?:cluster|docs|jobs|tests|constraints)/[\w./-]+\.\w+", PAGE))
    named |= {f"docs/{target}" for target in re.findall(r"\]\((?!http)([\w./-]+)\)", PAGE)}
    assert {f"cluster/{name}" for name in (*STARTERS, "networkpolicy.yaml", JOBS, REMOVAL)} <= named
    assert "cluster/Dockerfile" in PAGE
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_page_names_only_jobs_and_make_targets_that_exist() -> None:
    modules = set(re.findall(r"python -m ((?:jobs|benchmarks)\.\w+)", PAGE))
    assert "jobs.pipeline" in modules
    for module in modules:
        assert importlib.util.find_spec(module) is not None, module
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z0-9-]+)", PAGE)) <= targets


def test_the_pages_jobs_have_settings_that_the_schema_accepts() -> None:
    found = [line.partition("python -m jobs.")[2].split() for line in commands() if "python -m jobs." in line]
    assert len(found) >= 2
    for words in found:
        job_settings(words[1:])


def test_the_pages_images_are_those_that_the_cluster_files_name() -> None:
    tags = set(re.findall(r"cxr-retrieval:([\w.-]+)", PAGE))
    assert tags == {f"{VERSION}-gpu", f"{VERSION}-cpu"}


def test_the_pages_rates_are_measured_ones_and_its_arithmetic_is_right() -> None:
    performance = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    page = " ".join(PAGE.split())
    rates = re.findall(r"(\d+) images/s", page)
    assert rates
    for rate in rates:
        assert f"{rate} images/s" in performance, f"{rate} images/s is not in docs/performance.md"
    sums = re.findall(r"((?:[\d,.]+ [x/+] )+[\d,.]+) = ([\d,.]*\d)", page)
    assert len(sums) >= 4
    for left, right in sums:
        assert value_of(left) == pytest.approx(float(right.replace(",", "")), rel=0.01), left


def value_of(text: str) -> float:
    """The value of `2 x 4.60 + 0.38`: sums of products and quotients, from left to right."""
    total = 0.0
    for term in text.replace(",", "").split(" + "):
        first, *rest = term.split()
        value = float(first)
        for sign, number in zip(rest[::2], rest[1::2], strict=True):
            value = value * float(number) if sign == "x" else value / float(number)
        total += value
    return total
