"""Make files that break decoders: crafted ones, and real ones that are cut, flipped and spliced at random."""

import gzip
import io
import random
import struct
import wave
from collections.abc import Iterator

import numpy as np
import soundfile

from tests.support import media

RATE = 16_000
FFMPEG_FORMATS = {"webm": ("libopus", "webm"), "m4a": ("aac", "ipod")}
SOUNDFILE_FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", None),
    "ogg": ("OGG", "VORBIS"),
}


def encode_sound(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def real_files() -> dict[str, bytes]:
    """Return two seconds of real speech in each of six formats."""
    samples = media.speech(RATE, seconds=2, channels=1).astype(np.float32)
    files = {kind: media.write(samples, RATE, *form) for kind, form in SOUNDFILE_FORMATS.items()}
    wide = media.speech(48_000, seconds=2, channels=1)
    return files | {kind: media.encode(wide, 48_000, *form) for kind, form in FFMPEG_FORMATS.items()}


def mutated(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of mutated files, always the same ones for a seed."""
    files, rng = real_files(), random.Random(seed)
    for number in range(count):
        kind = list(files)[number % len(files)]
        name, data = _mutate(bytearray(files[kind]), rng, list(files.values()))
        yield f"{number} {kind} {name}", bytes(data)


def _mutate(data: bytearray, rng: random.Random, others: list[bytes]) -> tuple[str, bytearray]:
    size = len(data)
    start = rng.randrange(size)
    length = rng.randrange(1, max(2, (size - start) // 2))
    match rng.randrange(8):
        case 0:
            return "truncated", data[:start]
        case 1:
            return "beheaded", data[rng.randrange(1, 200) :]
        case 2:  # bytes of the header, which holds sizes and counts
            for _ in range(rng.randrange(1, 8)):
                data[rng.randrange(min(size, 200))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
            return "header", data
        case 3:
            for _ in range(rng.randrange(1, 64)):
                data[rng.randrange(size)] ^= 1 << rng.randrange(8)
            return "flipped", data
        case 4:
            data[start : start + length] = bytes([rng.choice([0, 0xFF])]) * length
            return "blanked", data
        case 5:
            return "repeated", data[: start + length] + data[start:]
        case 6:
            place = rng.randrange(min(size, 400)) & ~3
            data[place : place + 4] = struct.pack(
                rng.choice("<>") + "I", rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
            )
            return "number", data
        case _:
            other = rng.choice(others)
            return "spliced", data[:start] + other[rng.randrange(len(other)) :]


def crafted() -> dict[str, bytes]:
    """Return crafted files by name."""
    voice = media.speech(RATE, seconds=1, channels=1).astype(np.float32)
    wav, tone = encode_sound(voice), np.full((RATE, 1), 0.1, np.float32)
    broken = {"NaN": np.nan, "infinite": np.inf, "loud": 3e38}
    tall = np.random.default_rng(0).standard_normal((192_000, 8)).astype(np.float32) * 0.1
    return {
        "zero length": b"",
        "one byte": b"R",
        "one sample wav": encode_sound(tone[:1]),
        "one sample flac": encode_sound(tone[:1], kind="FLAC"),
        "no sample": encode_sound(tone[:0]),
        "192 kHz 8 channels wav": encode_sound(tall, 192_000, subtype="FLOAT"),
        "192 kHz 8 channels flac": encode_sound(tall, 192_000, "FLAC"),
        "64 channels": encode_sound(np.repeat(tone[:1000], 64, axis=1)),
        "1 Hz": encode_sound(tone[:100], 1),
        "film without sound": media.film(sound=None),
        "film with sound": media.film(sound=np.zeros(44_100, np.float32)),
        "ten hours of silence": silence(36_000),
        "zeros": bytes(2**20),
        "noise": random.Random(0).randbytes(2**18),
        "text": b"Lorem ipsum " * 1000,
        "gzip bomb": gzip.compress(bytes(2**26)),
        "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "svg": b'<?xml version="1.0"?><svg xmlns:xlink="http://www.w3.org/1999/xlink"><image xlink:href="file:///etc/passwd"/></svg>',
        "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "remote playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "list of files": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "elf": b"\x7fELF" + bytes(1000),
        **{
            f"{name} floats": encode_sound(np.where(np.arange(RATE)[:, None] % 100, tone, value), subtype="FLOAT")
            for name, value in broken.items()
        },
        **_wavs(wav),
        **_bombs(wav),
    }


def silence(seconds: int) -> bytes:
    """Return a small FLAC file of so many seconds."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", RATE, 1, format="FLAC") as out:
        for _ in range(seconds // 100):
            out.write(np.zeros(100 * RATE, np.int16))
    return file.getvalue()


def _wavs(wav: bytes) -> dict[str, bytes]:
    """Return WAV files with false values in their headers."""

    def with_field(place: int, kind: str, value: int) -> bytes:
        return wav[:place] + struct.pack("<" + kind, value) + wav[place + struct.calcsize(kind) :]

    counts = {"B": 2**8, "H": 2**16, "I": 2**32}
    fields = {
        "length": (4, "I"),
        "format": (20, "H"),
        "channels": (22, "H"),
        "rate": (24, "I"),
        "block": (32, "H"),
        "bits": (34, "H"),
        "data": (40, "I"),
    }
    falsified = {
        f"wav with {name} {value}": with_field(place, kind, value)
        for name, (place, kind) in fields.items()
        for value in (0, 1, counts[kind] // 2, counts[kind] - 1)
    }
    nested = io.BytesIO()
    with wave.open(nested, "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(wav)
    return falsified | {
        "wav in wav": nested.getvalue(),
        "100,000 chunks": wav[:12] + b"junk\0\0\0\0" * 100_000 + wav[12:],
    }


def _bombs(wav: bytes) -> dict[str, bytes]:
    """Return files whose headers make decoders allocate much memory or loop for long."""
    flac = bytearray(encode_sound(np.zeros((RATE, 1)), kind="FLAC"))
    flac[21:26] = b"\x0f" + b"\xff" * 4  # 2^36 - 1 samples
    id3 = b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + b"\xff\xfb\x90\x00" + bytes(1000)
    box = struct.pack(">I4s", 8, b"moov")
    deep = b"".join(struct.pack(">I4s", 8 * left, b"trak") for left in range(5_000, 0, -1))
    table = struct.pack(">I4sII", 16, b"stsz", 0, 0) + struct.pack(">I", 2**32 - 1)
    head = struct.pack(">I4s4sI", 16, b"ftyp", b"M4A ", 0)
    return {
        "endless flac": bytes(flac),
        "flac with a picture of 16 MB": b"fLaC\x06\xff\xff\xff" + bytes(100),
        "mp3 with a tag of 256 MB": id3,
        "mp4 of nothing": head + box,
        "mp4 of 2^63": head + struct.pack(">I4sQ", 1, b"moov", 2**63 - 1),
        "mp4 in depth": head + struct.pack(">I4s", 8 * 5_001, b"moov") + deep,
        "mp4 with a table of 2^32": head + struct.pack(">I4s", 8 + len(table), b"moov") + table,
        "webm of unknown length": b"\x1a\x45\xdf\xa3\x9fB\x86\x81\x01B\xf7\x81\x01B\xf2\x81\x04B\xf3\x81\x08"
        + b"B\x82\x84webm\x18S\x80g\x01"
        + b"\xff" * 7,
        "ogg of empty pages": (b"OggS\0\x02" + bytes(20) + b"\x00") * 10_000,
        "au of 2^32": b".snd" + struct.pack(">5I", 24, 2**32 - 1, 3, RATE, 2**31) + bytes(100),
        "aiff": b"FORM\xff\xff\xff\xffAIFFCOMM\0\0\0\x12\xff\xff\xff\xff\xff\xff\0\x10" + b"\x7f\xff" + b"\xff" * 8,
        "rf64": b"RF64\xff\xff\xff\xffWAVEds64" + struct.pack("<IQQQI", 28, 2**63, 2**63, 2**63, 2**31) + wav[12:],
    }
