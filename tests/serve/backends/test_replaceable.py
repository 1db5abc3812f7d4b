"""The model of an engine replica is replaced: beside the old one, after it, or not at all; real tiny models."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import torch

from graft.audio.chunking import Chunk
from graft.audio.clip import read_audio
from graft.checkpoints.loading import model_digest
from graft.errors import ModelError
from graft.inference.memory import free_memory, model_memory
from graft.inference.segments import Segment
from serve.backends.local import LocalBackend, fits_beside
from serve.backends.replaceable import ReplaceableModel
from serve.config import ServeArgs
from serve.service import FailedChange, ModelNotReady, TranscriptionOptions
from tests.support import media, tiny_models

CHUNK = Chunk(0.0, read_audio(media.SHORTEST_FIRST[0]))
OPTIONS = TranscriptionOptions()


@pytest.fixture(scope="module")
def models(graft_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two grafts with other weights, and a folder that holds none."""
    folder = tmp_path_factory.mktemp("replaced")
    other = tiny_models.save_tiny_graft(folder / "other", seed=1)
    (folder / "none").mkdir()
    return [str(graft_folder), str(other), str(folder / "none")]


class Machine:
    """Opens models, of which `room` fit into memory at once; it remembers what it opened, and when it failed.

    A model in `broken` fails, with the error given there.
    """

    def __init__(self, *, room: int = 2, broken: dict[str, Exception] | None = None) -> None:
        self.room, self.broken = room, broken or {}
        self.opened: list[str] = []
        self.open_count = 0

    def open(self, model: str) -> LocalBackend:
        self.opened.append(model)
        if self.open_count == self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if model in self.broken:
            raise self.broken[model]
        backend = LocalBackend.open(ServeArgs(model=model, name="m"), model)
        self.open_count += 1
        close = backend.close

        async def closing() -> None:
            await close()
            self.open_count -= 1

        backend.close = closing  # type: ignore[method-assign]
        return backend


@asynccontextmanager
async def opened(machine: Machine, model: str, fits: Callable[[str], bool] = lambda model: True) -> ReplaceableModel:
    one = ReplaceableModel("a", machine.open, fits)
    await one.open([model])
    yield one
    if one._backend is not None:
        await one._backend.close()


async def text_of(model: ReplaceableModel) -> str:
    async with aclosing(model.transcribe_chunk(CHUNK, OPTIONS, stream=False)) as parts:
        return "".join([part.text async for part in parts if isinstance(part, Segment)])


@pytest.fixture(scope="module")
def texts(models: list[str]) -> list[str]:
    """What the first two models hear in the chunk."""

    async def run(path: str) -> str:
        async with opened(Machine(), path) as model:
            return await text_of(model)

    found = [asyncio.run(run(path)) for path in models[:2]]
    assert found[0] != found[1]
    return found


def test_a_model_is_replaced_beside_the_old_one(models: list[str], texts: list[str]) -> None:
    async def run() -> None:
        machine = Machine()
        async with opened(machine, models[0]) as model:
            assert model.model_info().replicas[0].digest == model_digest(models[0])
            running = asyncio.create_task(text_of(model))
            await asyncio.sleep(0)  # it has begun
            await model.replace(models[1])
            assert await running == texts[0]
            assert await text_of(model) == texts[1]
            (own,) = model.model_info().replicas
            assert (own.model, own.digest, own.is_open, own.failure) == ("other", model_digest(models[1]), True, None)
            assert (machine.opened, machine.open_count) == (models[:2], 1)

    asyncio.run(run())


@pytest.mark.parametrize(
    "error",
    [None, OSError("stale file handle"), ValueError("vLLM: free memory is less than desired"), RuntimeError("CUDA")],
    ids=lambda error: type(error).__name__,
)
def test_the_old_model_stays_whatever_the_error(models: list[str], texts: list[str], error: Exception | None) -> None:
    async def run() -> None:
        wanted = models[2] if error is None else models[1]
        machine = Machine(broken={models[1]: error} if error else {})
        async with opened(machine, models[0]) as model:
            await model.replace(wanted)
            (own,) = model.model_info().replicas
            kind = type(error or ModelError()).__name__
            assert own.failure == FailedChange(Path(wanted).name, kind)
            assert (own.model, await text_of(model)) == ("tiny-graft", texts[0])
            await model.replace(models[0])  # the configuration is changed back
            assert model.model_info().replicas[0].failure is None
            assert machine.opened == [models[0], wanted]

    asyncio.run(run())


