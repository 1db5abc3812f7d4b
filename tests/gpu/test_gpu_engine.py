"""Test the engine on the device: with and without CUDA graphs its tokens equal generate's in any batch."""

import asyncio
import contextlib

import pytest
import torch

from graft.audio.features import Features
from graft.inference.engines.graft_decoder import GraftDecoder
from graft.inference.engines.protocol import EngineRequest, Token
from graft.inference.engines.transformers_engine import TransformersEngine
from graft.model.modeling import GraftForConditionalGeneration
from tests.support import tiny_models, wide_models

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error:decoding without CUDA graphs")]
FRAMES = [37, 700, 8, 120, 250, 90, 400]
SUPPRESSED = [tiny_models.AUDIO_ID, 111, 112]


def request_of(model: GraftForConditionalGeneration, index: int) -> EngineRequest:
    features, _ = tiny_models.log_mels([FRAMES[index]], seed=index)
    prompt = tiny_models.prompt(model, FRAMES[index], [7, 8, 9 + index])
    return EngineRequest(f"r{index}", Features(features[0].numpy(), FRAMES[index]), prompt, 10 + 9 * index)


def generated(model: GraftForConditionalGeneration, request: EngineRequest) -> list[int]:
    ids = model.generate(
        input_ids=torch.tensor([request.prompt_ids], device=model.device),
        input_features=torch.from_numpy(request.features.mel)[None].to(model.device),
        audio_frame_counts=torch.tensor([request.features.frame_count], device=model.device),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        suppress_tokens=SUPPRESSED,
    )
    return ids[0, len(request.prompt_ids) :].tolist()


async def collect(engine: TransformersEngine, request: EngineRequest) -> list[Token]:
    return [token async for token in engine.stream(request)]


@pytest.mark.parametrize("graphs", [False, True])
def test_tokens_equal_generate_with_graphs_and_without(device: torch.device, graphs: bool) -> None:
    model = wide_models.wide_model(device)
    model.generation_config.suppress_tokens = SUPPRESSED
    requests = [request_of(model, index) for index in range(len(FRAMES))]
    expected = [generated(model, request) for request in requests]

    async def all_at_once(engine: TransformersEngine) -> list[list[Token]]:
        return await asyncio.gather(*(collect(engine, request) for request in requests))

    decoder = GraftDecoder(model, pad_id=0, graphs=graphs)
    engine = TransformersEngine(decoder, eos_ids=(), max_batch_tokens=1536, max_prefill_tokens=300)
    with contextlib.closing(engine):
        for _ in range(2):  # the second time the graphs are there
            answers = asyncio.run(all_at_once(engine))
            assert [[token.id for token in tokens] for tokens in answers] == expected


def test_memory_for_the_rows_is_taken_once(cuda: torch.device) -> None:
    model = wide_models.wide_model(cuda, dtype=torch.bfloat16)
    model.generation_config.suppress_tokens = SUPPRESSED
    requests = [request_of(model, index) for index in range(len(FRAMES))]
    with contextlib.closing(TransformersEngine(GraftDecoder(model, pad_id=0), eos_ids=())) as engine:
        held = []
        for _ in range(3):
            for request in requests:
                asyncio.run(collect(engine, request))
            held.append(torch.cuda.memory_allocated(cuda))
    assert held[2] <= held[1]
