"""Test CTC pre-alignment on a tiny graft: symbols, the loss against all alignments, training and scores."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from graft.audio.clip import read_audio
from graft.errors import ModelError
from graft.model.ctc import CtcPrealignment, count_letters, find_letters, spell, spelled_share
from graft.model.modeling import GraftForConditionalGeneration
from graft.processor import GraftProcessor
from graft.text.wer import score
from graft.training.stages import ComputeSettings, Stage, make_backend, open_for_stage, trainable_module
from jobs.ablate import score_ctc
from jobs.evaluate import EvaluateRecipe
from tests.support import tiny_models
from tests.support.speech_corpus import corpus, flac
from tests.support.speech_corpus import row as corpus_row

LETTERS = "abcdefghijklmnopqrstuvwxyz'"


@pytest.fixture(scope="module")
def graft(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("ctc") / "graft"))


def prealignment_of(graft: str, letters: str = LETTERS) -> tuple[CtcPrealignment, GraftProcessor]:
    processor = GraftProcessor.from_pretrained(graft)
    return CtcPrealignment(
        GraftForConditionalGeneration.from_pretrained(graft), processor.tokenizer, letters
    ), processor


def batch(processor: GraftProcessor, *clips: tuple[float, str]) -> dict[str, torch.Tensor]:
    examples = [
        processor.example(read_audio(flac(seconds, number)), text) for number, (seconds, text) in enumerate(clips)
    ]
    return {name: torch.from_numpy(value) for name, value in processor.training_batch(examples).items()}


def test_other_characters_become_spaces(graft: str) -> None:
    prealignment, _ = prealignment_of(graft)
    assert prealignment.normalize("It's CAFÉ — No. 7!\nyes") == "it's cafe no yes"
    assert prealignment.normalize("7, 8") == ""


def test_letters_are_those_of_the_texts_that_are_one_token_each() -> None:
    words = tiny_models.tokenizer()  # one token for each byte
    counts = count_letters(["It’s CAFÉ No. 7", "E\u0301te\u0301"])
    assert counts["é"] == 3
    letters = find_letters(counts, words)
    assert letters == "'7acefinost"
    assert spelled_share(counts, letters) == pytest.approx((sum(counts.values()) - 3 / 2) / sum(counts.values()))
    hindi = count_letters(["यह है"])
    assert (find_letters(hindi, words), spelled_share(hindi, "")) == ("", 0.0)
    assert spelled_share(count_letters(["है ệ"]), "e\u0302\u0323ह") == pytest.approx(2 / 3)
    known = frozenset("e\u0302\u0323ह")
    assert [spell(one, known) for one in "ệéहै.\n"] == ["e\u0323\u0302", "e", "ह", "", " ", " "]


def test_the_loss_is_the_likelihood_of_all_alignments_of_the_text(graft: str) -> None:
    prealignment, processor = prealignment_of(graft, letters="ab")
    inputs = batch(processor, (0.2, "aab"), (0.16, "b"))
    expected, letters = 0.0, "\n ab"
    logits, counts = prealignment._symbol_logits(inputs["audio_frame_counts"], inputs["input_features"], None)
    assert counts == [5, 4]
    for row, count, text in zip(logits.log_softmax(-1).tolist(), counts, ["aab", "b"], strict=True):
        likelihood = 0.0
        for path in itertools.product(range(4), repeat=count):
            collapsed = "".join(letters[symbol] for symbol, _ in itertools.groupby(path) if symbol)
            if collapsed == text:
                likelihood += math.exp(sum(row[place][symbol] for place, symbol in enumerate(path)))
        expected -= math.log(likelihood)
    # 4 letters and 2 ends of answers are labels.
    assert float(prealignment(**inputs).loss.detach() * 6) == pytest.approx(expected, rel=1e-4)
    assert float(prealignment(**inputs, label_count=1).loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_clips_without_labels_add_nothing(graft: str) -> None:
    prealignment, processor = prealignment_of(graft)
    with_filler = batch(processor, (0.4, "yes"), (0.3, "no"))
    with_filler["labels"][1] = -100
    loss = prealignment(**with_filler, label_count=4).loss
    assert torch.allclose(loss, prealignment(**batch(processor, (0.4, "yes")), label_count=4).loss)
    with_filler["labels"][0] = -100
    assert float(prealignment(**with_filler, label_count=4).loss.detach()) == 0


def test_a_clip_with_more_letters_than_audio_tokens_adds_nothing(graft: str) -> None:
    prealignment, processor = prealignment_of(graft)
    loss = prealignment(**batch(processor, (0.1, "far too much for a tenth of a second"))).loss
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(prealignment.audio_projector.linear.weight.grad.abs().max()) == 0


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("dtype", "audio_projector"),
    [
        ("fp32", "mlp"),
        ("bf16", "linear"),
        ("fp32", "conv"),
        pytest.param("bf16", "conv", marks=pytest.mark.slow),
        pytest.param("fp32", "linear", marks=pytest.mark.slow),
        pytest.param("bf16", "mlp", marks=pytest.mark.slow),
    ],
)
def test_a_projector_learns_its_clips(tmp_path: Path, dtype: str, audio_projector: str) -> None:
    graft = str(tiny_models.save_tiny_graft(tmp_path / "graft", audio_projector=audio_projector))
    computing, stage = ComputeSettings(dtype=dtype), Stage(1, letters=LETTERS)
    model, processor = open_for_stage(stage, graft, computing)
    prealignment = trainable_module(model, stage, computing, processor)
    assert isinstance(prealignment, CtcPrealignment)
    if audio_projector != "conv":  # a fresh projector starts at zero
        assert float(prealignment.audio_projector(torch.ones(1, 16), [1]).detach().abs().max()) == 0
    frozen = {name: tensor.clone() for name, tensor in prealignment.audio_tower.state_dict().items()}
    inputs = batch(processor, (0.4, "Yes."), (0.3, "go"))
    backend = make_backend(prealignment, computing, accumulation=1, weight_decay=0.0, max_grad_norm=1.0)
    for _ in range(600):
        backend.backward(inputs, label_count=10, is_last=True)
        backend.step(5e-3)
    with backend.evaluating():
        assert prealignment.greedy_decode(inputs["input_features"], inputs["audio_frame_counts"]) == ["yes", "go"]
    assert set(backend.state()) == {f"audio_projector.{name}" for name, _ in model.audio_projector.named_parameters()}
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in prealignment.audio_tower.state_dict().items())


def test_unusable_letters_and_sharding_are_refused(graft: str) -> None:
    for letters, computing, message in (
        ("abcé", ComputeSettings(), "'é' is not one token"),
        ("abc", ComputeSettings(backend="deepspeed", zero_stage=3), "ZeRO-3 has nothing to shard"),
    ):
        stage = Stage(1, letters=letters)
        model, processor = open_for_stage(stage, graft, ComputeSettings())
        with pytest.raises(ModelError, match=message):
            trainable_module(model, stage, computing, processor)


def test_a_stage_is_scored_once(graft: str, tmp_path: Path) -> None:
    rows = [corpus_row(f"c{seed}", seed) for seed in range(3)]
    recipe = EvaluateRecipe(
        model=graft, data={"test": corpus(tmp_path / "test.parquet", rows)}, out=str(tmp_path / "scored"), limit=2
    )
    prealignment, processor = prealignment_of(graft)
    inputs = [processor(audio=read_audio(row["wav"]["bytes"])) for row in rows[:2]]
    transcripts = [
        prealignment.eval().greedy_decode(clip["input_features"], clip["audio_frame_counts"])[0] for clip in inputs
    ]
    scores = {"test": score([prealignment.normalize(row["text"]) for row in rows[:2]], transcripts).to_dict()}
    assert scores["test"]["cer"] > 0
    assert score_ctc(recipe, LETTERS) == scores
    (tmp_path / "test.parquet").unlink()
    assert score_ctc(recipe, LETTERS) == scores
