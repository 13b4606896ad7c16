"""Which layer teaches which, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.distill.layer_map import LayerMap, layer_map, taken_from
from core.errors import BadInput
from core.numerics.integer import quantize
from core.numerics.schemes import IntegerScheme
from core.registry import get
from core.types import silent
from tests.compress.making import own_model
from tests.tiny import tiny_model


def test_blocks_are_matched_inside_with_their_twin_and_behind_with_what_the_next_one_reads() -> None:
    half = LayerMap.even(6, 12)
    assert half.twins == (0, 2, 4, 7, 9, 11)
    assert half.outputs == (1, 3, 6, 8, 10, 11)  # the block before the next twin
    assert LayerMap.even(4, 4).twins == LayerMap.even(4, 4).outputs == (0, 1, 2, 3)
    last = LayerMap.last(2, 6)
    assert (last.twins, last.outputs) == ((4, 5), (4, 5))
    assert LayerMap.even(1, 6).outputs == (5,)
    deeper = LayerMap.even(4, 2)  # an upcycled depth: several blocks share a twin
    assert deeper.outputs == deeper.twins == (0, 0, 1, 1)
    assert half.frame().to_dict("list") == {
        "student": [0, 1, 2, 3, 4, 5], "twin": [0, 2, 4, 7, 9, 11], "target": [1, 3, 6, 8, 10, 11],
    }  # fmt: skip


def test_a_map_can_be_written_out_as_twins_or_as_pairs() -> None:
    assert LayerMap.listed("0, 2", 2, 4) == LayerMap.listed("1:2 0:0", 2, 4)
    for text, message in (
        ("0", "one block of the teacher .0 to 3. for each"),
        ("0, 1, 2", "for each"),
        ("0:1, 0:2", "for each"),
        ("0, x", "for each"),
        ("0, 9", "blocks 0 to 3; name only those"),
        ("3, 0", "in ascending order"),
    ):
        with pytest.raises(BadInput, match=message):
            LayerMap.listed(text, 2, 4)
    with pytest.raises(BadInput, match="choose layer map even"):
        LayerMap.last(5, 4)


def test_the_blocks_a_student_was_taken_from_are_seen_in_its_weights(tmp_path: Path) -> None:
    teacher, student = tiny_model("gpt2"), own_model("gpt2", tmp_path)
    drop = get("compress", "drop_layers")
    drop.run(student, None, silent, drop.parse({"criterion": "listed", "layers": "1"}))
    assert layer_map("auto", student, teacher) == LayerMap((0, 2), 3, "taken")
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(quantize(parameter.data, IntegerScheme(2, 32, symmetric=True)).dequantize())
    assert taken_from(student, teacher) == (0, 2)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.normal_()
    assert taken_from(student, teacher) is None
    assert layer_map("auto", student, teacher).twins == LayerMap.even(2, 3).twins == (0, 2)
    assert layer_map("last", student, teacher).twins == (1, 2)
    assert layer_map("1, 1", student, teacher).twins == (1, 1)
