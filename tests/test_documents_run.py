"""The pages' commands and programs are executed, each where ROADS says; some need what a test machine has not.

Every command takes one road. Cheap ones and the requests to the service are executed with the fast tests; whole pages
are walked through with the slow ones, in their order, in a folder with the files that they name.
"""

import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from tests.support import media, spoken_words, tiny_models
from tests.support.cluster import free_ports
from tests.support.documents import PAGES, Page, shown_recipe
from tests.support.paths import ROOT
from tests.test_documents import graft_command

PROMPTS = ROOT / "jobs" / "data" / "prompts"
SERVICE, ARCHIVES = Page("serve/README.md"), Page("jobs/ARCHIVES.md")

FAST, ASKED, SERVED, WALKED = "in this process", "to a service of tiny models", "as a service", "on its page's walk"
ROADS = {
    # a pattern of commands -> how they are executed, or why they are not; the first that matches counts
    r"small-weights|speech/|runs/small/": "no: it takes hours, and its speech is not in the repository",
    r"--plan\b|^graft prepare |^graft(?: --version)?$|^graft \w+ --help$|^graft schema \w+$|^python -m jobs$": FAST,
    r"\b(?:s3|hf|https?)://|/shared/|/outputs/|example\.com": "no: it needs a bucket, the hub or a cluster",
    r"gpu=true|gpus_per_\w+=[1-9]|-7b|-2b|text_base=Qwen|engine=vllm": "no: it needs GPUs and checkpoints from the hub",
    r"^(?:docker|kubectl|helm|ssh|ray|serve) ": "no: tests/cluster and tests/serve/test_deploy.py run what it starts",
    r"^(?:graft submit|python -m jobs\.submit) ": "no: tests/jobs/test_submit_jobs.py sends every job to a cluster",
    r"^(?:graft bench|python -m jobs\.bench) ": "no: it takes idle cores; tests/jobs/benchmarks run its parts",
    r"^(?:graft ablate|python -m jobs\.ablate) ": "no: it takes hours; tests/jobs/test_ablate.py trains tiny models",
    r"^(?:graft demo|python -m jobs\.demo)|^make ": "no: continuous integration runs it",
    r"^(?:apt|cd|eval|export|git|pip|\.) ": "no: it changes the shell or the machine",
    r"^graft (?:score|report) refs": FAST,
    r"^curl ": ASKED,
    r"^graft serve ": SERVED,
    r"^(?:graft|python -m jobs\.)": WALKED,
}


def road(command: str) -> str:
    """Return how a command is executed; "" if ROADS does not say. Variables that are set before it do not matter."""
    bare = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command)
    return next((road for pattern, road in ROADS.items() if re.search(pattern, bare)), "")


def commands_on(*roads: str) -> list[Any]:
    found = [(page.name, command) for page in PAGES for command in page.commands() if road(command) in roads]
    return [pytest.param(command, id=f"{page}: {command:.60}") for page, command in found]


def test_every_command_takes_a_road() -> None:
    assert not [command for page in PAGES for command in page.commands() if not road(command)]


