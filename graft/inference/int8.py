"""Compute with int8 weights on a CPU: a model's linear layers are replaced by ones that multiply 8-bit integers.

Weights are rounded once, each output channel on a scale of its own. The inputs of a layer are rounded at each call,
each row between its own least and greatest number, so that a layer's rows do not change one another. Products are added
up exactly, in 32 bits, by oneDNN. Embeddings, convolutions, norms, attention and the projector stay in float32; the
last bits of their sums depend on the batch's shape and decide how numbers near a border are rounded, so that a batch
may still change a text.
"""

from collections.abc import Iterator
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from graft.checkpoints.loading import multiplies_int8
from graft.errors import ModelError

LARGEST = 127
"""The greatest weight as an integer; the least is its negative."""
NOT_QUANTIZED = ("audio_projector", "model.visual")
"""Parts that keep float32: the projector, which is small and alone in what it was trained for, and Qwen2-VL's eyes."""


def check_int8(device: str, *, engine: Literal["transformers", "vllm"] = "transformers") -> None:
    """Raise ModelError where a device or an engine does not compute with int8 weights as this module does."""
    if engine == "vllm":
        raise ModelError("dtype=int8 does not go with engine=vllm: leave it out; `quantization` names a method of vLLM")
    if torch.device(device).type != "cpu":
        raise ModelError("dtype=int8 computes on CPUs only: leave it out on a GPU, or give dtype=bf16")


def quantize_to_int8(model: nn.Module) -> None:
    """Replace the linear layers of a float32 model on a CPU by Int8Linear, one after the other.

    Raises ModelError where the processor has no instructions for it.
    """
    if not multiplies_int8():
        raise ModelError(
            "dtype=int8 needs a processor with VNNI or AMX, and this one has neither: leave it out; fp32 is faster here"
        )
    for name, linear in list(int8_layers(model)):
        model.set_submodule(name, Int8Linear(linear))
    for parameter in model.parameters():  # mapped from the file of all weights, which their copies let go of
        parameter.data = parameter.data.clone()


def int8_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the names and layers of a model that quantize_to_int8 replaces."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith(NOT_QUANTIZED):
            yield name, module


def quantized_bytes(model: nn.Module) -> float:
    """Return the bytes that a float32 model's weights will take in int8; the model may be on the meta device."""
    layers = [linear for _, linear in int8_layers(model)]
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    replaced = {id(linear.weight) for linear in layers} - embeddings  # a head that shares its weights leaves them
    kept = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in replaced)
    # Besides its weights a layer has a scale, a zero point and a sum for each output channel.
    return 4.0 * kept + sum(linear.weight.numel() + 12 * linear.out_features for linear in layers)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights for inference on a CPU; it can be neither trained nor saved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()  # (out, in)
        scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(weight.dtype).tiny) / LARGEST  # (out,)
        rounded = (weight / scales[:, None]).round()
        self._weight = torch.ops.onednn.qlinear_prepack(rounded.to(torch.int8), None)  # in oneDNN's own layout
        self._scales = scales
        self._zero_points = torch.zeros(len(scales), dtype=torch.int32)
        self._sums = (rounded.sum(dim=1) * scales)[None]  # (1, out): what an input of ones gives
        self._bias = None if linear.bias is None else linear.bias.detach().clone()

    def forward(self, states: Tensor) -> Tensor:
        """Multiply states (..., in), float32; returns (..., out)."""
        # (rows, in + 8): each row's numbers as bytes, then, as two float32, its scale and its least number. Its numbers
        # are about bytes * scale + least, and so the product is the bytes' product * scale + least * the weights' sums.
        coded = torch.ops.quantized.embedding_bag_byte_prepack(states.reshape(-1, states.shape[-1]))
        scale, least = coded[:, -8:].view(torch.float32).split(1, dim=1)  # (rows, 1) each
        unary: Any = (1.0, 0, torch.float32, "none", [], "")  # of the output: no scale, no zero point, no activation
        output = torch.ops.onednn.qlinear_pointwise(
            coded[:, :-8], 1.0, 0, self._weight, self._scales, self._zero_points, None, *unary
        )
        output = output.mul_(scale).addmm_(least, self._sums)
        if self._bias is not None:
            output += self._bias
        return output.view(*states.shape[:-1], -1)

    def train(self, mode: bool = True) -> "Int8Linear":
        """Raise ModelError for any mode but inference's."""
        return super().train(mode) if not mode else self._refuse("train")

    def _save_to_state_dict(self, *_: Any) -> None:
        self._refuse("save")

    def _refuse(self, verb: str) -> NoReturn:
        raise ModelError(f"a model in int8 only transcribes: open it without dtype=int8 to {verb} it")
