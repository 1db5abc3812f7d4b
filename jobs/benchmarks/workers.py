"""Two training workers beside one, on batches made beforehand: the same steps on the same clips, a thread each, DDP over gloo."""

import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.multiprocessing
from torch import distributed

from graft.processor import GraftProcessor
from graft.training.batch import TrainingBatch
from graft.training.loop import LoopSettings, Observer, train
from graft.training.progress import Progress
from graft.training.stages import Stage, make_backend, stage_model

from .batches import made_examples, padded, planned
from .measuring import Findings, Numbers, Spent, list_numbers, median_ratio, spent_on
from .steps import COMPUTING

STEP_BATCHES = 2

ABOUT = "the same steps of two batches, made beforehand, by one worker that takes both and by two that take one each (DDP over gloo)"


def bench_workers(graft: str, *, clips: int, repetitions: int) -> Findings:
    """Measure two workers' steps beside one's."""
    counts = (1, STEP_BATCHES)
    spent: dict[int, list[Spent]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        batches = _step_batches(graft, clips)
        torch.save(batches, Path(folder, "batches.pt"))
        for repetition in range(repetitions):
            for count in counts:
                scratch = Path(folder, f"{repetition}-{count}")
                scratch.mkdir()
                torch.multiprocessing.spawn(_work, args=(count, graft, str(scratch)), nprocs=count)
                spent[count].append(_together(scratch))
    one, two = ([one.wall_s for one in spent[count]] for count in counts)
    cpu_one, cpu_two = ([one.cpu_s for one in spent[count]] for count in counts)
    trained = sum(batch.clip_count for batch in batches[STEP_BATCHES:])
    numbers: Numbers = {
        "clips": trained,
        "one_samples_per_s": trained / statistics.median(one),
        "two_samples_per_s": trained / statistics.median(two),
        "two_to_one": median_ratio(one, two),
        "cpu_two_to_one": median_ratio(cpu_two, cpu_one),
    }
    return Findings(numbers, f"{ABOUT}\n{list_numbers(numbers)}")


def _work(rank: int, count: int, graft: str, scratch: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=count)
    _train_share(
        rank, count, graft, scratch
    )  # returns without its model: DDP must not outlive the group, whose end waits for the GIL
    distributed.destroy_process_group()


def _train_share(rank: int, count: int, graft: str, scratch: str) -> None:
    """Train on this worker's share, the first step untimed; leaves the seconds in `scratch`."""
    accumulation = STEP_BATCHES // count
    model, _ = stage_model(Stage(1), graft, COMPUTING)
    backend = make_backend(model, COMPUTING, accumulation=accumulation, weight_decay=0.0, max_grad_norm=1.0)
    settings = LoopSettings(learning_rate=1e-3, accumulation=accumulation)
    share: list[TrainingBatch] = torch.load(Path(scratch).with_name("batches.pt"), weights_only=False)[rank::count]

    def steps(first: int, end: int) -> None:
        batches = share[first * accumulation : end * accumulation]
        train(batches, backend, settings, progress=Progress(step=first), total_steps=end, observer=Observer())

    steps(0, 1)
    distributed.barrier()
    spent = spent_on(lambda: steps(1, len(share) // accumulation))
    Path(scratch, f"{rank}.json").write_text(json.dumps(asdict(spent)))


def _together(scratch: Path) -> Spent:
    """The slowest worker's seconds of the clock, and all workers' CPU seconds."""
    spent = [Spent(**json.loads(path.read_text())) for path in scratch.glob("*.json")]
    return Spent(max(one.wall_s for one in spent), sum(one.cpu_s for one in spent))


def _step_batches(graft: str, clips: int) -> list[TrainingBatch]:
    """The batches of whole steps, in the plan's order."""
    processor = GraftProcessor.from_pretrained(graft)
    examples = made_examples(processor, clips)
    plan = [batch for batch in planned(examples, step_batches=STEP_BATCHES) if batch.rows]
    whole = plan[: len(plan) // STEP_BATCHES * STEP_BATCHES]
    return [
        TrainingBatch(
            inputs=inputs,
            position=batch.position,
            step_position=batch.step_position,
            step_label_count=batch.step_label_count,
            ids=tuple(map(str, batch.rows)),
            clip_count=len(batch.rows),
            token_count=int(inputs["attention_mask"].sum()),
            audio_s=float(inputs["audio_frame_counts"].sum()) / 100,
        )
        for batch, inputs in zip(whole, padded(processor, examples, [batch.rows for batch in whole]), strict=True)
    ]
