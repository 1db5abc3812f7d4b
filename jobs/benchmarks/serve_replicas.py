"""One engine, then two, then one again, as load comes and goes: how long it takes, and that no request fails."""

import tempfile
import threading
import time
from pathlib import Path

from ..common.console import quiet_libraries
from .bulk_speech import write_archive
from .measuring import Findings, Numbers, list_numbers
from .serve_load import ask_for
from .serve_service import Service, service

CLIP_S = 5.0
FEW, MANY = 1, 16
PATIENCE_S = 300.0

ABOUT = f"""\
clips of {CLIP_S:g} s; {FEW} client, then {MANY}, then {FEW} again; an engine for each 4 chunks in hand, at most two;
upscale_delay_s 2, downscale_delay_s 10; seconds from the change of load to the change of engines"""


def bench_replicas(graft: str, *, threads: int, seconds: float) -> Findings:
    """Measure a load step, each part of it at least so long."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        uploads = [path.read_bytes() for path in write_archive(Path(folder, "clips"), 16, seconds=CLIP_S)]
    settings = {
        "threads": threads,
        "max_replicas": 2,
        "max_ongoing_chunks": 8,
        "upscale_delay_s": 2,
        "downscale_delay_s": 10,
    }
    with service(graft, **settings) as served:
        few, _ = _loaded(served, uploads, FEW, engines=1, seconds=seconds)
        many, up_s = _loaded(served, uploads, MANY, engines=2, seconds=seconds)
        few_again, down_s = _loaded(served, uploads, FEW, engines=1, seconds=seconds)
    numbers: Numbers = {"up_s": up_s, "down_s": down_s, "answers": len(few + many + few_again)}
    numbers["failed"] = sum(status != 200 for status in few + many + few_again)
    return Findings(numbers, f"{ABOUT}\n{list_numbers(numbers)}")


def _loaded(
    served: Service, uploads: list[bytes], clients: int, *, engines: int, seconds: float
) -> tuple[list[int], float]:
    """Load the service until so many engines are up, at least for so long; the answers' statuses, and when that was."""
    statuses: list[int] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            statuses.extend(
                answer.status for answer in ask_for(served.url, uploads, clients=clients, seconds=seconds).answers
            )

    asking = threading.Thread(target=ask)
    start = time.perf_counter()
    asking.start()
    while served.engines() != engines and time.perf_counter() < start + PATIENCE_S:
        time.sleep(0.5)
    seen_s = time.perf_counter() - start if served.engines() == engines else float("nan")
    over.set()
    asking.join()
    return statuses, seen_s
