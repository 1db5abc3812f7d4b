"""Kubernetes' Pod Security Standard "restricted", evaluated on the spec of a pod.

Source: kubernetes.io/docs/concepts/security/pod-security-standards, which includes the standard "baseline".
"""

from collections.abc import Iterator
from typing import Any

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_syncookies",
}
SELINUX_TYPES = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}

Json = dict[str, Any]


def violations(pod: Json) -> Iterator[str]:
    """Yield what the standard does not allow, a phrase each."""
    yield from (key for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key))
    for volume in pod.get("volumes", []):
        if kinds := volume.keys() - {"name"} - VOLUMES:
            yield f"volume {volume['name']}: {', '.join(kinds)}"
    own = pod.get("securityContext", {})
    yield from (f"sysctl {one['name']}" for one in own.get("sysctls", []) if one["name"] not in SYSCTLS)
    yield from (f"pod: {phrase}" for phrase in _context_violations(own))
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for container in pod.get(kind, []):
            yield from (f"{container['name']}: {phrase}" for phrase in _container_violations(container, own))


def _container_violations(container: Json, pod: Json) -> Iterator[str]:
    """Check a container; `pod` is the pod's own security context, which holds where the container's says nothing."""
    own = container.get("securityContext", {})
    yield from _context_violations(own)
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []):
        yield "capabilities are not dropped"
    if added := set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield f"capabilities are added: {', '.join(sorted(added))}"
    if own.get("privileged"):
        yield "privileged"
    if own.get("procMount", "Default") != "Default":
        yield "procMount"
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot is not true"
    if own.get("seccompProfile", pod.get("seccompProfile", {})).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "seccompProfile is not RuntimeDefault"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield "hostPort"
    handlers = [container.get(name, {}) for name in ("livenessProbe", "readinessProbe", "startupProbe")]
    handlers += container.get("lifecycle", {}).values()
    if any(handler.get(kind, {}).get("host") for handler in handlers for kind in ("httpGet", "tcpSocket")):
        yield "host of a probe"


def _context_violations(context: Json) -> Iterator[str]:
    """Check what a pod and a container may both say."""
    if context.get("runAsUser") == 0:
        yield "runAsUser is 0"
    if context.get("windowsOptions", {}).get("hostProcess"):
        yield "hostProcess"
    if context.get("appArmorProfile", {}).get("type") == "Unconfined":
        yield "appArmorProfile is Unconfined"
    selinux = context.get("seLinuxOptions", {})
    if selinux.get("type") not in SELINUX_TYPES or selinux.get("user") or selinux.get("role"):
        yield "seLinuxOptions"
