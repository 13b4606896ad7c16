"""From raw samples to metrics and flags, on measurements written by hand."""

from __future__ import annotations

import numpy as np
import pytest

from core.profile.measured import Facts, Measured, Memory, PhaseEnd, Sample
from core.profile.runtimes.torch_eager import TorchEagerSettings
from core.profile.summary import summarise

SETTINGS = TorchEagerSettings(tier="rapid", prompt_tokens=100, new_tokens=10, batch=2, threads=1)
CPU_FACTS = Facts(
    dtype="float32",
    attention_kernel="sdpa",
    weights_memory_bytes=1000,
    device_peak_bytes=None,
    conditions={"fp32_path": "exact fp32"},
    notes=(),
)


def phase(name, values, *, warmup=0, contended=(), mhz=None):
    mhz = mhz or [None] * len(values)
    return [
        Sample(
            phase=name,
            iteration=i,
            value_ms=v,
            warmup=i < warmup,
            contended=i in contended,
            other_cpu=0.5 if i in contended else 0.0,
            clock_mhz=mhz[i],
        )
        for i, v in enumerate(values)
    ]


def measured(*phases, family="decoder", steady=True, other_cpu=0.0, facts=CPU_FACTS):
    samples = [*phase("load", [300.0]), *phase("first_forward", [90.0])]
    samples += [sample for one in phases for sample in one]
    return Measured(
        family=family,
        samples=tuple(samples),
        phases={one[0].phase: PhaseEnd(steady=steady, ended_by="enough") for one in phases},
        memory=Memory(baseline_bytes=500, peak_bytes=2000, inference_peak_bytes=1800),
        facts=facts,
        environment={"hash": "e" * 64},
        files="f" * 64,
        other_cpu_at_start=other_cpu,
        load_average=0.1,
        seconds=12.0,
    )


def metrics(result):
    return {metric.name: metric for metric in result.metrics}


def shuffled(values, seed=5):
    return np.random.default_rng(seed).permutation(values).astype(float).tolist()


def decoder(**changes):
    return measured(
        phase("prefill", [999.0, *shuffled(range(1, 31))], warmup=1),
        phase("decode", shuffled(range(1, 101))),
        **changes,
    )


def test_numbers_by_hand():
    found = metrics(summarise(decoder(), "torch_eager", SETTINGS))
    ttft = found["ttft_ms"]
    assert (ttft.value, ttft.low, ttft.high, ttft.n) == (15.5, 10.0, 21.0, 30)
    prefill = found[
        "prefill_tokens_per_s"
    ]  # 2 × 100 tokens; the slow end of the time is the low end of the rate
    assert prefill.value == pytest.approx(200 / 15.5 * 1e3)
    assert (prefill.low, prefill.high) == (pytest.approx(200 / 21 * 1e3), pytest.approx(200 / 10 * 1e3))
    assert found["decode_tokens_per_s"].value == pytest.approx(2 / 50.5 * 1e3)
    p90 = found["tpot_p90_ms"]
    assert (p90.value, p90.low, p90.high) == (90.0, 84.0, 96.0)
    assert "tpot_p99_ms" not in found  # 100 samples cannot show it
    assert found["load_ms"].value == 300.0
    assert found["load_ms"].low is None
    assert found["peak_memory_bytes"].value == 2000
    assert found["inference_peak_memory_bytes"].value == 1800


def test_a_clean_measurement_has_no_flags():
    assert summarise(decoder(), "torch_eager", SETTINGS).flags == ()


def test_every_sample_is_kept_and_marked():
    result = summarise(decoder(), "torch_eager", SETTINGS)
    assert len(result.frame) == 2 + 31 + 100
    assert result.frame.loc[result.frame["warmup"], "value_ms"].tolist() == [999.0]
    assert result.views[0].frame == "samples"


def test_contended_samples_are_left_out_while_enough_clean_ones_remain():
    values = [*shuffled(range(1, 31)), *[500.0] * 20]
    contended = range(30, 50)
    result = summarise(
        measured(phase("prefill", values, contended=contended), phase("decode", shuffled(range(1, 101)))),
        "torch_eager",
        SETTINGS,
    )
    assert metrics(result)["ttft_ms"].value == 15.5
    assert "contention" not in result.flags
    assert any("20 of 50 prefill samples were contended" in note for note in result.notes)
    assert result.frame["contended"].sum() == 20


def test_too_few_clean_samples_means_all_are_used_and_the_run_is_flagged():
    values = shuffled(range(1, 31))
    result = summarise(
        measured(phase("prefill", values, contended=range(25)), phase("decode", shuffled(range(1, 101)))),
        "torch_eager",
        SETTINGS,
    )
    assert metrics(result)["ttft_ms"].n == 30
    assert result.flags == ("contention",)


def test_flags_of_a_troubled_run():
    slow = [2000.0] * 20 + [1500.0] * 20
    result = summarise(
        measured(
            phase("prefill", shuffled(range(1, 9))),
            phase("decode", shuffled(range(1, 41)), mhz=slow),
            steady=False,
            other_cpu=0.4,
        ),
        "torch_eager",
        SETTINGS,
    )
    assert result.flags == ("load_too_high", "no_steady_state", "n_too_small", "frequency_drop")
    assert any("8 samples are too few for a 90th percentile" in note for note in result.notes)


def test_samples_too_alike_for_an_interval_are_told_and_flagged():
    drifting = [float(i) for i in range(1, 31)]
    result = summarise(
        measured(phase("prefill", drifting), phase("decode", shuffled(range(1, 101)))),
        "torch_eager",
        SETTINGS,
    )
    found = metrics(result)["ttft_ms"]
    assert found.low is None
    assert "they count as" in found.interval
    assert result.flags == ("n_too_small",)


def test_an_encoder_has_a_latency_and_no_decode():
    found = metrics(
        summarise(
            measured(phase("forward", shuffled(range(1, 31))), family="encoder"), "torch_eager", SETTINGS
        )
    )
    assert found["latency_ms"].value == 15.5
    assert found["prefill_tokens_per_s"].value == pytest.approx(200 / 15.5 * 1e3)
    assert not {"decode_tokens_per_s", "ttft_ms", "tpot_ms"} & set(found)


def test_a_vision_model_counts_images():
    found = metrics(
        summarise(
            measured(phase("forward", shuffled(range(1, 31))), family="vision"), "torch_eager", SETTINGS
        )
    )
    assert found["images_per_s"].value == pytest.approx(2 / 15.5 * 1e3)
    assert "prefill_tokens_per_s" not in found


def test_a_gpus_peak_is_the_allocators_and_the_hosts_stands_beside_it():
    facts = CPU_FACTS.model_copy(update={"device_peak_bytes": 77})
    found = metrics(summarise(decoder(facts=facts), "torch_eager", SETTINGS))
    assert found["peak_memory_bytes"].value == 77
    assert found["host_peak_memory_bytes"].value == 2000


def test_the_protocol_is_named_and_hashed():
    provenance = summarise(decoder(), "torch_eager", SETTINGS).provenance
    assert provenance.protocol.startswith("fixed-ids/2 rapid ")
    assert provenance.conditions["protocol_hash"] == SETTINGS.protocol().hash
    assert provenance.conditions["threads"] == 1
    assert SETTINGS.model_copy(update={"prompt_tokens": 101}).protocol().hash != SETTINGS.protocol().hash
    assert SETTINGS.model_copy(update={"threads": 2}).protocol().hash == SETTINGS.protocol().hash
