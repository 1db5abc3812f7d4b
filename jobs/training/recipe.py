"""The recipe keys that both training stages share."""

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from graft.config import Recipe
from graft.data.settings import AugmentRecipe, NamedSources, Sources
from graft.keys import Checkpoint, DataKey, MachineKey, ModelKey, OutputKey, ScheduleKey
from graft.text.instructions import InstructionRecipe
from graft.training.tracking import WandbRecipe

EXECUTION_KEYS = frozenset(
    {
        *("workers", "threads_per_worker", "data_workers", "gpu", "device_resource", "data_resource", "retries"),
        *("log_every", "checkpoint_every", "keep_checkpoints", "max_masked"),
        *("backend", "zero_stage", "attention", "gradient_checkpointing", "compile", "encoder_cache"),
        *("wandb", "wandb.project", "wandb.name", "wandb.mode"),
    }
)
"""Keys that say how a run is executed; they may differ when it is resumed.

`workers` changes the result where step_batches is not given.
"""

LONGER_RUN_KEYS = frozenset(
    {
        *("epochs", "max_steps", "learning_rate", "schedule", "warmup_steps"),
        *(f"learning_rates.{part}" for part in ("projector", "adapters", "encoder")),
    }
)
"""Keys that may differ, too, where a run goes on with more epochs or steps than it had."""


class ValidationRecipe(Recipe):
    """Measure loss and word error rate on other clips during training, on one set of them or several."""

    data: NamedSources
    """Labelled clips for validation, given like the recipe's `data`, or several sets of them by names of your own."""
    every: int = Field(default=500, ge=1)
    """Steps between two validations. The last step is always followed by one."""
    clips: int = Field(default=256, ge=1)
    """Number of clips of each set of which the loss is measured. The seed chooses them where a set has more."""
    transcripts: int = Field(default=4, ge=0)
    """Number of clips of each set whose transcripts are logged at every validation."""
    wer_clips: int = Field(default=0, ge=0)
    """Number of clips of each set that are transcribed at every validation for the word error rate, which is counted by
    language where the data names several. 0 measures none."""
    best_by: Literal["loss", "wer"] = "loss"
    """Metric by which the best weights are chosen. wer needs wer_clips."""
    best_set: str | None = None
    """Name of the set whose metric chooses the best weights. null takes all sets together, each label or word counted
    once."""
    patience: int | None = Field(default=None, ge=1)
    """End the run after this many validations in a row without better weights. null never ends it early."""

    @property
    def sets(self) -> dict[str, Sources]:
        """The sets by name; the name of a single one is ""."""
        return dict(self.data) if isinstance(self.data, Mapping) else {"": self.data}

    @property
    def monitor(self) -> str:
        """Name of the metric by which the best weights are chosen, as in metrics.jsonl."""
        return f"validation_{self.best_by}" + (f"/{self.best_set}" if self.best_set else "")

    @model_validator(mode="after")
    def _check_best(self) -> Self:
        if self.best_by == "wer" and not self.wer_clips:
            raise ValueError("best_by=wer needs transcripts: give wer_clips, the number of clips of each set")
        if self.best_set is not None and self.best_set not in (names := [name for name in self.sets if name]):
            known = f"give one of {', '.join(names)}" if names else "give data.NAME for each set, or leave it out"
            raise ValueError(f"there is no validation set best_set={self.best_set}: {known}")
        return self


