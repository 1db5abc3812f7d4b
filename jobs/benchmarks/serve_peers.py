"""graft's service beside other servers on the same clips and threads, with 1, 4 and 16 clients: throughput, latency, word errors."""

import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from graft.audio.clip import encode_flac
from graft.text.wer import score

from ..common.console import quiet_libraries
from ..common.local_service import free_port, running
from .bulk_peers import NO_FASTER_WHISPER, convert_whisper
from .bulk_speech import Labelled, labelled_speech
from .measuring import Findings, Numbers, table
from .processes import alone
from .serve_load import Load, ask_once
from .serve_service import service

CLIENTS = (1, 4, 16)
KIND = "int8"
PEER = f"faster-whisper {KIND}"

ABOUT = f"""\
graft           its service by `serve run`, one engine
faster-whisper  Whisper base converted for CTranslate2, {KIND}, greedy, behind a plain FastAPI server (jobs/benchmarks/serve_peer.py)
Each clip once, by clients that ask again as soon as they are answered; {{threads}} threads each; audio s/s: of speech a second;
CPU: the share of a core that the clients take. Servers and clients share this machine's cores."""
UNTRAINED = (
    "graft is not trained (--model names one that is): its answers have neither words nor an end, so they take longest"
)
NO_SPEACHES = "speaches is left out: no package of that name is on PyPI, and its models come from a hub"


def bench_servers(graft: str, manifests: Sequence[str], *, threads: int, trained: bool) -> Findings:
    """Measure the service, and faster-whisper where it is installed."""
    quiet_libraries()
    speech = labelled_speech(manifests)
    uploads = [encode_flac(one.clip) for one in speech]
    with service(graft, threads=threads) as served:
        loads = {("graft", clients): load for clients, load in _loads(served.url, uploads).items()}
    missing = [NO_SPEACHES] if trained else [UNTRAINED, NO_SPEACHES]
    if importlib.util.find_spec("faster_whisper"):
        with tempfile.TemporaryDirectory() as folder:
            alone(convert_whisper, folder)
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            command = [sys.executable, "-m", "jobs.benchmarks.serve_peer", folder, KIND, str(threads), str(port)]
            with running(command, f"{url}/v1/models", Path(folder, "peer.log")):
                loads |= {(PEER, clients): load for clients, load in _loads(url, uploads).items()}
    else:
        missing.append(NO_FASTER_WHISPER)
    found = {at: _numbers(load, speech, scored=trained or at[0] == PEER) for at, load in loads.items()}
    numbers = {
        f"{name} {clients} {key}": value for (name, clients), values in found.items() for key, value in values.items()
    }
    rows = [[name, f"{clients}", *_cells(values)] for (name, clients), values in found.items()]
    header = ["", "clients", "clips", "failed", "audio s/s", "p50 s", "p95 s", "WER", "CPU"]
    return Findings(numbers, "\n".join([ABOUT.format(threads=threads), table(header, rows), *missing]))


def _loads(url: str, uploads: Sequence[bytes]) -> dict[int, Load]:
    ask_once(url, uploads[:2], clients=1)  # warm
    return {clients: ask_once(url, uploads, clients=clients) for clients in CLIENTS}


def _numbers(load: Load, speech: Sequence[Labelled], *, scored: bool) -> Numbers:
    good = [answer for answer in load.answers if answer.is_good]
    numbers: Numbers = {
        "clips": len(load.answers),
        "failed": load.failed,
        "rtfx": sum(speech[answer.upload].clip.duration_s for answer in good) / load.wall_s,
        "p50_s": load.latency_s(50),
        "p95_s": load.latency_s(95),
        "clients_cpu": load.cpu_share,
    }
    if scored and good:
        numbers["wer"] = score([speech[answer.upload].text for answer in good], [answer.text for answer in good]).wer
    return numbers


def _cells(v: Numbers) -> list[str]:
    wer = f"{v['wer']:.1%}" if "wer" in v else "-"
    return [
        f"{v['clips']}",
        f"{v['failed']}",
        f"{v['rtfx']:.2f}",
        f"{v['p50_s']:.2f}",
        f"{v['p95_s']:.2f}",
        wer,
        f"{v['clients_cpu']:.0%}",
    ]
