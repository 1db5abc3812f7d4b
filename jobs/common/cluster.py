"""Join the cluster that runs this job, or start a Ray of its own on this machine."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

WORKER_VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What every worker process needs: one thread unless a job asks for more, a bound on what PyTorch's CPU kernels keep of each new shape
(with oneDNN's own of 1024, a training worker grew by 30 MB a step), and one on waiting for a lost peer."""
SERVE_VARIABLES = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
"""What Ray Serve's controller needs where cores have more to do: after three times 5 s it kills a proxy that still starts, and who
waits for that proxy hears of a dead actor."""


def connect(*, cpus: int | None = None) -> None:
    """Join the Ray cluster named by RAY_ADDRESS (as under `ray job submit`) or start a local one; do nothing where Ray already runs.

    A local Ray counts at least four logical CPUs, and at least `cpus`, so that trainers and their feature workers also start on a machine
    with two cores.
    """
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    # Jobs print their own progress; what Ray's processes print stays in Ray's log folder.
    is_joining = bool(os.environ.get("RAY_ADDRESS"))
    variables = WORKER_VARIABLES | ({} if is_joining else _paths_of_this_machine())
    variables = {name: value for name, value in variables.items() if name not in _submitted_variables()}
    settings: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": variables},
    }
    if is_joining:
        ray.init(**settings)
    else:
        for name, value in SERVE_VARIABLES.items():
            os.environ.setdefault(
                name, value
            )  # Ray's own processes have it from this one, so that it holds for `serve run` as well
        ray.init(
            address="local",
            num_cpus=max(4, os.cpu_count() or 1, cpus or 0),
            object_store_memory=512 * 2**20,
            # Ray Train asks the dashboard whether its controller lives; without one of its own it would ask another Ray on this machine
            # (port 8265), hear that it does not know the controller, and end the workers.
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            **settings,
        )
    data_context = ray.data.DataContext.get_current()
    data_context.enable_progress_bars = False
    data_context.print_on_execution_start = False


def _paths_of_this_machine() -> dict[str, str]:
    """Where a local Ray's workers find what this process finds; another machine's folders may be others."""
    names = ("HF_HUB_OFFLINE", "HF_HOME", "GRAFT_CACHE", "TORCH_EXTENSIONS_DIR")
    # DeepSpeed compiles with ninja, which stands beside this interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {"PATH": path, **{name: os.environ[name] for name in names if name in os.environ}}


def _submitted_variables() -> set[str]:
    """The env_vars of `ray job submit`'s runtime environment: they win, and Ray refuses to be told one twice."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return set(job.get("runtime_env", {}).get("env_vars", {}))