class TrainRecipe(Recipe):
    """Settings of a training stage."""

    model: ModelKey[Checkpoint]
    """Graft to train: a folder written by graft build, or a hub id."""
    data: DataKey[Sources]
    """Parquet files with labelled clips in the schema of SpeechBrain's LargeScaleASR, local, hf:// or s3://: files,
    folders or globs, or groups with the keys files, weight and columns."""
    out: OutputKey[str]
    """Folder for the results. The same command resumes an interrupted run from its newest checkpoint there."""
    validation: DataKey[ValidationRecipe | None] = None
    """Validation on other clips; the result then has the weights of the best validation. null trains without."""
    seed: ScheduleKey[int] = 0
    """Seed of the batches' order, of augmentation, and of fresh adapters."""
    epochs: ScheduleKey[int] = Field(default=1, ge=1)
    """Number of passes over the data. The same command with more of them goes on where a finished run ended."""
    max_steps: ScheduleKey[int | None] = Field(default=None, ge=1)
    """Stop after this many updates of the weights. null trains all epochs. A finished run goes on with more of them."""
    average_checkpoints: ScheduleKey[int] = Field(default=1, ge=1)
    """Number of last checkpoints, checkpoint_every steps apart, whose trained weights are averaged at the end. The
    average is the result where its validation is better than the best one, or without validation. 1 averages none."""
    token_budget: ScheduleKey[int] = Field(default=8192, ge=1)
    """Most tokens in a batch of one worker: number of clips times the tokens of the longest, audio tokens included."""
    max_batch_clips: ScheduleKey[int] = Field(default=64, ge=1)
    """Most clips in one batch."""
    window_clips: DataKey[int] = Field(default=2048, ge=1)
    """Most clips that are read and shuffled together, in whole Parquet row groups or in a slice of a larger one. More
    shuffle better and take more memory of the reader, which --plan prints."""
    short_first: DataKey[bool] = False
    """Order each window of the first epoch from its shortest to its longest clips; where window_clips are as many as
    the data has, the whole epoch."""
    step_batches: ScheduleKey[int | None] = Field(default=None, ge=1)
    """Number of batches in one update, divided among the workers. Where it is given, the number of workers does not
    change the result. null gives each worker one."""
    no_speech: DataKey[float] = Field(default=0.0, ge=0)
    """Generated clips without speech and with an empty transcript to add, as a share of the number of other clips."""
    max_masked: DataKey[float] = Field(default=0.1, ge=0, lt=1)
    """End the run with an error when more than this share of the clips cannot be read, and so is masked. It is judged
    after 1,000 clips, at the end, and for the validation's clips at the start."""
    augment: DataKey[AugmentRecipe | None] = None
    """Random changes of the audio in every epoch. null trains on the clips as they are."""
    token_noise: DataKey[float] = Field(default=0.0, ge=0, le=0.9)
    """Share of the answer's input tokens that are replaced by tokens of another clip's answer, so that the model must
    use the audio instead of guessing from the words before (Xie et al. 2017, Data noising as smoothing in neural
    network language models)."""
    words: DataKey[InstructionRecipe] = InstructionRecipe()
    """Instructions and word lists to train besides the default instruction."""
    learning_rate: ScheduleKey[float] = Field(default=1e-3, gt=0)
    """Learning rate after the warm-up."""
    schedule: ScheduleKey[Literal["constant", "linear", "cosine"]] = "cosine"
    """Course of the learning rate after the warm-up: constant, or a linear or cosine decay to zero at the last step."""
    warmup_steps: ScheduleKey[int] = Field(default=0, ge=0)
    """Number of first steps in which the learning rate rises linearly from zero."""
    weight_decay: ScheduleKey[float] = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: ScheduleKey[float] = Field(default=1.0, gt=0)
    """Norm to which larger gradients are clipped."""
    max_loss: ScheduleKey[float] = Field(default=24.0, gt=0)
    """End the run with an error when a step's loss exceeds this, in nats per label token. CTC has no such limit."""
    dtype: ModelKey[Literal["fp32", "bf16"]] = "bf16"
    """Precision of the frozen weights and of the arithmetic. Trained weights are always float32."""
    backend: MachineKey[Literal["deepspeed", "torch"]] = "deepspeed"
    """Training backend: DeepSpeed ZeRO, or plain torch with DDP where there are several workers."""
    zero_stage: MachineKey[Literal[1, 2, 3]] = 2
    """ZeRO stage of the deepspeed backend: 1 shards the optimizer's states over the workers, 2 the gradients too, 3 all
    weights too, for devices that cannot hold the frozen ones."""
    attention: ModelKey[Literal["sdpa", "flash_attention_2", "eager"]] = "sdpa"
    """Attention implementation of transformers. flash_attention_2 needs the package flash_attn."""
    gradient_checkpointing: MachineKey[bool] = False
    """Recompute the language model's activations in the backward pass instead of keeping them: less memory, a third
    more time."""
    compile: MachineKey[bool] = False
    """Compile the layers with torch.compile; the first steps then take minutes."""
    encoder_cache: DataKey[str | None] = None
    """Folder that keeps the encoder's outputs, so that each clip is encoded once. It pays from three epochs on, and
    excludes augment. null encodes each clip in every epoch."""
    workers: MachineKey[int] = Field(default=1, ge=1)
    """Number of training workers, one process each."""
    threads_per_worker: MachineKey[int] = Field(default=1, ge=1)
    """Number of CPU threads of each training worker."""
    data_workers: MachineKey[Annotated[int, Field(ge=1)] | Literal["auto"]] = "auto"
    """Number of processes that decode audio and compute features, on one CPU each. auto estimates from the GPUs and the
    model how much audio the run takes, has at most as many as the cluster has CPUs for, and prints the number."""
    gpu: MachineKey[bool] = False
    """Give each training worker a GPU."""
    device_resource: MachineKey[str | None] = None
    """Custom resource of the Ray cluster of which each training worker takes one, which puts workers on nodes that have
    it. null needs none."""
    data_resource: MachineKey[str | None] = None
    """Custom resource of the Ray cluster of which each data worker takes one. null needs none."""
    retries: MachineKey[int] = Field(default=3, ge=0)
    """Number of times that the workers are restarted from the newest checkpoint after one of them or its node died."""
    log_every: OutputKey[int] = Field(default=10, ge=1)
    """Steps between two lines of the log."""
    checkpoint_every: OutputKey[int] = Field(default=500, ge=1)
    """Steps between two checkpoints. The last step and the best validation are always saved."""
    keep_checkpoints: OutputKey[int] = Field(default=2, ge=1)
    """Number of newest checkpoints to keep, besides that of the best validation."""
    wandb: OutputKey[WandbRecipe | None] = None
    """Log the run to Weights & Biases, too. null does not."""

    def is_longer_than(self, other: Self) -> bool:
        """Tell whether the run has more epochs or steps than another, and less of neither."""
        own, others = ((one.epochs, one.max_steps or math.inf) for one in (self, other))
        return own != others and own[0] >= others[0] and own[1] >= others[1]

    @property
    def accumulation(self) -> int:
        """Number of batches of each worker in one update."""
        return -(-(self.step_batches or self.workers) // self.workers)