# The folder in which the pages' commands run


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages name."""
    home = tmp_path_factory.mktemp("pages")
    prompts = {path.stem: path for path in media.PROMPTS}
    (short, longer), sound = media.SHORTEST_FIRST[4:6], media.speech(16_000, seconds=12.0)
    copies = {"a.flac": short, "b.flac": longer, "my/folder/one.flac": short, "talks/b/two.flac": longer}
    for name, source in copies.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, home / name)
    (home / "interview.mp3").write_bytes(media.encode(sound[:, :1], 16_000, "libmp3lame", "mp3"))
    shutil.copy(home / "interview.mp3", home / "talks" / "b" / "three.mp3")
    (home / "more.txt").write_text("# a list\nb.flac\n")
    (home / "calls").mkdir()
    soundfile.write(home / "calls" / "call.wav", sound, 16_000)
    lines = [json.loads(line) for line in (PROMPTS / "train.jsonl").read_text().splitlines()]
    for line in lines:
        line["audio"] = str(prompts[line["id"]])
    _write_lines(home / "my" / "manifest.jsonl", lines)
    _write_lines(home / "my" / "unlabelled.jsonl", [{**line, "text": ""} for line in lines[:3]])
    rows = [{"audio": {"bytes": path.read_bytes(), "path": path.name}, "lang": "en"} for path in (short, longer)]
    pq.write_table(pa.Table.from_pylist(rows), home / "data.parquet")
    _write_sources(home, lines)
    for name in ("refs", "graft", "whisper"):
        texts = [{"id": line["id"], "text": line["text"], "source": "prompts"} for line in lines[:3]]
        _write_lines(home / f"{name}.jsonl", texts)
    (home / "jobs").symlink_to(ROOT / "jobs")
    return home


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_sources(home: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write the manifests of the recipe my-data.yaml of jobs/README.md, and that recipe as it stands there."""
    _write_lines(home / "calls.jsonl", lines[20:])
    for split, part in {"train": lines[:8], "dev": lines[8:12]}.items():
        (home / "cv" / "clips").mkdir(parents=True, exist_ok=True)
        for line in part:
            shutil.copy(line["audio"], home / "cv" / "clips")
        rows = [f"{line['speaker']}\t{Path(line['audio']).name}\t{line['text']}" for line in part]
        (home / "cv" / f"{split}.tsv").write_text("\n".join(["client_id\tpath\tsentence", *rows, ""]))
    table = [["id", "file", "words", "language"]]
    for line, language in zip(lines[12:20], ["en", "de"] * 4, strict=True):
        table.append([line["id"], line["audio"], line["text"], language])
    with (home / "other.csv").open("w", newline="") as file:
        csv.writer(file).writerows(table)
    (home / "my-data.yaml").write_text(shown_recipe())


@pytest.fixture
def workspace(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template that is the working folder."""
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "pages", symlinks=True))
    return Path.cwd()


def run_command(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command of graft in this process; returns its exit code."""
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        variable, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(variable, value)
    arguments = graft_command(words)
    assert arguments is not None
    from jobs.__main__ import main

    try:
        return main(arguments)
    except SystemExit as end:  # of --help
        return int(end.code or 0)


@pytest.mark.parametrize("command", commands_on(FAST))
def test_cheap_commands(
    command: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(command, monkeypatch) == 0, capsys.readouterr().err
    assert len(capsys.readouterr().out) > 10
    if found := re.search(r"\bout=(\S+)", command):
        assert any(Path(found[1]).iterdir()) == ("--plan" not in command)


# The service


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service of tiny models under the name that the pages give it, with an aligner."""
    from graft.inference.transcriber import open_transcriber
    from serve.backends.local import LocalBackend
    from tests.support.http_service import open_decoder, serve_api

    folder = tmp_path_factory.mktemp("service")
    aligner = spoken_words.save_ctc(folder / "ctc", spoken_words.VOCABULARY)
    transcriber = open_transcriber(tiny_models.save_tiny_graft(folder / "graft"), aligner=str(aligner))
    with open_decoder() as decoder, serve_api(decoder, LocalBackend(transcriber, "small")) as address:
        yield address
    transcriber.close()


@pytest.mark.processes
@pytest.mark.parametrize("command", commands_on(ASKED))
def test_requests(command: str, url: str, workspace: Path) -> None:
    words = [word.replace("localhost:8000", url) for word in shlex.split(command)]
    words = [re.sub(r"^model=\w+$", "model=small", word) for word in words]
    answer = subprocess.run([*words, "--fail-with-body", "-sS"], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.strip()


@pytest.mark.processes
def test_programs_that_ask_the_service(url: str, workspace: Path) -> None:
    output = run_blocks(SERVICE, {"http://localhost:8000": url})
    assert len(output.splitlines()) > 2


# Programs


def run_blocks(page: Page, changes: dict[str, str] | None = None, **names: Any) -> str:
    """Run a page's Python blocks one after the other in one namespace; returns what they print."""
    names["__name__"] = "page"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        for block in page.blocks("python"):
            for old, new in (changes or {}).items():
                block = block.replace(old, new)
            exec(compile(block, page.name, "exec"), names)
    return output.getvalue()


def test_programs_that_read_an_archive(workspace: Path) -> None:
    from jobs.transcription.assembly import TRANSCRIPTS

    loop = {"text": "a a a a", "flags": ["repetition"]}
    segment = {**loop, "start_s": 0.0, "end_s": 1.5, "mean_logprob": -0.9, "words": []}
    rows = [
        {**loop, "id": "one", "duration_s": 1.5, "segments": [segment], "confidence": 0.4},
        {"id": "two", "duration_s": 0.0, "text": "", "segments": [], "flags": [], "error": "no audio"},
    ]
    folder = workspace / "runs" / "transcripts" / "recordings"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, TRANSCRIPTS), folder / "part-00000.parquet")
    names: dict[str, Any] = {}
    for block in ARCHIVES.blocks("python"):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, ARCHIVES.name, "exec"), names)
    assert names["failed"]["id"].tolist() == ["two"]
    assert names["unsure"].to_pylist() == [{"id": "one", "text": "a a a a"}]
    duckdb = pytest.importorskip("duckdb")
    (query,) = ARCHIVES.blocks("sql")
    assert duckdb.sql(query).fetchall() == [("one", 0.0, ["repetition"], "a a a a")]


