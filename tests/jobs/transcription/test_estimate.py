"""Test --plan of transcription and evaluation: real files are measured, and the hours and the cost follow from them."""

import numpy as np
import pytest
import soundfile

from jobs import evaluate, transcribe
from jobs.transcription import estimate
from tests.support import tiny_models
from tests.support.plans import never, number
from tests.support.speech_corpus import corpus, row


def plan_of(capsys, module, *arguments: str) -> str:
    main = module.main
    assert main.func(main.args[0], never, **main.keywords, argv=[*arguments, "--plan"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def graft(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("plan") / "graft"))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("archive")
    for minutes in (1, 2, 3):
        soundfile.write(folder / f"{minutes}.wav", np.zeros(minutes * 60 * 8000, np.float32), 8000)
    return str(folder)


def test_local_files_are_measured_by_their_headers(capsys, graft, archive):
    text = plan_of(capsys, transcribe, f"model={graft}", f"audio={archive}", "price=36000", "--rtfx=10")
    assert "audio       0.10 h in 3 recordings (from headers and metadata)" in text
    assert number(text, r"speed +# s of audio") == 10
    assert number(text, r"time +# h") == 0.01
    assert number(text, r"h, # at 36000 an hour of the cluster") == 360
    assert "as --rtfx says" in text
    model = tiny_models.GraftForConditionalGeneration.from_pretrained(graft)
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    assert number(text, r", # M parameters") == pytest.approx(weights / 4e6, abs=0.06)
    assert "in fp32" in text


def test_the_hours_of_many_files_follow_from_some_of_them(capsys, graft, archive, monkeypatch):
    monkeypatch.setattr(estimate, "MOST_PROBES", 2)
    text = plan_of(capsys, transcribe, f"model={graft}", f"audio={archive}")
    assert "audio       0.10 h in 3 recordings (from 2 headers and the bytes of the other files)" in text


def test_what_is_elsewhere_is_assumed(capsys, graft):
    text = plan_of(capsys, transcribe, f"model={graft}", "audio=https://host/a.flac")
    assert "100.00 h in 1 recordings (assumed, as the files are elsewhere: give --hours)" in text
    assert "100.00 h (assumed, as there is no audio=" in plan_of(capsys, transcribe, f"model={graft}")
    text = plan_of(capsys, transcribe, f"model={graft}", "audio=https://host/a.flac", "--hours", "2")
    assert "2.00 h in 1 recordings (as --hours says)" in text


def test_workers_and_readers_share_the_work(capsys):
    plan = ("model=fast-7b", "gpus_per_worker=1", "--hours", "100000")

    def hours(*arguments: str) -> float:
        return number(plan_of(capsys, transcribe, *plan, *arguments), r"time +# h")

    assert hours("workers=8", "readers=64") == pytest.approx(hours("readers=64") / 8, rel=0.01)
    assert hours("readers=64", "--speech-share", "0.5") == pytest.approx(hours("readers=64") / 2, rel=0.01)
    assert hours("readers=64", "--share", "0.25") == pytest.approx(2 * hours("readers=64"), rel=0.01)
    assert hours("readers=64", "gpus_per_worker=0.5") == pytest.approx(2 * hours("readers=64"), rel=0.01)
    text = plan_of(capsys, transcribe, *plan, "workers=8")
    assert number(text, r"time +# h") == pytest.approx(100_000 * 1.30e-3, rel=0.01)
    needed = number(text, r"for whom the models wait: give readers=#")
    assert "wait" not in plan_of(capsys, transcribe, *plan, "workers=8", f"readers={needed:.0f}")
    assert "wait" in plan_of(capsys, transcribe, *plan, "workers=8", f"readers={needed - 1:.0f}")


def test_a_model_that_does_not_fit_is_told(capsys):
    plan = ("model=fast-7b", "gpus_per_worker=1", "--hours", "10", "--device")
    assert "  fits into the 141 GB of h200" in plan_of(capsys, transcribe, *plan, "h200")
    assert "  does not fit into the 24 GB of 4090" in plan_of(capsys, transcribe, *plan, "4090", "dtype=fp32")
    assert "of cpu" not in plan_of(capsys, transcribe, *plan, "cpu")


def test_int8_takes_less_memory_and_time(capsys):
    plan = ("model=small", "--hours", "10")
    fp32, int8 = plan_of(capsys, transcribe, *plan), plan_of(capsys, transcribe, *plan, "dtype=int8")
    assert "in int8\n" in int8
    sizes = [number(text, r"total\n +#") for text in (fp32, int8)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.25)
    hours = [number(text, r"time +# h") for text in (fp32, int8)]
    assert hours[1] == pytest.approx(hours[0] / 2, rel=0.2)


def test_every_pass_of_an_evaluation_counts(capsys, graft, tmp_path):
    data = corpus(tmp_path / "dev.parquet", [row(f"t{seed}", seed, duration=36.0) for seed in range(10)])
    given = (f"model={graft}", f"data.dev={data}", "--rtfx", "1")
    alone = plan_of(capsys, evaluate, *given, "baseline=null")
    assert "audio       0.10 h in 10 recordings (from the data's metadata)" in alone
    assert number(alone, r"time +# h") == 0.1
    assert number(plan_of(capsys, evaluate, *given, "limit=5", "baseline=null"), r"time +# h") == 0.05
    text = plan_of(capsys, evaluate, *given, "instructions=lower,raw", "--price", "20")
    assert ", 3 times" in text
    assert "Whisper base, plain Whisper in fp32" in text
    assert number(text, r"time +# h") == 0.4
    assert number(text, r"h, # at 20 an hour") == 8


def test_plain_whisper_is_planned_too(capsys, tmp_path):
    text = plan_of(capsys, transcribe, "model=whisper", "--hours", "1")
    assert "model       Whisper base, plain Whisper in fp32" in text
    folder = tmp_path / "own"
    tiny_models.whisper_config().save_pretrained(folder)
    assert f"model       {folder}, plain Whisper in bf16" in plan_of(
        capsys, transcribe, f"model={folder}", "dtype=bf16"
    )


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        (transcribe, ["audio=nowhere.flac"], "no such file or folder: audio=nowhere.flac"),
        (transcribe, ["--device", "abacus"], "--device abacus is not known: give cpu or one of b200"),
        (transcribe, ["--hours", "many"], "hours=many: give a number over 0 or null"),
        (transcribe, ["model=medium-9b"], "medium-9b"),
        (evaluate, ["data.dev=nowhere"], "no such file or folder: data.dev=nowhere"),
        (evaluate, ["baseline=./none"], "no such file or folder: baseline=./none"),
    ],
)
def test_wrong_arguments_end_in_one_line(capsys, graft, module, arguments, words):
    main = module.main
    argv = [f"model={graft}", *arguments, "--plan"]
    assert main.func(main.args[0], never, **main.keywords, argv=argv) == 2
    output = capsys.readouterr()
    assert words in output.err
    assert (output.err.count("\n"), output.out) == (1, "")
