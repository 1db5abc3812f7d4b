"""Loops, invented speech and cut answers are flagged, real speech is not, and a chunk with a loop is decoded again."""

import asyncio
import contextlib
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from graft.audio.chunking import Chunk, Chunker
from graft.audio.clip import AudioClip, read_audio
from graft.checkpoints.loading import open_graft, open_model
from graft.data.nonspeech import SOUNDS, generate_sounds
from graft.inference.engines.protocol import EngineRequest
from graft.inference.engines.sampling import has_repeated_ngram
from graft.inference.hallucination import (
    LOW_CONFIDENCE,
    NO_REPEAT_NGRAM,
    NO_SPEECH,
    REPETITION,
    TRUNCATED,
    QualityVerdict,
    check_quality,
    pick_better,
)
from graft.inference.segments import Segment
from graft.inference.transcriber import Transcriber, make_transcriber, open_transcriber
from graft.processor import GraftProcessor, max_new_tokens
from tests.support import tiny_models
from tests.support.paths import ROOT
from tests.support.speech_corpus import save_tiny_whisper

PROMPTS = ROOT / "jobs" / "data" / "prompts"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def flags_of(text: str, duration_s: float = 10.0, *, logprob: float = -0.1, **given) -> tuple[str, ...]:
    return check_quality(text, [logprob] * 5, duration_s=duration_s, **{"is_cut": False} | given).flags


@pytest.mark.parametrize(
    ("text", "duration_s"),
    [
        ("thank you " * 4, 3.0),
        ("so ho ho ho ho ho ho ho ho", 10.0),
        ("And then, and then, and then; and then", 5.0),
        ("it was " + "a b c d e f g h " * 4, 20.0),
        ("you you you you you you", 1.0),  # faster than anyone speaks
        ("".join(f"and the {number} of the day is the {number} of the night " for number in "abcdefghijklmnop"), 30.0),
        ("he said that he would not be able to come to the meeting of the council today because " * 5, 28.0),
        ("lalala" * 40, 20.0),
    ],
)
def test_loops_are_flagged(text, duration_s):
    assert flags_of(text, duration_s) == (REPETITION,)


@pytest.mark.parametrize(
    ("text", "duration_s"),
    [
        ("seven seven seven seven seven", 2.0),
        ("one one one one", 1.2),
        ("no no no no no no no", 2.5),
        ("testing one two one two one two", 3.0),
        ("thank you thank you thank you", 1.2),
        ("Yes.", 0.1),
        ("bye bye bye bye", 0.9),
        ("", 30.0),
    ],
)
def test_repetitions_that_people_speak_are_not_flagged(text, duration_s):
    assert flags_of(text, duration_s) == ()


def test_real_prompts_and_long_numbers_are_not_flagged():
    rows = [
        json.loads(line)
        for name in ("train", "unseen")
        for line in (PROMPTS / f"{name}.jsonl").read_text().splitlines()
    ]
    assert len(rows) > 50
    assert {row["text"]: flags for row in rows if (flags := flags_of(row["text"], row["duration_s"]))} == {}
    generator = random.Random(0)
    for count in range(1, 91):
        assert flags_of(" ".join(generator.choices(DIGITS, k=count)), max(0.3, 28 * count / 90)) == ()


def test_invented_speech_is_flagged():
    assert flags_of("thank you for watching", has_speech=False) == (NO_SPEECH,)
    assert flags_of("thank you for watching", has_speech=True) == flags_of("thank you for watching") == ()
    assert flags_of("thank you for watching", logprob=-1.01) == (LOW_CONFIDENCE,)
    assert flags_of("thank you for watching", logprob=float("nan")) == (LOW_CONFIDENCE,)
    words = " ".join(f"word{number}" for number in range(17))
    assert (flags_of(words, 2.0), flags_of(words, 2.2)) == ((LOW_CONFIDENCE,), ())
    assert flags_of("", has_speech=False, logprob=-9.0) == ()


def test_the_flag_of_a_cut_answer_comes_last():
    assert flags_of("", is_cut=True) == (TRUNCATED,)
    everything = flags_of("ho " * 90, 10.0, has_speech=False, logprob=-2.0, is_cut=True)
    assert everything == (REPETITION, NO_SPEECH, LOW_CONFIDENCE, TRUNCATED)


def test_the_better_text_has_fewer_flags_or_is_likelier():
    loop, guess = QualityVerdict("ho ho", -0.1, (REPETITION, TRUNCATED)), QualityVerdict("h", -1.5, (LOW_CONFIDENCE,))
    other = QualityVerdict("a chant", -0.2, (REPETITION,))
    assert pick_better(loop, guess) is pick_better(guess, loop) is guess
    assert pick_better(other, guess) is pick_better(guess, other) is other
    assert pick_better(other, QualityVerdict("", None, ())).text == ""
    assert pick_better(other, QualityVerdict("a song", -0.2, (REPETITION,))) is other


