"""Sounds: speech of espeak-ng under noise, notes, and the spectra that models take."""

from __future__ import annotations

import functools
import io
import subprocess
import wave
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import signal

RATE = 16_000
Array = npt.NDArray[np.float32]
SENTENCES = (
    (
        "The quick brown fox jumps over the lazy dog near the river.",
        "Please remind me to water the plants tomorrow morning.",
        "What is the weather going to be like in the mountains?",
        "She sold seven silver shells by the sea last summer.",
        "Turn the lights down in the kitchen and close the window.",
        "Our train leaves at half past nine from platform four.",
    ),
    (
        "A large house stood quietly at the end of the street.",
        "Could you read that number back to me once more?",
        "They walked for hours without seeing another person.",
        "Music was playing while the children danced outside.",
        "I would like a table for two people at eight o'clock.",
        "The committee decided to postpone the whole meeting.",
    ),
)
"""Sentences for calibration, and those that are held out."""
VOICES = (
    ("en-us", "en-gb", "en-us+f2", "en-gb+m3", "en-us+m7", "en-gb-scotland+f4"),
    ("en-us+f3", "en-gb+f1", "en-us+m1", "en-gb-x-rp", "en-us+f5", "en-gb-scotland+m2"),
)


@functools.lru_cache(maxsize=512)
def speech(text: str, voice: str, speed: int = 160) -> Array:
    """Speech of espeak-ng at 16 kHz, with a peak of 0.5.

    Raises:
        RuntimeError: espeak-ng is not installed.
    """
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "--stdout", text]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"espeak-ng cannot speak: {error}; apt-get install espeak-ng."
        ) from error
    # the header of a stream has no valid length
    with wave.open(io.BytesIO(done.stdout)) as file:
        rate = file.getframerate()
    samples = np.frombuffer(done.stdout[44 : len(done.stdout) // 2 * 2], np.int16).astype(
        np.float64
    )
    heard = signal.resample_poly(samples, RATE // 50, rate // 50)
    return np.asarray(0.5 * heard / max(float(np.abs(heard).max()), 1.0), np.float32)


def sentence(rng: np.random.Generator, part: int) -> Array:
    """A sentence of one part, in a voice of that part."""
    text, voice = rng.choice(SENTENCES[part]), rng.choice(VOICES[part])
    return speech(str(text), str(voice), int(rng.integers(130, 200)))


def noise(rng: np.random.Generator, length: int) -> Array:
    """White, pink or humming noise with a standard deviation of 1."""
    made = rng.standard_normal(length)
    kind = rng.integers(3)
    if kind == 1:
        spectrum = np.fft.rfft(made)
        made = np.fft.irfft(spectrum / np.sqrt(np.arange(1, len(spectrum) + 1)), length)
    elif kind == 2:
        hum = np.sin(2 * np.pi * rng.uniform(50, 400) * np.arange(length) / RATE)
        made = 0.3 * made + hum
    return np.asarray(made / made.std(), np.float32)


def clip(rng: np.random.Generator, part: int, length: int, said: Array | None = None) -> Array:
    """Speech anywhere in a clip of silence, under noise of 0 to 35 dB less; every eighth clip has no speech."""
    made = np.zeros(length, np.float32)
    if said is None and rng.random() > 0.125:
        said = sentence(rng, part)
    level = 0.05
    if said is not None:
        said = said[: length - 1] * np.float32(10 ** rng.uniform(-0.8, 0.2))
        start = int(rng.integers(length - len(said)))
        made[start : start + len(said)] = said
        level = float(said.std())
    quieter = 10 ** (-rng.uniform(0, 35) / 20)
    mixed = made + np.float32(level * quieter) * noise(rng, length)
    return np.clip(mixed, -1, 1).astype(np.float32)


def clips(rng: np.random.Generator, part: int, count: int, length: int) -> Array:
    """Clips of equal length [count, length]."""
    return np.stack([clip(rng, part, length) for _ in range(count)])


def spectrum(audio: npt.NDArray[np.floating], size: int, hop: int) -> npt.NDArray[np.float64]:
    """Magnitudes [frames, size // 2 + 1] of Hann windows, of one clip."""
    frames = np.lib.stride_tricks.sliding_window_view(audio, size)[::hop]
    return np.asarray(np.abs(np.fft.rfft(frames * np.hanning(size), axis=-1)))


def mel_filters(count: int, size: int, rate: int = RATE) -> npt.NDArray[np.float64]:
    """Triangular filters [count, size // 2 + 1], evenly spaced in mel."""
    mel = np.linspace(0, 2595 * np.log10(1 + rate / 2 / 700), count + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    at = np.linspace(0, rate / 2, size // 2 + 1)
    rising = (at - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - at) / np.diff(edges)[1:, None]
    return np.asarray(np.clip(np.minimum(rising, falling), 0, None))


def mels(audio: Array, count: int, size: int, hop: int) -> npt.NDArray[np.float64]:
    """Mel energies [frames, count] of one clip."""
    return np.asarray(spectrum(audio, size, hop) ** 2 @ mel_filters(count, size).T)


def notes(rng: np.random.Generator, length: int, rate: int) -> Array:
    """Struck strings: three to eight tones with harmonics that decay, at once or in turn."""
    made, time = 0.002 * rng.standard_normal(length), np.arange(length) / rate
    for _ in range(rng.integers(3, 9)):
        pitch = 440 * 2 ** ((rng.integers(40, 84) - 69) / 12)
        start, decay = rng.uniform(0, length / rate * 0.8), rng.uniform(1.5, 5)
        since = time - start
        shape = np.where(since > 0, np.exp(-decay * since) * np.minimum(1, since / 0.005), 0)
        strength = 1 / np.arange(1, 9) ** rng.uniform(0.8, 1.8)
        waves = [a * np.sin(2 * np.pi * pitch * (k + 1) * since) for k, a in enumerate(strength)]
        made = made + rng.uniform(0.1, 0.4) * shape * np.sum(waves, axis=0)
    return np.asarray(made / max(1.0, float(np.abs(made).max())), np.float32)


def windows(values: npt.NDArray[np.float32], length: int, ends: Sequence[int]) -> Array:
    """Windows [count, length, ...] of consecutive rows that end before the given rows."""
    return np.stack([values[end - length : end] for end in ends])