@pytest.mark.seconds
@pytest.mark.parametrize("is_known", [True, False], ids=["too large", "out of memory"])
def test_where_two_do_not_fit_the_old_one_is_closed_first(
    models: list[str], texts: list[str], is_known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        machine = Machine(room=1)
        async with opened(machine, models[0], lambda model: not is_known) as model:
            running = asyncio.create_task(text_of(model))
            await asyncio.sleep(0)
            change = asyncio.create_task(model.replace(models[1]))
            while model.model_info().replicas[0].is_open:
                await asyncio.sleep(0)
            waiting = asyncio.create_task(text_of(model))
            assert model.counts().running == 0
            await change
            assert [await running, await waiting] == texts
            assert model.model_info().replicas[0].is_open
            assert machine.opened == [models[0], *([] if is_known else [models[1]]), models[1]]
        assert "does not fit into memory beside the old one, which is closed first" in caplog.text

    asyncio.run(run())


@pytest.mark.seconds
def test_where_the_new_one_fails_alone_the_old_one_is_opened_again(models: list[str], texts: list[str]) -> None:
    async def run() -> None:
        machine = Machine(room=1, broken={models[1]: torch.OutOfMemoryError("CUDA out of memory")})
        async with opened(machine, models[0], lambda model: False) as model:
            await model.replace(models[1])
            (own,) = model.model_info().replicas
            assert (own.model, own.failure) == ("tiny-graft", FailedChange("other", "OutOfMemoryError"))
            assert await text_of(model) == texts[0]
            machine.broken = dict.fromkeys(models[:2], OSError("gone"))
            await model.replace(models[2])
            assert model.is_lost  # Ray Serve then replaces the replica

    asyncio.run(run())


@pytest.mark.seconds
def test_an_engine_starts_with_the_first_model_that_can_be_opened(models: list[str], texts: list[str]) -> None:
    async def run() -> None:
        for tried in ([models[2], models[1], models[0]], [models[2], models[2], models[1]]):
            machine = Machine()
            model = ReplaceableModel("a", machine.open)
            with pytest.raises(ModelNotReady):
                model.model_info()
            await model.open(tried)
            (own,) = model.model_info().replicas
            assert (own.model, own.failure) == ("other", FailedChange("none", "ModelError"))
            assert machine.opened == [models[2], models[1]]
            await model.replace(models[0])
            assert model.model_info().replicas[0].failure is None
            await model._backend.close()
        with pytest.raises(ModelError, match="config\\.json"):
            await ReplaceableModel("a", Machine().open).open([models[2]])

    asyncio.run(run())


def test_of_several_changes_the_last_one_counts(models: list[str], texts: list[str]) -> None:
    async def run() -> None:
        machine = Machine()
        async with opened(machine, models[0]) as model:
            await asyncio.gather(*map(model.replace, [models[1], models[2], models[0], models[1]]))
            assert await text_of(model) == texts[1]
            assert machine.opened == models[:2]

    asyncio.run(run())


def test_a_models_memory_is_compared_with_what_is_free(models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    args = ServeArgs(model=models[0])
    assert 0 < model_memory(models[0]).total < free_memory("cpu") < 2**45
    assert fits_beside(args, models[1])
    assert fits_beside(args, models[2])  # opening it says what is wrong
    assert not fits_beside(args.model_copy(update={"engine": "vllm"}), models[1])
    monkeypatch.setattr("graft.inference.memory.free_memory", lambda device: 1000.0)
    assert not fits_beside(args, models[1])
    with pytest.raises(ModelError, match=r"the weights of .* take 0\.0 GB, and 0\.0 GB are free on cpu: "):
        LocalBackend.open(args, models[1])  # else the system would kill each engine that starts
