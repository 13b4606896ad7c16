"""What number formats make of one number, in plain torch."""

import math

import torch

NUMBER = 0.1
LARGEST = 1.0
RULE = "even"

number = torch.tensor(NUMBER, dtype=torch.float64)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
    end = torch.finfo(dtype).max
    print(f"{number.clamp(-end, end).to(dtype).double().item():.10g} {dtype}")

for name, exponent_bits, mantissa_bits, largest in (
    ("mxfp8 e4m3", 4, 3, 448.0),
    ("mxfp8 e5m2", 5, 2, 57344.0),
    ("mxfp6 e2m3", 2, 3, 7.5),
    ("mxfp6 e3m2", 3, 2, 28.0),
    ("mxfp4 e2m1", 2, 1, 6.0),
):
    mantissa, exponent = math.frexp(LARGEST)  # LARGEST = mantissa · 2^exponent, mantissa in [0.5, 1)
    last = math.floor(math.log2(largest))
    shared = exponent - 1 - last
    if RULE == "ceil":
        shared += 2 * mantissa > largest / 2**last
    if RULE == "even":
        shared += 2 * mantissa + 2.0 ** -(mantissa_bits + 1) >= 2
    scaled = min(abs(NUMBER) / 2.0**shared, largest)
    bias = 2 ** (exponent_bits - 1) - 1
    power = max(math.frexp(scaled)[1] - 1, 1 - bias) if scaled else 1 - bias
    step = 2.0 ** (power - mantissa_bits)
    print(f"{math.copysign(round(scaled / step) * step * 2.0**shared, NUMBER):.10g} {name}")

for bits in (8, 6, 5, 4, 3, 2):
    scale = float(torch.tensor(LARGEST / ((2**bits - 1) / 2)).half())
    code = min(max(round(NUMBER / scale), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
    print(f"{code * scale:.10g} int{bits}")
