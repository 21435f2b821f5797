"""Measured speed of a model on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch


def measure(call: Callable[[], object], seconds: float = 0.5, least: int = 5) -> tuple[float, float]:
    """Median and interquartile range, in seconds, of calls made for about ``seconds`` after two warm-up calls."""
    call()
    call()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < least or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    quarter, half, three_quarters = np.percentile(times, [25, 50, 75])
    return float(half), float(three_quarters - quarter)


def encoder_speed(encoder: torch.nn.Module, length: int, vocab_size: int) -> dict[str, Any]:
    """Latency at batch 1 (ms) and throughput at batch 16 (tokens/s) of the fp32 encoder in PyTorch eager on the CPU.

    Sequences are full (no padding). Quantized and sparse weights are unpacked: only smaller architectures are faster.
    """
    generator = torch.Generator().manual_seed(0)
    encoder.eval()
    with torch.inference_mode():
        one = torch.randint(5, vocab_size, (1, length), generator=generator)
        many = torch.randint(5, vocab_size, (16, length), generator=generator)
        latency, spread = measure(lambda: encoder(one, padded=False))
        batch_time, _ = measure(lambda: encoder(many, padded=False))
    return {
        "latency_ms": 1e3 * latency, "latency_iqr_ms": 1e3 * spread, "throughput": many.numel() / batch_time,
        "engine": f"pytorch-{torch.__version__}-eager-fp32-cpu", "threads": torch.get_num_threads(),
    }  # fmt: skip


def decoding_speed(
    greedy: Callable[[], int], beam: Callable[[], int], single: Callable[[], int], sentences: int
) -> dict[str, Any]:
    """Speed of a translator in fp32 in PyTorch eager on the CPU, weights unpacked as above.

    Each call translates and returns the number of target tokens that it gives out, ``</s>`` included: ``greedy`` and
    ``beam`` a batch of sentences (tokens/s; only the best hypothesis counts), ``single`` so many ``sentences`` one
    after the other, by beam search (ms for one; the range is that of all of them together).
    """
    speeds = {name: call() / measure(call)[0] for name, call in (("throughput", greedy), ("throughput_beam", beam))}
    latency, spread = measure(single)
    return {
        "latency_ms": 1e3 * latency / sentences, "latency_iqr_ms": 1e3 * spread / sentences, **speeds,
        "engine": f"pytorch-{torch.__version__}-eager-fp32-cpu", "threads": torch.get_num_threads(),
    }  # fmt: skip


def example_latency(model: torch.nn.Module, examples: Iterable[torch.Tensor], seconds: float = 1.0) -> float:
    """Mean latency (ms) of single examples, int64 [1, length] without padding, through the whole model as above.

    They are taken in turn, each for the median of three calls, for about ``seconds`` and at least 32 of them.
    """
    model.eval()
    times: list[float] = []
    begin = time.perf_counter()
    with torch.inference_mode():
        for tokens in examples:
            calls = []
            for _ in range(3):
                start = time.perf_counter()
                model(tokens, padded=False)
                calls.append(time.perf_counter() - start)
            times.append(sorted(calls)[1])
            if len(times) >= 32 and time.perf_counter() - begin >= seconds:
                break
    return 1e3 * float(np.mean(times))
