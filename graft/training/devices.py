"""Know devices by their names: peak arithmetic, memory and its bandwidth; the estimates of training and transcription
use them.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What a device can do at most."""

    flops: float
    """FLOP/s of dense bf16 with float32 sums."""
    bytes_per_s: float
    """Bandwidth of its memory."""
    memory_bytes: float


def _device(tera_flops: float, tera_bytes_per_s: float, gigabytes: float) -> Device:
    return Device(tera_flops * 1e12, tera_bytes_per_s * 1e12, gigabytes * 1e9)


# In TFLOP/s, TB/s and GB: the H200's arithmetic as measured in large matrix products, all else as the makers state it.
# A key matches a device whose name contains all of its words; the first match counts.
DEVICES: dict[tuple[str, ...], Device | None] = {
    ("mig",): None,
    ("laptop",): None,
    ("b200",): _device(2250, 8.0, 180),
    ("gh200",): _device(989, 4.0, 96),
    ("h200",): _device(790, 4.8, 141),
    ("h100", "pcie"): _device(756, 2.0, 80),
    ("h100", "nvl"): _device(835, 3.9, 94),
    ("h100",): _device(989, 3.35, 80),
    ("a100", "80gb"): _device(312, 2.0, 80),
    ("a100",): _device(312, 1.555, 40),
    ("a40",): _device(150, 0.696, 48),
    ("a30",): _device(165, 0.933, 24),
    ("a10",): _device(125, 0.6, 24),
    ("a10g",): _device(70, 0.6, 24),
    ("a6000",): _device(155, 0.768, 48),
    ("l40s",): _device(362, 0.864, 48),
    ("l40",): _device(181, 0.864, 48),
    ("l4",): _device(121, 0.3, 24),
    ("6000", "ada"): _device(364, 0.96, 48),
    ("5090",): _device(210, 1.792, 32),
    ("4090",): _device(165, 1.008, 24),
    ("3090",): _device(71, 0.936, 24),
}
# GB/s that a device sends by NVLink to the others of its machine: half of what makers state, which is both directions.
# Keys match as those of DEVICES; None has no NVLink, or only one to a single neighbour.
NVLINKS: dict[tuple[str, ...], float | None] = {
    ("mig",): None,
    ("pcie",): None,
    ("nvl",): None,
    ("b200",): 900,
    ("gh200",): 450,
    ("h200",): 450,
    ("h100",): 450,
    ("a100",): 300,
}
KNOWN_DEVICES = ", ".join(" ".join(words) for words, device in DEVICES.items() if device)


def find_device(name: str) -> Device | None:
    """Look up a GPU by torch.cuda.get_device_name's answer or a word such as `h200`; None where it is not known."""
    words = name_words(name)
    return next((device for key, device in DEVICES.items() if words.issuperset(key)), None)


def device_peak_flops(name: str) -> float | None:
    """Look up the peak bf16 FLOP/s of a GPU by its name; None where it is not known."""
    device = find_device(name)
    return device.flops if device else None


def device_nvlink(name: str) -> float | None:
    """Look up the bytes per second that a GPU sends by NVLink, by its name; None for none."""
    words = name_words(name)
    speed = next((speed for key, speed in NVLINKS.items() if words.issuperset(key)), None)
    return None if speed is None else speed * 1e9


def name_words(name: str) -> frozenset[str]:
    """Split a GPU's name into words, in lower case."""
    return frozenset(re.split(r"[^a-z0-9]+", name.lower()))
