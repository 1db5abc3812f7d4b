"""Test `graft serve`: it starts a service, says how to ask it, and ends when it is told to."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.__main__ import main
from jobs.common.local_service import free_port
from tests.support import media, tiny_models
from tests.support.faults import until
from tests.support.paths import ROOT
from tests.support.ray_service import speech_flac


def test_an_address_that_cannot_be_listened_on_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "model=small", f"port={port}"]) == 2
    assert capsys.readouterr().err.startswith(f"graft: error: 127.0.0.1:{port}: Address already in use: give another ")
    assert main(["serve", "model=small", "host=192.0.2.1"]) == 2
    assert "192.0.2.1:8000: Cannot assign requested address" in capsys.readouterr().err


def test_wrong_keys_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in [
        (["model=m", "prot=1"], "did you mean 'port'"),
        (["port=1"], "key model is required"),
        (["model=m", "quantization=fp8"], "quantization=fp8 requires engine=vllm"),
        (["model=m", "dtype=int8", "gpus_per_replica=1"], "dtype=int8 is for CPUs and engine=transformers"),
        (["model=m", "cors_origins=https://a.example/page"], "give an origin without a path, such as"),
        ([f"model={tmp_path}", f"port={free_port()}"], "has no config.json"),
    ]:
        assert main(["serve", *arguments]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.processes
def test_the_service_answers_as_it_says_until_it_is_interrupted(tmp_path: Path) -> None:
    graft, port = tiny_models.save_tiny_graft(tmp_path / "tiny"), free_port()
    clip = tmp_path / "a.flac"
    clip.write_bytes(media.SHORTEST_FIRST[0].read_bytes())
    command = [sys.executable, "-m", "jobs", "serve", f"model={graft}", f"port={port}"]
    environment = {**os.environ, "GRAFT_API_KEYS": "secret", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as service:
        assert service.stdout
        printed = []
        try:
            for line in service.stdout:
                printed.append(line)
                if line.startswith("  curl"):
                    break
            asked = ["curl", "-sS", *shlex.split(printed[-1].replace("$KEY", "secret"))[1:]]
            answer = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, timeout=100)
            assert answer.stdout.startswith('{"text":'), answer
            refused = [part for part in asked if part not in ("-H", "Authorization: Bearer secret")]
            assert "invalid_api_key" in subprocess.run(refused, cwd=tmp_path, capture_output=True, text=True).stdout
            clip.write_bytes(speech_flac(1200))
            with subprocess.Popen([*asked, "-F", "stream=true"], cwd=tmp_path, stdout=subprocess.PIPE) as running:
                assert running.stdout
                assert running.stdout.readline().startswith(b'data: {"type": "transcript.text.delta"')
                os.killpg(service.pid, signal.SIGINT)  # as a terminal does
                assert service.stdout.readline().startswith("graft: the service ends after the requests that it has")
                clip.write_bytes(media.SHORTEST_FIRST[0].read_bytes())
                late = ""

                def is_refused() -> bool:
                    nonlocal late
                    late = subprocess.run([*asked, "-i"], cwd=tmp_path, capture_output=True, text=True).stdout
                    return late.startswith("HTTP/1.1 503")

                until(is_refused)  # soon after the line was printed
                assert running.poll() is None
                assert {"retry-after", '"code":"stopping"'} <= set(re.findall(r'retry-after|"code":"\w+"', late))
                *_, last = running.stdout.read().decode().split("\n\n")[:-1]
                assert json.loads(last.removeprefix("data: "))["type"] == "transcript.text.done"
            assert (service.stdout.read(), service.wait(60)) == ("", 0)
        finally:
            if service.poll() is None:
                os.killpg(service.pid, signal.SIGKILL)
    assert printed[0] == f"graft: starting a service of {graft} (about a minute on two cores)\n"
    assert f"tiny is served at http://127.0.0.1:{port} until Ctrl-C" in "".join(printed)
