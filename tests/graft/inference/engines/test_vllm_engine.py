"""The vLLM engine returns the transformers engine's tokens in any batch, in float32 on vLLM's CPU build."""

import asyncio
import contextlib
import json
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graft.audio.clip import read_audio
from graft.checkpoints.build import build_graft
from graft.checkpoints.bundled.cache import bundled_qwen2vl, bundled_whisper
from graft.checkpoints.language_model import open_encoder_model
from graft.checkpoints.loading import open_graft
from graft.inference.engines.graft_decoder import GraftDecoder
from graft.inference.engines.protocol import EngineRequest, Token
from graft.inference.engines.sampling import has_repeated_ngram
from graft.inference.engines.transformers_engine import TransformersEngine
from graft.inference.engines.vllm_engine import VllmEngine, open_vllm_engine
from tests.support import tiny_models
from tests.support.paths import ROOT

pytestmark = pytest.mark.vllm

PROMPTS = ROOT / "jobs" / "data" / "prompts"
CLIPS = [json.loads(line)["audio"] for line in (PROMPTS / "train.jsonl").read_text().splitlines()[:20]]
END = 256


def requests_for(processor, *, max_new_tokens: int = 30) -> list[EngineRequest]:
    requests = []
    for index, name in enumerate(CLIPS):
        features = processor.featurizer(read_audio(PROMPTS / name))
        requests.append(
            EngineRequest(f"r{index}", features, processor.prompt_ids(features.frame_count), max_new_tokens + index % 5)
        )
    return requests


async def collect(engine, request) -> list[Token]:
    return [token async for token in engine.stream(request)]


async def collect_all(engine, requests):
    return await asyncio.gather(*(collect(engine, request) for request in requests), return_exceptions=True)


def reference(path, requests, *, eos_ids) -> list[list[Token]]:
    """Return the answers of the transformers engine."""
    model, processor = open_graft(path)
    engine = TransformersEngine(GraftDecoder(model, pad_id=processor.tokenizer.pad_token_id), eos_ids=eos_ids)
    try:
        return asyncio.run(collect_all(engine, requests))
    finally:
        engine.close()


def ids_of(tokens) -> list[int]:
    return [token.id for token in tokens]


def check(answers, expected) -> None:
    assert [ids_of(tokens) for tokens in answers] == [ids_of(tokens) for tokens in expected]
    for tokens, others in zip(answers, expected, strict=True):
        assert [token.logprob for token in tokens] == pytest.approx([token.logprob for token in others], abs=1e-4)


