# ruff: noqa: N815
"""Check KubeRay's custom resources against the fields, types and values of KubeRay 1.6's API reference (ray.io/v1).

No package holds KubeRay's schemas. kubernetes-validate holds those of pods, so a pod template is any mapping here.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """Part of a resource: no other fields, no values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Metadata(Part):
    name: str = Field(pattern=r"^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$")  # KubeRay makes longer names of it
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class AuthOptions(Part):
    mode: Literal["disabled", "token"] = "token"
    secretName: str | None = None


class AutoscalerOptions(Part):
    version: Literal["v1", "v2"] | None = None
    idleTimeoutSeconds: int | None = Field(default=None, ge=0)
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    image: str | None = None
    resources: dict[str, dict[str, str]] = {}


class Group(Part):
    rayStartParams: dict[str, str]
    template: dict[str, Any]
    resources: dict[str, str] = {}
    labels: dict[str, str] = {}


class WorkerGroup(Group):
    groupName: str
    replicas: int = Field(default=0, ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=0)
    numOfHosts: int = 1


class RayClusterSpec(Part):
    rayVersion: str
    authOptions: AuthOptions | None = None
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: AutoscalerOptions | None = None
    headGroupSpec: Group
    workerGroupSpecs: list[WorkerGroup] = []


class RayJobSpec(Part):
    entrypoint: str
    runtimeEnvYAML: str | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    backoffLimit: int = Field(default=0, ge=0)
    activeDeadlineSeconds: int | None = Field(default=None, gt=0)
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: int = Field(default=0, ge=0)
    suspend: bool = False
    rayClusterSpec: RayClusterSpec


class UpgradeStrategy(Part):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]


class RayServiceSpec(Part):
    serveConfigV2: str
    upgradeStrategy: UpgradeStrategy | None = None
    excludeHeadPodFromServeSvc: bool = False
    rayClusterDeletionDelaySeconds: int | None = Field(default=None, ge=0)
    rayClusterConfig: RayClusterSpec


class Resource(Part):
    apiVersion: Literal["ray.io/v1"]
    metadata: Metadata


class RayJob(Resource):
    kind: Literal["RayJob"]
    spec: RayJobSpec


class RayService(Resource):
    kind: Literal["RayService"]
    spec: RayServiceSpec


KINDS: dict[str, type[RayJob] | type[RayService]] = {"RayJob": RayJob, "RayService": RayService}
