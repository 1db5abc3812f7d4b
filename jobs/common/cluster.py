"""Join the Ray cluster that runs this command, or start a local Ray on this machine."""

import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORKER_VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of every worker process: one thread unless a command asks for more; a bound on the kernels that oneDNN
caches for new shapes (with its default of 1024 a training worker grew by 30 MB a step); and one on the wait for a lost
peer."""
SERVE_VARIABLES = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
"""Environment of Ray Serve's controller, which kills a proxy that is not ready after three checks of this length. The
default of 5 s is too short on a busy machine; callers that wait for the proxy then see a dead actor."""


def connect(*, cpus: int | None = None, trains: bool = True) -> None:
    """Join the Ray cluster that RAY_ADDRESS names (as `ray job submit` sets it), else start a local Ray if none runs.

    A local Ray counts at least four logical CPUs, and at least `cpus`, so that trainers and their data workers also
    start on a machine with two cores. It has a dashboard where a command `trains`, which takes four CPU seconds.
    """
    import ray
    import ray.data

    # What Ray Data logs as an error, it also raises; its log would come before the one line that the command prints.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    if ray.is_initialized():
        return
    # Ray's C++ prints an error for every actor pool of Ray Data though nothing is wrong (ray-project/ray#53727).
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    variables, local = dict(WORKER_VARIABLES), dict[str, Any]()
    if not os.environ.get("RAY_ADDRESS"):
        for name, value in SERVE_VARIABLES.items():
            os.environ.setdefault(name, value)  # inherited by Ray's own processes, also for `serve run`
        # A local Ray's workers find the caches and programs that this process finds. DeepSpeed compiles with ninja,
        # which is installed beside this interpreter.
        caches = ("HF_HUB_OFFLINE", "HF_HOME", "GRAFT_CACHE", "TORCH_EXTENSIONS_DIR")
        variables |= {name: os.environ[name] for name in caches if name in os.environ}
        variables["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody announces that this machine will be taken away
        variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        local = {
            "address": "local",
            "num_cpus": max(4, os.cpu_count() or 1, cpus or 0),
            "object_store_memory": 512 * 2**20,
            # Ray Train asks the dashboard whether its controller lives. Without one of its own it would ask another
            # Ray on this machine (port 8265), which does not know the controller, and end the workers.
            "include_dashboard": trains,
            "dashboard_host": "127.0.0.1",
        }
    # Ray refuses a variable that the runtime environment of `ray job submit` sets as well.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    submitted = job.get("runtime_env", {}).get("env_vars", {})
    with _without_log_level_line():
        ray.init(
            log_to_driver=False,  # commands print their own progress; Ray's processes write to its log folder
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {name: value for name, value in variables.items() if name not in submitted}},
            **local,
        )
    data_context = ray.data.DataContext.get_current()
    data_context.enable_progress_bars = False
    data_context.print_on_execution_start = False


@contextlib.contextmanager
def _without_log_level_line() -> Iterator[None]:
    """Drop the line in which Ray's C++ says that RAY_BACKEND_LOG_LEVEL is set; all else on stderr follows the block.

    C++ writes the line to file descriptor 2 before it applies the level, so no level hides it.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            with open(2, "wb", closefd=False) as restored:
                restored.writelines(line for line in file if b"RAY_BACKEND_LOG_LEVEL" not in line)
