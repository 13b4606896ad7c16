"""Train ``demo:vit``, a small ViT on scikit-learn's digits, and write its files; the committed ones are its output.

    python scripts/train_demo_vit.py [--epochs 160] [--validate]

Needs scikit-learn (in the ``dev`` extra). Seeded: the same machine and library versions give the same weights, others
give weights as good. ``--validate`` trains on the first 1,078 rows and reports the next 269: that is how the
settings below were chosen. Without it the model sees rows 0 to 1346, and rows 1347 to 1796 are asked once, at the end.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from core.evaluate._intervals import wilson
from core.images.digits import FILE, HELD_OUT, all_digits
from core.models.demo import demo_files

SEED = 20
BATCH = 64
PEAK_LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
DEGREES, SCALE, SHEAR, SHIFT_PIXELS = 10, 0.1, 0.15, 0.7
"""Each training picture is turned, scaled, sheared and shifted by at most this much, anew in every epoch."""
VALIDATION = range(1078, HELD_OUT.start)


def main() -> None:
    """Read the arguments, train, report; without ``--validate`` write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=160)
    parser.add_argument("--validate", action="store_true", help="report validation rows, write nothing")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    if not options.validate:
        write_digits(FILE)
    grey, labels = all_digits()
    pixels, targets = normalised(grey), torch.tensor(labels).long()
    asked = VALIDATION if options.validate else HELD_OUT
    model = new_model()
    train(model, pixels[: asked.start], targets[: asked.start], epochs=options.epochs)
    right = count_right(model, pixels[asked.start : asked.stop], targets[asked.start : asked.stop])
    low, high = wilson(right, len(asked))
    said = f"{right} of {len(asked)} right ({right / len(asked):.1%}, 95 % Wilson interval {low:.1%} to {high:.1%})"
    print(f"rows {asked.start} to {asked.stop - 1}: {said}")
    if not options.validate:
        write(model, demo_files("vit"))


def write_digits(path: Path) -> None:
    """Store scikit-learn's rows, in their order, as small integers."""
    from sklearn.datasets import load_digits

    rows = load_digits()
    np.savez_compressed(path, images=rows.images.astype(np.uint8), labels=rows.target.astype(np.uint8))


def new_model() -> Any:
    """Four layers of four heads on 4 × 4 patches of 2 × 2 pixels, seeded by the caller."""
    names = [str(digit) for digit in range(10)]
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=8,
        patch_size=2,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return transformers.ViTForImageClassification(config)


def normalised(grey: np.ndarray) -> Tensor:
    """What the processor makes of grey pictures [N, 8, 8]: three equal channels between -1 and 1."""
    return (torch.tensor(grey) / 255 - 0.5).div(0.5)[:, None].expand(-1, 3, -1, -1)


def train(model: Any, pixels: Tensor, targets: Tensor, *, epochs: int) -> None:
    """AdamW with one cycle of the learning rate; prints the mean loss now and then."""
    steps = epochs * math.ceil(len(pixels) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, steps)
    model.train()
    for epoch in range(epochs):
        losses = []
        for rows in torch.randperm(len(pixels)).split(BATCH):
            logits = model(distorted(pixels[rows])).logits
            loss = cross_entropy(logits, targets[rows], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}", flush=True)
    model.eval()


def distorted(pixels: Tensor) -> Tensor:
    """Each picture under a small random affine map; what comes in from outside is paper."""
    n, side = len(pixels), pixels.shape[-1]

    def within(most: float) -> Tensor:
        return (2 * torch.rand(n) - 1) * most

    turn, scale, shear = within(math.radians(DEGREES)), 1 + within(SCALE), within(SHEAR)
    right, down = within(2 * SHIFT_PIXELS / side), within(2 * SHIFT_PIXELS / side)
    rows = (
        torch.stack([scale * turn.cos(), shear - turn.sin(), right], -1),
        torch.stack([turn.sin(), scale * turn.cos(), down], -1),
    )
    grid = affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    return grid_sample(pixels + 1, grid, align_corners=False) - 1  # zero is paper only after the shift by one


def count_right(model: Any, pixels: Tensor, targets: Tensor) -> int:
    """How many pictures the model names right."""
    with torch.inference_mode():
        return int((model(pixels).logits.argmax(-1) == targets).sum())


def write(model: Any, folder: Path) -> None:
    """Save weights, config and image processor as plain transformers reads them."""
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
