"""What both training stages are told."""

from typing import Literal

from pydantic import Field

from graft.config import Recipe
from graft.data.settings import AugmentRecipe, Sources
from graft.text.instructions import InstructionRecipe
from graft.training.tracking import WandbRecipe

EXECUTION_KEYS = frozenset(
    {
        *(
            "workers",
            "threads_per_worker",
            "data_workers",
            "gpu",
            "retries",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
        ),
        *("device_resource", "data_resource"),
        *("backend", "zero_stage", "attention", "gradient_checkpointing", "compile", "encoder_cache"),
        *("wandb", "wandb.project", "wandb.name", "wandb.mode"),
    }
)
"""Keys that may differ when a run is taken up again: how it runs. `workers` reaches the result where step_batches is not given."""


class ValidationRecipe(Recipe):
    """What the model is measured on while it trains."""

    data: Sources
    """As the recipe's own data."""
    every: int = Field(default=500, ge=1)
    """Steps between two validations; there is one at the end too."""
    clips: int = Field(default=256, ge=1)
    """How many clips, drawn by the seed where there are more."""
    transcripts: int = Field(default=4, ge=0)
    """Of how many clips the transcripts are shown."""
    wer_clips: int = Field(default=0, ge=0)
    """From how many clips' transcripts the word error rate is told; all of them are written at every validation."""
    patience: int | None = Field(default=None, ge=1)
    """End the run after so many validations in a row without a better loss."""


class TrainRecipe(Recipe):
    """What both stages are told."""

    model: str
    """The graft to train: a folder written by jobs.build, or a hub id."""
    data: Sources
    """Parquet in SpeechBrain's LargeScaleASR schema: files, folders, globs, local, hf:// or s3://; or groups of files, weight, columns."""
    out: str
    """Folder for the results; a run that was cut off goes on from its last checkpoint."""
    validation: ValidationRecipe | None = None
    """Measure the loss on other clips as well; the best weights are then the result."""
    seed: int = 0
    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many updates."""
    token_budget: int = Field(default=8192, ge=1)
    """Tokens of one worker's batch, padding included."""
    max_batch_clips: int = Field(default=64, ge=1)
    window_row_groups: int = Field(default=16, ge=1)
    """Row groups that are read and shuffled together."""
    short_first: bool = False
    """Take the first epoch from the shortest clips to the longest; window_row_groups of all the data keep what is read in memory."""
    step_batches: int | None = Field(default=None, ge=1)
    """Batches to one update, shared out over the workers; given, their number does not change the result. By default one for each."""
    no_speech: float = Field(default=0.0, ge=0)
    """Samples without speech to add, as a share of the others: their answer is empty."""
    augment: AugmentRecipe | None = None
    """How clips vary from epoch to epoch."""
    token_noise: float = Field(default=0.0, ge=0, le=0.9)
    """Share of an answer's tokens in whose place the model reads those of other clips: it then has to listen, where it could guess the
    next word from the words before (Xie et al. 2017, Data noising as smoothing in neural network language models)."""
    words: InstructionRecipe = InstructionRecipe()
    """Instructions and word lists to train besides the default instruction."""
    learning_rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_loss: float = Field(default=24.0, gt=0)
    """Stop when a step's loss exceeds it (nats per label token); not in spelling."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of the frozen weights and of the arithmetic; trained weights are kept in float32."""
    backend: Literal["deepspeed", "torch"] = "deepspeed"
    """DeepSpeed ZeRO, or plain torch: DDP where there are several workers."""
    zero_stage: Literal[1, 2, 3] = 2
    """3 shares out the frozen weights too: for devices that cannot hold them."""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    gradient_checkpointing: bool = False
    """Compute the language model's states again on the way back instead of keeping them: less memory, a third more time."""
    compile: bool = False
    """Compile the layers with torch.compile; the first steps take minutes."""
    encoder_cache: str | None = None
    """Folder for the encoder's outputs, for three epochs and more without augmentation: then each clip is encoded once."""
    workers: int = Field(default=1, ge=1)
    threads_per_worker: int = Field(default=1, ge=1)
    data_workers: int = Field(default=2, ge=1)
    """CPU workers that decode and featurize."""
    gpu: bool = False
    """One GPU for each worker."""
    device_resource: str | None = None
    """A resource of the cluster's own, of which each worker takes one: workers then sit on the nodes that have it."""
    data_resource: str | None = None
    """The same for data workers."""
    retries: int = Field(default=3, ge=0)
    """How often workers are started anew after one of them or its node died."""
    log_every: int = Field(default=10, ge=1)
    checkpoint_every: int = Field(default=500, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    wandb: WandbRecipe | None = None
    """Show the run on Weights & Biases too."""

    @property
    def accumulation(self) -> int:
        """Batches of each worker to one update."""
        return -(-(self.step_batches or self.workers) // self.workers)
