"""Check before training that audio changes the logits, and that only answer tokens are labels."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from graft.errors import DataError, ModelError

LEAST_CHANGE = 1e-6
"""Least mean change of the logits; without a working audio path equal inputs give exactly equal logits."""


@torch.no_grad()
def preflight(
    model: nn.Module, inputs: Mapping[str, Tensor], prompt_end: Sequence[int], *, token_noise: bool = False
) -> tuple[float, int]:
    """Check a training batch of at least one clip; the other arguments are check_labels'.

    Returns the mean absolute change of the answers' logits with another clip's audio, and the number of labels checked.

    The model's mode is not changed: on a CPU, bitsandbytes repacks NF4 weights for inference at their first use in eval
    mode, which cannot be undone. Raises ModelError when other audio does not change the logits, and DataError when a
    label is not in the answer.
    """
    label_count = check_labels(inputs["input_ids"], inputs["labels"], prompt_end, token_noise=token_noise)
    if "audio_states" in inputs:  # already encoded
        own, other = ({"audio_states": states} for states in (inputs["audio_states"], inputs["audio_states"].flip(0)))
    else:
        swapped = swap_audio(inputs["input_features"], inputs["audio_frame_counts"])
        own, other = ({"input_features": features} for features in (inputs["input_features"], swapped))
    change = float((_answer_logits(model, inputs, own) - _answer_logits(model, inputs, other)).abs().mean())
    if not change > LEAST_CHANGE:
        raise ModelError(
            f"the audio path is dead: other audio changes the logits by {change:.1e}: "
            "check the projector and the audio tower"
        )
    return change, label_count


def check_labels(input_ids: Tensor, labels: Tensor, prompt_end: Sequence[int], *, token_noise: bool = False) -> int:
    """Count the labels of right-padded rows (rows, length); `prompt_end` are the ids that end every prompt.

    Raises DataError unless each row's labels are its last ids, right after the prompt's end. With `token_noise` the
    decoder's inputs differ from the labels, so that only the last id is compared.
    """
    end = torch.tensor(prompt_end, device=input_ids.device)
    for row, (ids, row_labels) in enumerate(zip(input_ids, labels, strict=True)):
        places = (row_labels != -100).nonzero().flatten()
        if not len(places):
            continue
        first, last = int(places[0]), int(places[-1])
        compared = slice(last if token_noise else first, last + 1)
        if len(places) != last - first + 1 or not torch.equal(ids[compared], row_labels[compared]):
            raise DataError(
                f"row {row}: labels are not the answer's own ids: this is a fault in how the batch was made"
            )
        if not torch.equal(ids[max(0, first - len(end)) : first], end):
            raise DataError(
                f"row {row}: a prompt token is a label (at {first}): this is a fault in how the batch was made"
            )
    return int((labels != -100).sum())


def swap_audio(input_features: Tensor, frame_counts: Tensor) -> Tensor:
    """Replace each clip's frames by the next clip's, repeated or cut to its length; a single clip's are reversed."""
    swapped = torch.zeros_like(input_features)
    clips = len(frame_counts)
    for index, count in enumerate(frame_counts.tolist()):
        donor = (index + 1) % clips
        frames = input_features[donor, :, : int(frame_counts[donor])]
        frames = frames.flip(-1) if donor == index else frames
        length = min(count + 2, input_features.shape[-1])
        swapped[index, :, :length] = frames.repeat(1, -(-length // frames.shape[1]))[:, :length]
    return swapped


def _answer_logits(model: nn.Module, inputs: Mapping[str, Tensor], audio: Mapping[str, Tensor]) -> Tensor:
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "audio_frame_counts")}
    torch.manual_seed(0)  # the same dropout, if any, for both
    # A cache would make torch.compile compile a layer again for each layer's index in it.
    logits = model(**given, **audio, use_cache=False).logits  # (rows, length, vocabulary)
    return logits[:, :-1][inputs["labels"][:, 1:] != -100].float()