@pytest.mark.parametrize(
    "name",
    ["README.md", pytest.param("graft/README.md", marks=pytest.mark.slow), "graft/pretrained/small/README.md"],
)
def test_programs_that_load_the_small_graft(name: str, workspace: Path, bundled_weights: None) -> None:
    page, library = Page(name), Page("graft/README.md")
    if page != library and set(page.blocks("python")) <= set(library.blocks("python")):
        return  # they are run there
    output = run_blocks(page, files=["a.flac", "b.flac"])
    assert output.strip()


# Whole pages


def walked(page: Page) -> list[str]:
    return [command for command in page.commands() if road(command) == WALKED]


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("page", [page for page in PAGES if walked(page)], ids=lambda page: page.name)
def test_a_walk_through_the_page(
    page: Page,
    ray_started: None,
    bundled_weights: None,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepared = [one for one in page.commands() if road(one) == FAST and "graft prepare" in one]
    for command in [one for one in page.commands() if one in prepared or road(one) == WALKED]:
        start = time.monotonic()
        code = run_command(command, monkeypatch)
        output = capsys.readouterr()
        with capsys.disabled():
            print(f"\n{command}: {code} after {time.monotonic() - start:.0f} s")
        assert code == 0, f"{command}\n{output.out}\n{output.err}"
        if found := re.search(r"\bout=(\S+)", command):
            assert any(Path(found[1]).iterdir())


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.bundled
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", commands_on(SERVED))
def test_services_that_the_pages_start(command: str, template: Path, workspace: Path) -> None:
    words = shlex.split(command)
    variables = dict(word.split("=", 1) for word in words[: words.index("graft")])
    arguments = [word.replace("runs/merged", "small") for word in words[words.index("graft") + 1 :]]
    (port,) = free_ports(1)
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
    with (workspace / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs", *arguments, f"port={port}"], env=environment, stdout=log, stderr=log
        )
    try:
        key = variables.get("GRAFT_API_KEYS", "sk-none").split(",")[0]
        post = ["curl", "-sS", "--fail-with-body", "-H", f"Authorization: Bearer {key}", "-F", "file=@a.flac"]
        post += ["-F", "model=small", f"http://127.0.0.1:{port}/v1/audio/transcriptions"]
        _wait_until_ready(process, f"http://127.0.0.1:{port}/readyz", workspace / "log.txt")
        answer = subprocess.run(post, capture_output=True, text=True, timeout=120)
        assert json.loads(answer.stdout)["text"], answer.stdout + answer.stderr
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as response:
            if response.status == 200:
                return
        time.sleep(0.5)
    raise AssertionError(log.read_text())
