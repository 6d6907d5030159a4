"""Submitters start jobs from the chart's templates and nothing else: the policy in an API server decides.

Runs against the cluster of the other tests, or against an API server without a node.
"""

from __future__ import annotations

import copy
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from tests.support.charts.chart_tool import ENVIRONMENTS, NEEDED, Document, documents, helm_template, merged
from tests.support.charts.kubernetes_schemas import crd_file
from tests.support.cluster.bare_api_server import bare_api_server, missing_program, running_process
from tests.support.cluster.kubectl import NODE, Kubectl
from tests.support.e2e.wait_until import until

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.ray_job import PATH, RayJobs
from reelway.platform.cluster.ray_job_status import JobState
from reelway.platform.cluster.ray_job_template import JobKind, JobRequest, find_template
from reelway.platform.errors import KubernetesError

pytestmark = pytest.mark.cluster

ENGINEER: Final = "engineer"
ACTIVE_S: Final = 30.0
"""A new policy takes effect once the server's informers have it."""
HEAD: Final = "spec.rayClusterSpec.headGroupSpec"
WORKERS: Final = "spec.rayClusterSpec.workerGroupSpecs.0"
SUBMITTER: Final = "spec.submitterPodTemplate"
KEY: Final = {"name": "key", "secret": {"secretName": "signing"}}
FROM_SECRET: Final = {"name": "X", "valueFrom": {"secretKeyRef": {"name": "reelway-secrets", "key": "auth_token"}}}
OLDER: Final = {"apiVersion": "ray.io/v1alpha1"}
SHELL: Final = {"postStart": {"exec": {"command": ["sh", "-c", "id"]}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Kubeconfig of an administrator."""
    own = NODE / "state" / "admin.kubeconfig"
    if own.exists():
        yield own
        return
    if missing := missing_program():
        pytest.skip(f"{missing} is missing")
    with bare_api_server(tmp_path_factory.mktemp("api-server")) as kubeconfig:
        yield kubeconfig


class Installation:
    """The chart's objects for jobs in one namespace, and clients with the tokens of its users."""

    def __init__(self, admin: Kubectl, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.admin, self._folder, self._monkeypatch = admin, folder, monkeypatch

    def install(self, release: str = "rw") -> None:
        """Applies what concerns jobs. The chart's other objects need CRDs that a bare server does not have."""
        subject = {"kind": "ServiceAccount", "name": ENGINEER, "namespace": self.admin.namespace}
        jobs = {
            "signingSecret": "signing", "submitters": [subject], "allowedImages": ["reg.test:5000/ml/training:*"],
            "dataset": {"enabled": True},
        }  # fmt: skip
        done = helm_template(
            merged(NEEDED, {"jobs": jobs, "fullnameOverride": f"{release}-reelway"}), ENVIRONMENTS / "dev.yaml",
            arguments=("--namespace", self.admin.namespace), release=release,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        for one in documents(done.stdout):
            labels = one["metadata"].get("labels", {})
            if labels.get("reelway.dev/component") == "jobs" and one["kind"] not in ("RayJob", "CronJob"):
                self.admin.apply(one)

    def client(self, account: str) -> KubeApi:
        """A client with the token of a ServiceAccount."""
        self._monkeypatch.setenv("KUBECONFIG", str(self._kubeconfig(account)))
        return KubeApi(self.admin.namespace)

    def kubectl(self, account: str) -> Kubectl:
        return Kubectl(self.admin.program, self._kubeconfig(account), self.admin.namespace)

    def _kubeconfig(self, account: str) -> Path:
        token = self.admin.run("create", "token", account).strip()
        config = yaml.safe_load(self.admin.kubeconfig.read_text())
        config["users"] = [{"name": "one", "user": {"token": token}}]
        for context in config["contexts"]:
            context["context"]["user"] = "one"
        path = self._folder / f"{account}.kubeconfig"
        path.write_text(yaml.safe_dump(config))
        return path

    def template(self, kind: JobKind, release: str = "rw") -> Document:
        maps = json.loads(self.admin.run("get", "configmaps", "-o", "json"))["items"]
        return find_template([one for one in maps if one["metadata"]["name"].endswith("-jobs")], kind, release)


@pytest.fixture(scope="module")
def installation(server: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    program = shutil.which("kubectl") or str(NODE / "bin" / "kubectl")
    admin = Kubectl(program, server, f"reelway-test-{uuid.uuid4().hex[:8]}")
    with pytest.MonkeyPatch.context() as monkeypatch:
        if "rayjobs.ray.io" not in admin.run("get", "crds", "-o", "name"):
            admin.run("apply", "--server-side", "-f", str(crd_file("rayjobs")))
            until("RayJobs are known", lambda: "rayjobs" in admin.run("api-resources", "--api-group=ray.io"), ACTIVE_S)
        admin.run("create", "namespace", admin.namespace)
        made = Installation(admin, tmp_path_factory.mktemp("users"), monkeypatch)
        try:
            admin.run("create", "serviceaccount", ENGINEER)
            made.install()
            job = changed(made.template(JobKind.TRAIN), "spec.entrypoint", "id")
            wait_until_refused(made.client(ENGINEER), job, "spec.entrypoint")
            yield made
        finally:
            admin.run("delete", "rayjobs", "--all", "--wait=false")
            for kind in ("validatingadmissionpolicybinding", "validatingadmissionpolicy"):
                admin.run("delete", kind, "-l", "app.kubernetes.io/part-of=reelway")
            admin.run("delete", "namespace", admin.namespace, "--wait=false")


def wait_until_refused(client: KubeApi, job: Document, message: str) -> None:
    """Creates the job until the server refuses it with this message. A new policy takes effect after a moment."""

    def refused() -> bool:
        try:
            made = client.create(PATH, job)
        except KubernetesError as error:
            return message in str(error)
        client.delete(f"{PATH}/{made['metadata']['name']}")
        return False

    until(f"the job is refused: {message}", refused, ACTIVE_S)


@pytest.fixture
def engineer(installation: Installation) -> KubeApi:
    return installation.client(ENGINEER)


def changed(job: Document, path: str, value: Any) -> Document:
    """A copy with another value at a dotted path. A function makes it of the old value; None removes the field."""
    copied: Document = copy.deepcopy(job)
    at: Any = copied
    *parents, last = path.replace("\\.", "\0").split(".")
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at.setdefault(part.replace("\0", "."), {})
    key: Any = int(last) if isinstance(at, list) else last.replace("\0", ".")
    if value is None:
        del at[key]
    else:
        at[key] = value(at.get(key)) if callable(value) else value
    return copied


def plus(one: Any) -> Callable[[Any], Any]:
    """Appends to a list that may be missing."""
    return lambda old: [*(old or ()), one]


REFUSED: Final[list[tuple[str, Any, str]]] = [
    # Account, secrets, volumes.
    (f"{HEAD}.template.spec.serviceAccountName", "rw-reelway-operator", "template.spec.serviceAccountName"),
    (f"{SUBMITTER}.spec.serviceAccountName", "default", "submitterPodTemplate.spec.serviceAccountName"),
    (f"{WORKERS}.template.spec.serviceAccountName", None, "workerGroupSpecs[0].template.spec.serviceAccountName"),
    (f"{HEAD}.template.spec.automountServiceAccountToken", True, "spec.automountServiceAccountToken"),
    (f"{HEAD}.template.spec.automountServiceAccountToken", None, "spec.automountServiceAccountToken"),
    (f"{HEAD}.template.spec.volumes", plus(KEY), "headGroupSpec.template.spec.volumes"),
    (f"{WORKERS}.template.spec.volumes", plus({"name": "n", "hostPath": {"path": "/"}}), "template.spec.volumes"),
    (f"{HEAD}.template.spec.containers.0.volumeMounts.1.mountPath", "/opt", "containers[0].volumeMounts"),
    (f"{HEAD}.template.spec.containers.0.env", plus(FROM_SECRET), "containers[0].env"),
    (f"{SUBMITTER}.spec.containers.0.env", plus({"name": "LD_PRELOAD", "value": "/x.so"}), "containers[0].env"),
    (f"{HEAD}.template.spec.containers.0.envFrom", [{"secretRef": {"name": "signing"}}], "containers[0].envFrom"),
    (f"{HEAD}.template.spec.imagePullSecrets", [{"name": "signing"}], "spec.imagePullSecrets"),
    # Pod security and other programs.
    (f"{HEAD}.template.spec.hostNetwork", True, "spec.hostNetwork"),
    (f"{HEAD}.template.spec.securityContext.runAsUser", 0, "spec.securityContext"),
    (f"{HEAD}.template.spec.securityContext", None, "spec.securityContext"),
    (f"{WORKERS}.template.spec.containers.0.securityContext.privileged", True, "containers[0].securityContext"),
    (f"{HEAD}.template.spec.initContainers", [{"name": "a", "image": "a"}], "spec.initContainers"),
    (f"{HEAD}.template.spec.containers", plus({"name": "b", "image": "b"}), "one container each"),
    (f"{HEAD}.template.spec.containers.0.command", ["sh"], "containers[0].command"),
    (f"{SUBMITTER}.spec.containers.0.command", ["sh", "-c"], "containers[0].command"),
    (f"{HEAD}.template.spec.containers.0.lifecycle", SHELL, "containers[0].lifecycle"),
    (f"{HEAD}.template.spec.containers.0.args", ["id"], "args"),
    (f"{HEAD}.template.spec.containers.0.resources.claims", [{"name": "x"}], "one container each"),
    (f"{HEAD}.template.spec.nodeSelector", {"a": "b"}, "spec.nodeSelector"),
    (f"{HEAD}.template.spec.priorityClassName", "system-node-critical", "spec.priorityClassName"),
    (f"{HEAD}.template.metadata.annotations", {"a": "b"}, "template.metadata"),
    (f"{HEAD}.template.metadata.labels.reelway\\.dev/component", "serving", "template.metadata"),
    (f"{HEAD}.template.spec.containers.0.image", "evil.test/training:1", "evil.test/training:1"),
    (f"{SUBMITTER}.spec.containers.0.image", "reg.test:5000/ml/training-evil:1", "jobs.allowedImages"),
    (f"{WORKERS}.template.spec.containers.0.image", "reg.test:5000/ml/training:1/evil", "jobs.allowedImages"),
    (f"{WORKERS}.template.spec.containers.0.image", "xreg.test:5000/ml/training:1", "jobs.allowedImages"),
    # The command.
    ("spec.entrypoint", "python -c 'print(1)'", "spec.entrypoint"),
    ("spec.entrypoint", "reelway train", "spec.entrypoint"),
    ("spec.entrypoint", "reelway trainer --run x", "spec.entrypoint"),
    ("spec.entrypoint", "reelway release build --run x", "spec.entrypoint"),
    ("spec.entrypoint", "reelway train --run x; id", "spec.entrypoint"),
    ("spec.entrypoint", "reelway train --run x\nid", "spec.entrypoint"),
    ("spec.entrypoint", "reelway train --run x && id", "spec.entrypoint"),
    ("spec.entrypoint", "reelway train --run $(id)", "spec.entrypoint"),
    ("spec.entrypoint", "reelway train --run `id`", "spec.entrypoint"),
    ("spec.entrypoint", 'reelway train --run "$(id)"', "spec.entrypoint"),
    ("spec.entrypoint", "reelway train --run 'a'$(id)'b'", "spec.entrypoint"),
    ("spec.entrypoint", "reelway train --run x > /tmp/x", "spec.entrypoint"),
    (f"{SUBMITTER}.spec.containers.0.args", ["reelway train --run y"], "args"),
    (f"{HEAD}.rayStartParams.dashboard-host", "0.0.0.0; id", "rayStartParams.dashboard-host"),
    (f"{HEAD}.rayStartParams.num-cpus", "0; id", "num-cpus"),
    (f"{HEAD}.rayStartParams.temp-dir", "/var/lib/reelway/volume", "rayStartParams.temp-dir"),
    (f"{WORKERS}.rayStartParams.num-cpus", "0; id", "num-cpus"),
    # What KubeRay would do with the job.
    ("metadata.generateName", "rw-reelway-topics-", "metadata.name"),
    ("metadata.name", "rw-reelway-router", "metadata.name"),
    ("spec.runtimeEnvYAML", "pip: [evil]", "spec.runtimeEnvYAML"),
    ("spec.clusterSelector", {"ray.io/cluster": "rw-reelway"}, "spec.clusterSelector"),
    ("spec.submissionMode", "SidecarMode", "spec.submissionMode"),
    ("spec.entrypointNumCpus", 1.5, "spec.entrypointNumCpus"),
    ("spec.activeDeadlineSeconds", 99999999, "spec.activeDeadlineSeconds"),
    ("spec.rayClusterSpec.authOptions.mode", "disabled", "spec.rayClusterSpec.authOptions"),
    ("spec.rayClusterSpec.authOptions", None, "spec.rayClusterSpec.authOptions"),
    ("spec.rayClusterSpec.authOptions.secretName", "reelway-secrets", "spec.rayClusterSpec.authOptions"),
    ("spec.rayClusterSpec.enableInTreeAutoscaling", True, "spec.rayClusterSpec.enableInTreeAutoscaling"),
    (f"{HEAD}.headService", {"metadata": {"name": "rw-reelway-router"}}, "headGroupSpec.headService"),
    (f"{HEAD}.serviceType", "NodePort", "headGroupSpec.serviceType"),
    ("spec.rayClusterSpec.workerGroupSpecs", lambda old: [*old, *old], "one worker group"),
    ("spec.rayClusterSpec.workerGroupSpecs", [], "one worker group"),
    (SUBMITTER, None, "submitter"),
    ("metadata.annotations", {"ray.io/overwrite-container-cmd": "true"}, "metadata.annotations.ray.io/overwrite"),
    ("metadata.labels.ray\\.io/x", "y", "metadata.labels.ray.io/x"),
    ("metadata.labels.reelway\\.dev/job", "other", "label reelway.dev/job"),
    ("metadata.labels.reelway\\.dev/job", "release", "metadata.name"),
    ("metadata.labels.app\\.kubernetes\\.io/instance", "zzz", "label app.kubernetes.io/instance"),
    ("metadata.labels", None, "label app.kubernetes.io/instance"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=[f"{i}-{one[0]}" for i, one in enumerate(REFUSED)])
def test_job_that_leaves_the_template_is_refused(
    installation: Installation, engineer: KubeApi, path: str, value: Any, message: str
) -> None:
    job = changed(installation.template(JobKind.TRAIN), path, value)
    if path == "spec.entrypoint":
        job = changed(job, f"{SUBMITTER}.spec.containers.0.args", [value.replace("$", "$$")])
    with pytest.raises(KubernetesError) as refused:
        engineer.create(PATH, job)
    assert "ValidatingAdmissionPolicy" in str(refused.value)
    assert message in str(refused.value)


@pytest.mark.parametrize("kind", JobKind)
def test_submitter_starts_every_kind_with_every_option(installation: Installation, kind: JobKind) -> None:
    jobs = RayJobs(installation.client(ENGINEER))
    plain = jobs.submit(JobRequest(kind), "rw")
    jobs.delete(plain.name)
    request = JobRequest(
        kind, run=f"try-{kind}", workers=2, gpus=1, cpus="8", memory="64Gi", queue="night", ttl_s=60, backoff_limit=3,
        tolerations=("gpu=yes:NoSchedule", "spot"), image="reg.test:5000/ml/training:try-1",
        arguments=("--set", "two_tower.dim=64", "--waive", "coverage=first week; it's $new $(id) \"x\"", "a\nb"),
    )  # fmt: skip
    job = jobs.submit(request, "rw")
    assert "it'\"'\"'s $new" in job.command
    jobs.stop(job.name)
    jobs.delete(job.name)


def test_cron_jobs_create_the_templates(installation: Installation) -> None:
    creator = installation.client("rw-reelway-job-creator")
    for kind in JobKind:
        made = creator.create(PATH, installation.template(kind))
        creator.delete(f"{PATH}/{made['metadata']['name']}")


def test_older_api_version_is_refused_likewise(installation: Installation) -> None:
    job = changed(installation.template(JobKind.TRAIN), "spec.entrypoint", "id")
    said = installation.kubectl(ENGINEER).run(
        "create", "--validate=false", "-f", "-", stdin=json.dumps(job | OLDER), code=1
    )
    assert "fields that differ from the template" in said  # this version lacks fields of the template


@contextmanager
def running_job(installation: Installation) -> Iterator[str]:
    jobs = RayJobs(installation.client(ENGINEER))
    job = jobs.submit(JobRequest(JobKind.TRAIN, run="updates"), "rw")
    try:
        yield job.name
    finally:
        RayJobs(installation.client(ENGINEER)).delete(job.name)


def test_existing_job_can_be_stopped_and_not_changed(installation: Installation) -> None:
    with running_job(installation) as name:
        engineer = installation.client(ENGINEER)
        for patch in (
            {"spec": {"entrypoint": "id"}},
            {"spec": {"runtimeEnvYAML": "pip: [evil]"}},
            {"spec": {"ttlSecondsAfterFinished": 5}},
            {"metadata": {"labels": {"reelway.dev/job": "release"}}},
            {"metadata": {"annotations": {"ray.io/overwrite-container-cmd": "true"}}},
        ):
            with pytest.raises(KubernetesError, match="submit another one"):
                engineer.patch(f"{PATH}/{name}", patch)
        engineer.patch(f"{PATH}/{name}", {"spec": {"suspend": True}})


def test_controllers_are_not_restricted(installation: Installation) -> None:
    """KubeRay, and Kueue, which adds node selectors and labels of its own to a job that it admits."""
    admin = installation.admin
    admin.run("create", "serviceaccount", "kueue")
    rules = [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "patch"]},
        {"apiGroups": ["ray.io"], "resources": ["rayjobs/status"], "verbs": ["update"]},
    ]
    admin.apply({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "kueue"}, "rules": rules,
    })  # fmt: skip
    admin.run("create", "rolebinding", "kueue", "--role=kueue", f"--serviceaccount={admin.namespace}:kueue")
    with running_job(installation) as name:
        kueue = installation.client("kueue")
        kueue.patch(f"{PATH}/{name}", {"spec": {"suspend": True, "ttlSecondsAfterFinished": 7}})
        kueue.patch(f"{PATH}/{name}", {"metadata": {"labels": {"kueue.x-k8s.io/podset": "head"}}})


def test_second_installation_has_submitters_of_its_own(installation: Installation) -> None:
    """Each installation has a policy, and a job of one has to pass the policies of all."""
    admin = installation.admin
    installation.install("second")
    admin.run("delete", "rolebinding", "second-reelway-submitters")
    job, engineer = installation.template(JobKind.TRAIN, "second"), installation.client(ENGINEER)
    with pytest.raises(KubernetesError, match=r"label app\.kubernetes\.io/instance: saw 'second'"):
        engineer.create(PATH, job)
    account = f"--serviceaccount={admin.namespace}:{ENGINEER}"
    admin.run("create", "rolebinding", "both", "--role=second-reelway-submitters", account)
    wait_until_refused(engineer, changed(job, "spec.entrypoint", "id"), "spec.entrypoint")
    made = engineer.create(PATH, job)
    engineer.delete(f"{PATH}/{made['metadata']['name']}")


@pytest.fixture
def kuberay(server: Path, installation: Installation, tmp_path: Path) -> Iterator[None]:
    """KubeRay's operator for the namespace. Without kubelets its pods stay pending."""
    program = NODE / "bin" / "ray-operator"
    if server == NODE / "state" / "admin.kubeconfig":
        yield  # `make cluster` runs one
        return
    if not program.exists():
        pytest.skip(f"{program} is missing (`make cluster-tools`)")
    admin = installation.admin
    admin.run("apply", "--server-side", "--force-conflicts", "-f", str(crd_file("rayjobs").parent))
    command = [
        str(program), "--metrics-addr=0", "--health-probe-bind-address=0", "--enable-leader-election=false",
        f"--watch-namespace={admin.namespace}",
    ]  # fmt: skip
    environment = {"KUBECONFIG": str(server), "POD_NAMESPACE": admin.namespace}
    with running_process(tmp_path, "ray-operator", command, environment):
        yield


@pytest.mark.usefixtures("kuberay")
def test_kuberay_creates_a_token_for_each_job(installation: Installation) -> None:
    jobs, admin = RayJobs(installation.client(ENGINEER)), installation.admin
    names = [jobs.submit(JobRequest(JobKind.EVALUATE, run=f"token-{index}"), "rw").name for index in range(2)]

    def heads() -> list[Document]:
        found = json.loads(admin.run("get", "pods", "-l", "ray.io/node-type=head", "-o", "json"))["items"]
        return [one for one in found if one["metadata"]["labels"]["reelway.dev/job"] == JobKind.EVALUATE]

    until("each job has a head", lambda: len(heads()) == len(names), ACTIVE_S)
    tokens = set()
    for head in heads():
        environment = {one["name"]: one for one in head["spec"]["containers"][0]["env"]}
        secret = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert secret["name"] == head["metadata"]["labels"]["ray.io/cluster"]
        tokens.add(json.loads(admin.run("get", "secret", secret["name"], "-o", "json"))["data"][secret["key"]])
    assert len(tokens) == len(names)
    for name in names:
        jobs.stop(name)
        until(f"{name} is stopped", lambda name=name: jobs.get(name).state is JobState.STOPPED, ACTIVE_S)  # type: ignore[misc]
        jobs.delete(name)
