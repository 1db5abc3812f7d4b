"""The commands from build to transcribe, on Ray, with language models for text alone."""

import json
from pathlib import Path

import pytest

from jobs.build import main as build
from jobs.export import main as export
from jobs.merge import main as merge
from jobs.stage1 import main as stage1
from jobs.stage2 import main as stage2
from tests.support import media, tiny_models
from tests.support.jobs import transcribe
from tests.support.speech_corpus import corpus, row

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("ray_started"), pytest.mark.slow]


@pytest.mark.parametrize("kind", tiny_models.TEXT_DECODERS)
def test_the_whole_chain(kind: str, tmp_path: Path) -> None:
    audio = tiny_models.save_audio_base(tmp_path / "audio")
    text = tiny_models.save_text_decoder(tmp_path / "text", kind=kind)
    data = corpus(tmp_path / "train.parquet", [row(f"clip-{index}", index) for index in range(12)])
    graft, first, second, merged = (str(tmp_path / name) for name in ("graft", "stage1", "stage2", "merged"))
    settings = ["token_budget=400", "dtype=fp32", "data_workers=1", "max_steps=4", "epochs=20", f"model={graft}"]
    settings += [f"data={data}", "learning_rate=1e-2"]
    bases = [f"audio_base={audio}", f"text_base={text}"]
    assert build(argv=[*bases, "audio_projector=conv", "audio_projector_blocks=1", f"out={graft}"]) == 0
    assert stage1(argv=[f"model={graft}", f"out={first}", "--plan", "--hours=10"]) == 0
    assert stage1(argv=[*settings, "backend=deepspeed", "zero_stage=3", "workers=2", f"out={first}"]) == 0
    adapters = ["quantize=none", "lora.rank=4", f"projector={first}", f"out={second}"]
    assert stage2(argv=[*settings, *adapters, "backend=torch", "workers=1"]) == 0
    assert merge(argv=[f"model={second}", f"out={merged}"]) == 0
    calls = tmp_path / "calls"
    calls.mkdir()
    for path in media.SHORTEST_FIRST[:3]:
        (calls / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "transcripts"
    assert transcribe(f"model={merged}", f"audio={calls}", f"out={out}", "formats=[json]", "workers=2") == 0
    assert json.loads((out / "summary.json").read_text())["done"] == 3

    assert export(argv=[f"model={second}", "rank=2", "dtype=fp32", *bases, f"out={tmp_path / 'part'}"]) == 0
    rebuilt = [f"pretrained={tmp_path / 'part'}", *bases, f"out={tmp_path / 'rebuilt'}"]
    assert build(argv=rebuilt) == 0