def save_lively_graft(folder: Path) -> Path:
    """Save a tiny graft of a shape for vLLM's CPU kernels; half of its answers end by themselves."""
    model, processor = open_graft(tiny_models.save_tiny_graft(folder, width=128))
    torch.manual_seed(0)
    for parameter in [*model.model.language_model.parameters(), *model.lm_head.parameters()]:
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape) / parameter.shape[1] ** 0.5
    torch.nn.init.normal_(model.audio_projector.linear.weight, std=0.5)
    model.save_pretrained(folder)
    answers = [ids_of(tokens) for tokens in reference(folder, requests_for(processor), eos_ids={END})]
    late = {id for answer in answers for id in answer[10:]} - {id for answer in answers for id in answer[:5]}
    ends = min(late, key=lambda id: abs(sum(id in answer for answer in answers) - len(answers) // 2))
    model.generation_config.eos_token_id = [END, ends]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lively_graft(tmp_path_factory.mktemp("vllm") / "graft")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VllmEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFT_CACHE", str(folder.parent / "cache"))
        engine, _ = open_vllm_engine(folder, device="cpu", max_requests=8, cache_bytes=2**26)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def requests(folder: Path) -> list[EngineRequest]:
    return requests_for(open_encoder_model(folder)[1])


@pytest.fixture(scope="module")
def expected(folder: Path, requests) -> list[list[Token]]:
    model, _ = open_graft(folder)
    return reference(folder, requests, eos_ids=model.generation_config.eos_token_id)


def test_twenty_clips_together_and_alone(engine, requests, expected) -> None:
    check(asyncio.run(collect_all(engine, requests)), expected)
    check([asyncio.run(collect(engine, request)) for request in requests[:3]], expected[:3])
    lengths = {len(tokens) for tokens in expected}
    assert len(lengths) > 5
    assert len({tuple(ids_of(tokens)) for tokens in expected}) > 15
    assert sum(len(tokens) == request.max_new_tokens for tokens, request in zip(expected, requests, strict=True)) > 5


def test_blocked_n_grams_are_the_transformers_engines(folder, engine, requests, expected) -> None:
    blocking = [replace(request, no_repeat_ngram=1 + index % 4) for index, request in enumerate(requests)]
    model, _ = open_graft(folder)
    answers = reference(folder, blocking, eos_ids=model.generation_config.eos_token_id)
    check(asyncio.run(collect_all(engine, blocking)), answers)
    assert sum(ids_of(one) != ids_of(other) for one, other in zip(answers, expected, strict=True)) > 8
    assert not any(
        has_repeated_ngram(ids_of(tokens), request.no_repeat_ngram)
        for tokens, request in zip(answers, blocking, strict=True)
    )


def test_requests_come_and_go_from_several_loops(engine, requests, expected) -> None:
    answers: dict[str, list[Token]] = {}

    async def come(part, seed: int) -> None:
        generator = random.Random(seed)

        async def one(request, leaves_after: int | None) -> None:
            await asyncio.sleep(generator.random())
            tokens = answers.setdefault(request.request_id, [])
            async with contextlib.aclosing(engine.stream(request)) as stream:
                async for token in stream:
                    tokens.append(token)
                    if len(tokens) == leaves_after:
                        break

        await asyncio.gather(*(one(request, 3 if index % 3 == 2 else None) for index, request in enumerate(part)))

    threads = [threading.Thread(target=lambda part=part: asyncio.run(come(requests[part::2], part))) for part in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, request in enumerate(requests):
        whole = ids_of(expected[index])
        assert ids_of(answers[request.request_id]) == (whole[:3] if index // 2 % 3 == 2 else whole)
    asyncio.run(collect(engine, requests[0]))  # requests that were aborted before have left by now
    assert (engine.counts().running, engine.counts().waiting) == (0, 0)


def test_an_aborted_request_ends_and_its_id_is_free_again(engine, requests, expected) -> None:
    cut = next(index for index, request in enumerate(requests) if len(expected[index]) == request.max_new_tokens)

    async def abort_after(count: int) -> list[Token]:
        tokens = []
        async for token in engine.stream(replace(requests[cut], request_id="long", max_new_tokens=2000)):
            tokens.append(token)
            if len(tokens) == count:
                engine.abort("long")
        return tokens

    async def abort_at_once() -> list[Token]:
        answer = asyncio.create_task(collect(engine, requests[2]))
        await asyncio.sleep(0)
        engine.abort(requests[2].request_id)
        return await answer

    async def run():
        return await asyncio.gather(abort_after(4), collect(engine, requests[cut]), abort_at_once())

    aborted, whole, none = asyncio.run(run())
    assert 4 <= len(aborted) < 2000
    assert ids_of(aborted)[:20] == ids_of(expected[cut])[: len(aborted)][:20]
    assert (ids_of(whole), none) == (ids_of(expected[cut]), [])
    engine.abort("nobody")
    again = replace(requests[cut], request_id="long")
    check([asyncio.run(collect(engine, again))], [expected[cut]])


def test_an_error_ends_only_the_request_that_it_concerns(engine, requests, expected) -> None:
    audio_id = max(set(requests[1].prompt_ids), key=requests[1].prompt_ids.count)
    wrong = replace(requests[1], prompt_ids=[*requests[1].prompt_ids, audio_id])
    long = replace(requests[2], max_new_tokens=4090)
    outside = replace(requests[4], prompt_ids=[*requests[4].prompt_ids, 100_000])
    answers = asyncio.run(
        collect_all(engine, [requests[0], wrong, long, requests[3], requests[3], outside, requests[5]])
    )
    assert isinstance(answers[1], ValueError)
    assert "audio placeholders in input_ids, but" in str(answers[1])
    assert isinstance(answers[2], ValueError)
    assert str(answers[2]).endswith("raise max_model_len, now 4096")
    assert str(answers[4]) == "request r3 is already under way"
    assert isinstance(answers[5], IndexError)
    check([answers[0], answers[3], answers[6]], [expected[0], expected[3], expected[5]])


def test_counts(engine, requests, expected) -> None:
    before = engine.counts()
    asyncio.run(collect_all(engine, requests))
    after = engine.counts()
    assert after.tokens - before.tokens == sum(map(len, expected))
    assert after.prefills - before.prefills < len(requests)
    assert max(map(len, expected)) <= after.steps - before.steps < sum(map(len, expected))
    assert after.busy_s > before.busy_s
    assert (after.running, after.waiting) == (0, 0)


def test_an_error_at_vllms_start_is_raised_and_leaves_no_thread(folder, monkeypatch) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(folder.parent / "cache"))
    before = {thread.name for thread in threading.enumerate()}
    with pytest.raises(ValueError, match="nonsense"):
        open_vllm_engine(folder, device="cpu", quantization="nonsense")
    assert {thread.name for thread in threading.enumerate()} <= before


@pytest.mark.bundled
def test_real_weights_answer_the_same_until_the_engine_is_closed(tmp_path, monkeypatch) -> None:
    model, processor = build_graft(str(bundled_whisper()), str(bundled_qwen2vl()))
    model.save_pretrained(tmp_path / "graft")
    processor.save_pretrained(tmp_path / "graft")
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    eos_ids = {processor.target_ids("")[-1], *model.generation_config.eos_token_id}
    requests = [
        replace(one, no_repeat_ngram=5 * (index % 2))
        for index, one in enumerate(requests_for(processor, max_new_tokens=20))
    ]
    del model
    expected = reference(tmp_path / "graft", requests, eos_ids=eos_ids)
    engine, _ = open_vllm_engine(tmp_path / "graft", device="cpu", max_requests=20, cache_bytes=2**28)
    try:
        check(asyncio.run(collect_all(engine, requests)), expected)
        assert len({tuple(ids_of(tokens)) for tokens in expected}) > 15

        async def close_in_the_middle() -> None:
            async for _ in engine.stream(requests[0]):
                await asyncio.to_thread(engine.close)

        with pytest.raises(RuntimeError, match="the engine is closed"):
            asyncio.run(close_in_the_middle())
        with pytest.raises(RuntimeError, match="the engine is closed"):
            asyncio.run(collect(engine, requests[1]))
    finally:
        engine.close()


def test_when_vllm_crashes_requests_end_with_an_error_and_so_do_later_ones(engine, requests) -> None:
    """This test must be the last of the file: it ends the engine that the others share."""
    psutil = pytest.importorskip("psutil")

    core = next(
        process for process in psutil.Process().children(recursive=True) if process.name() == "VLLM::EngineCore"
    )

    async def kill() -> None:
        core.suspend()  # otherwise it may answer before it is killed
        answer = asyncio.create_task(collect(engine, requests[0]))
        while not engine.counts().running:
            await asyncio.sleep(0.01)
        core.kill()
        await answer

    with pytest.raises(Exception, match="EngineCore"):
        asyncio.run(kill())
    with pytest.raises(Exception, match="EngineCore"):
        asyncio.run(collect(engine, requests[1]))
    engine.close()
    assert (engine.counts().running, engine.counts().waiting) == (0, 0)
