"""What hiding each patch of a picture costs a class, with plain transformers."""

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

MODEL = "google/vit-base-patch16-224"
IMAGE = "picture.png"
TARGET = ""
DISTRACTOR = ""
SIZE = 1
HIDE_WITH = "mean"

if IMAGE.startswith("digits:"):
    from sklearn.datasets import load_digits

    grey = load_digits().images[int(IMAGE.removeprefix("digits:"))]
    picture = Image.fromarray(np.rint(grey * 255 / 16).astype(np.uint8)).convert("RGB")
else:
    picture = Image.open(IMAGE).convert("RGB")
processor = AutoImageProcessor.from_pretrained(MODEL)
model = AutoModelForImageClassification.from_pretrained(MODEL, dtype=torch.float32).eval()
pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
if HIDE_WITH == "mean":
    cover = pixels.mean((-2, -1), keepdim=True).expand_as(pixels)
else:
    blank = Image.new("RGB", picture.size, HIDE_WITH)
    cover = processor(images=blank, return_tensors="pt")["pixel_values"]


def class_id(name):
    """A class by its name or number."""
    labels = {label: n for n, label in model.config.id2label.items()}
    return labels[name] if name in labels else int(name)


def score(values):
    """The class's logit, less the distractor's."""
    with torch.inference_mode():
        logits = model(pixel_values=values).logits[0]
    target = class_id(TARGET) if TARGET else int(plain.argmax())
    return float(logits[target] - (logits[class_id(DISTRACTOR)] if DISTRACTOR else 0))


with torch.inference_mode():
    plain = model(pixel_values=pixels).logits[0]
patch = model.config.patch_size
rows, columns = (side // patch for side in pixels.shape[-2:])
weights, covered = np.zeros((rows, columns)), np.zeros((rows, columns))
for row in range(rows - SIZE + 1):
    for column in range(columns - SIZE + 1):
        hidden = pixels.clone()
        box = np.s_[..., row * patch : (row + SIZE) * patch, column * patch : (column + SIZE) * patch]
        hidden[box] = cover[box]
        weights[row : row + SIZE, column : column + SIZE] += score(pixels) - score(hidden)
        covered[row : row + SIZE, column : column + SIZE] += 1
for row, column in np.ndindex(rows, columns):
    print(row, column, f"{weights[row, column] / covered[row, column]:.6f}")