def test_with_n_grams_blocked_no_loop_is_left_at_a_pace_that_people_speak():
    for size in range(1, 9):
        loop = list(itertools.islice(itertools.cycle(DIGITS[:size]), size + NO_REPEAT_NGRAM))
        assert has_repeated_ngram(loop, NO_REPEAT_NGRAM)
        assert not has_repeated_ngram(loop[:-1], NO_REPEAT_NGRAM)
        assert flags_of(" ".join(loop[:-1])) == ()


# A model that follows a given chain of tokens: its layers do nothing, so that the last token alone decides the next.

CHUCKLE = {"\n": {"h": 4}, "h": {"o": 4, "<|im_end|>": 3}, "o": {" ": 4}, " ": {"h": 4}}
STUCK = {**CHUCKLE, "h": {"o": 4, "a": 3.9}, "a": {"o": 4, " ": 3.9}, "o": {" ": 4, "h": 3.9}, " ": {"h": 4, "a": 3.9}}
STAMMER = {**CHUCKLE, "h": {"o": 4, "a": 1}, "a": {"<|im_end|>": 4}}
GREETING = {"\n": {"h": 4}, "h": {"i": 4}, "i": {"<|im_end|>": 4}}


def open_with_chain(folder: Path, chain: dict[str, dict[str, float]] | None, **options) -> Transcriber:
    model, processor = open_model(folder)
    if chain:
        id_of = processor.tokenizer.get_vocab()
        (start,) = processor.prompt_ids(100)[-1:]  # "\n", or what begins a Whisper's text
        id_of |= {" ": id_of["Ġ"], "\n": start, "<|im_end|>": min(processor.end_ids(model.generation_config))}
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))  # a Whisper's is that of its embeddings
        if isinstance(processor, GraftProcessor):
            for layer in model.model.language_model.layers:
                layer.self_attn.o_proj.weight.data.zero_()
                layer.mlp.down_proj.weight.data.zero_()
        else:
            decoder = model.get_decoder()
            decoder.embed_positions.weight.data.zero_()
            for layer in decoder.layers:
                for last in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2):
                    last.weight.data.zero_()
                    last.bias.data.zero_()
            # Of a vector of one, the norm makes as much as a graft's does.
            decoder.layer_norm.weight.data.fill_(1.4)
            decoder.layer_norm.bias.data.zero_()
        embeddings = model.get_input_embeddings().weight.data
        for index, (token, nexts) in enumerate(chain.items()):
            embeddings[id_of[token]] = torch.eye(embeddings.shape[1])[index]
            for following, score in nexts.items():
                head.weight.data[id_of[following], index] = score
    transcriber = make_transcriber(model, processor, name="tiny")
    return Transcriber(transcriber._engine, processor, "tiny", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.save_tiny_graft(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["graft", "whisper"])
def opened(folder, request, tmp_path):
    if request.param == "whisper":
        folder = Path(save_tiny_whisper(tmp_path / "whisper"))
    with contextlib.ExitStack() as stack:

        def open_one(chain=None, **options) -> Transcriber:
            transcriber = open_with_chain(folder, chain, **options)
            stack.callback(transcriber.close)
            return transcriber

        yield open_one


def clip_of(seconds: float) -> AudioClip:
    return AudioClip(np.random.default_rng(0).standard_normal(int(seconds * 16_000)).astype(np.float32) * 0.1)


def decode_once(transcriber: Transcriber, clip: AudioClip, no_repeat_ngram: int) -> QualityVerdict:
    """Decode a clip with the engine alone and check the text."""
    features = transcriber._processor.featurizer(clip)
    most = max_new_tokens(clip.duration_s)
    request = EngineRequest(
        "alone", features, transcriber._processor.prompt_ids(features.frame_count), most, no_repeat_ngram
    )

    async def collect():
        return [token async for token in transcriber._engine.stream(request)]

    tokens = asyncio.run(collect())
    text = transcriber._processor.tokenizer.decode([token.id for token in tokens], skip_special_tokens=True).strip()
    return check_quality(
        text, [token.logprob for token in tokens], duration_s=clip.duration_s, is_cut=len(tokens) == most
    )


def test_a_loop_is_decoded_again_and_a_text_without_one_is_not_flagged(opened):
    transcriber = opened(CHUCKLE)
    clip = clip_of(4)
    assert decode_once(transcriber, clip, 0).flags == (REPETITION, TRUNCATED)
    (segment,) = transcriber.transcribe(clip).segments
    assert (segment.text, segment.flags) == ("ho ho h", ())
    assert segment.mean_logprob == pytest.approx(0, abs=0.01)
    assert asyncio.run(transcriber.transcribe_async(clip)).segments == (segment,)
    assert [one.segments for one in transcriber.transcribe_many([clip, clip])] == [(segment,)] * 2


@pytest.mark.seconds
def test_a_chunk_is_decoded_again_the_same_way_in_every_batch(folder):
    """The second decoding depends on the chunk alone, in any batch, with a model that attends to all tokens."""
    model, processor = open_graft(folder)
    torch.manual_seed(3)
    tiny_models.pay_attention(model)
    for name, parameter in model.named_parameters():
        if "audio_projector" in name and parameter.ndim > 1:
            parameter.data.normal_(std=3 / parameter.shape[1] ** 0.5)
    transcriber = make_transcriber(model, processor, name="tiny")
    stream, blocked = transcriber._engine.stream, []

    def recording_stream(request):
        blocked.append(request.no_repeat_ngram > 0)
        return stream(request)

    transcriber._engine.stream = recording_stream
    clips = [clip_of(seconds) for seconds in (0.3, 12, 4, 1, 30, 7, 2.5, 4.5)]
    alone_each = [transcriber.transcribe(clip).segments[0] for clip in clips]
    assert len({one.text for one in alone_each}) == len(clips)
    assert 2 <= (count := sum(blocked)) < len(clips)
    for order in (range(8), [4, 1, 7, 0, 2, 5, 3, 6]):
        before = transcriber.counts()
        blocked.clear()
        together = [one.segments[0] for one in transcriber.transcribe_many([clips[index] for index in order])]
        for segment, index in zip(together, order, strict=True):
            assert (segment.text, segment.flags) == (alone_each[index].text, alone_each[index].flags)
            assert segment.mean_logprob == pytest.approx(alone_each[index].mean_logprob, abs=1e-4)
        assert sum(blocked) == count
        assert transcriber.counts().steps - before.steps < (transcriber.counts().tokens - before.tokens) / 2
    transcriber.close()


@pytest.mark.parametrize(("chain", "flags"), [(STUCK, (REPETITION, TRUNCATED)), (STAMMER, (LOW_CONFIDENCE,))])
def test_where_both_texts_are_flagged_the_better_is_kept_with_its_flags(opened, chain, flags):
    transcriber = opened(chain)
    clip = clip_of(4)
    first, second = decode_once(transcriber, clip, 0), decode_once(transcriber, clip, NO_REPEAT_NGRAM)
    assert first.flags == (REPETITION, TRUNCATED)
    assert LOW_CONFIDENCE in second.flags
    kept = pick_better(first, second)
    assert kept.flags == flags
    assert transcriber.transcribe(clip).segments == (Segment(0.0, 4.0, kept.text, kept.mean_logprob, kept.flags),)


def test_text_without_speech_is_flagged_and_not_decoded_again(opened):
    assert opened(GREETING).transcribe(clip_of(2)).segments[0].flags == ()
    transcriber = opened(GREETING, chunker=lambda clip: [Chunk(0.0, clip, has_speech=clip.duration_s > 3)])
    quiet, spoken = transcriber.transcribe_many([clip_of(2), clip_of(4)])
    assert [(one.text, one.segments[0].flags) for one in (quiet, spoken)] == [("hi", (NO_SPEECH,)), ("hi", ())]
    assert transcriber.counts().tokens == 4


def test_a_clip_that_ends_within_a_word_is_transcribed_to_its_last_sample(opened):
    """No sample is lost, and an answer that does not end is flagged, whatever the model writes for half a word."""
    path = max((PROMPTS / "audio").glob("*.flac"), key=lambda path: path.stat().st_size)
    whole = read_audio(path)
    loudest = int(np.argmax(np.convolve(np.abs(whole.samples[16_000:]), np.ones(1600), "valid"))) + 16_000
    clip = AudioClip(whole.samples[: loudest + 800])
    chunks = Chunker()(clip)
    assert chunks[-1].start_s + chunks[-1].clip.duration_s == pytest.approx(clip.duration_s, abs=1e-6)
    for chain in (None, STUCK, CHUCKLE):
        transcript = opened(chain, chunker=Chunker()).transcribe(clip)
        assert transcript.segments[-1].end_s == pytest.approx(clip.duration_s, abs=1e-6)
        assert all(segment.flags for segment in transcript.segments) or chain is CHUCKLE


def test_context_words_are_not_written_where_there_is_no_speech(tmp_path):
    transcriber = open_transcriber(tiny_models.save_tiny_graft(tmp_path / "worded", trained_context=True), dtype="fp32")
    for kind in SOUNDS:
        sound = next(sound for sound in generate_sounds(kind) if sound.clip.duration_s < 6.1)
        assert transcriber.transcribe(sound.clip, context=["Dvorak", "Brno"]).segments == ()
    transcriber.close()


@pytest.mark.parametrize(
    ("chain", "options"),
    [(None, {}), (STUCK, {}), (GREETING, {"chunker": lambda clip: [Chunk(0.0, clip, has_speech=False)]})],
)
def test_text_that_a_model_invents_for_sounds_is_flagged(opened, chain, options):
    sounds = [next(sound for sound in generate_sounds(kind) if sound.clip.duration_s < 6.1) for kind in SOUNDS]
    assert [sound.kind for sound in sounds] == ["silence", "noise", "tones", "ringing"]
    for transcript in opened(chain, **options).transcribe_many([sound.clip for sound in sounds]):
        assert all(segment.flags for segment in transcript.segments)
