import pytest
import torch

from core.models.readout import unembed
from core.probes._recording import record
from core.probes._replay import Patch, Row, last_residuals, replay
from tests.references.slow_patching import slow_patched_logits, slow_states
from tests.tiny import DECODERS, tiny_model

TOKENS = 24  # beyond the window of 16 of Gemma-2's odd layers
NODES = ("residual", "attention_out", "mlp_out", "z", "q", "k", "v")


def prompts(n: int = TOKENS, *, seed: int = 0) -> tuple[list[int], list[int]]:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(1, 500, (n,), generator=generator)
    corrupted = clean.clone()
    corrupted[3:7] = torch.randint(1, 500, (4,), generator=generator)
    return clean.tolist(), corrupted.tolist()


def recordings(loaded, nodes=NODES):
    clean, corrupted = prompts()
    with torch.inference_mode():
        return [record(loaded, {"input_ids": torch.tensor([ids])}, nodes) for ids in (clean, corrupted)]


def cells(loaded, node: str) -> list[tuple[int, int, int]]:
    """(layer, position, head) of a handful of cells, the corners among them."""
    heads = {"z": loaded.anatomy.n_heads, "q": loaded.anatomy.n_heads}.get(node, loaded.anatomy.n_kv_heads)
    heads = heads if node in "zqkv" else 1
    return [
        (layer, position, (layer + position) % heads)
        for layer in range(3)
        for position in (0, 4, 9, TOKENS - 1)
    ]


def all_logits(loaded, base, rows: list[Row]) -> list[torch.Tensor]:
    """Logits [P, vocab] of each row; positions before its first come from the base run."""
    final = base.at("residual", loaded.anatomy.n_layers)
    found: dict[int, torch.Tensor] = {}

    def read(numbers, start, residual_RTD):
        for number, residual in zip(numbers, residual_RTD, strict=True):
            found[number] = unembed(loaded.model, loaded.anatomy, torch.cat([final[:start], residual])[None])[
                0
            ]

    with torch.inference_mode():
        replay(loaded, base, rows, read)
    return [found[number] for number in range(len(rows))]


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("family", DECODERS)
def test_a_replay_is_the_whole_hooked_forward(family: str, node: str):
    loaded = tiny_model(family)
    clean, base = recordings(loaded)
    states = slow_states(loaded, prompts()[0])
    per_head = node in "zqkv"
    width = loaded.anatomy.head_dim
    rows, expected = [], []
    for layer, position, head in cells(loaded, node):
        value = clean.at(node, layer, head=head)[position : position + 1]
        rows.append((Patch(layer, node, position, value, head),))
        slow_value = states[node][layer][position : position + 1]
        expected.append(
            slow_patched_logits(
                loaded,
                prompts()[1],
                node=node,
                layer=layer,
                positions=[position],
                value=slow_value[:, head * width : (head + 1) * width] if per_head else slow_value,
                head=head if per_head else None,
            )
        )
    for row, logits, slow in zip(rows, all_logits(loaded, base, rows), expected, strict=True):
        assert torch.allclose(logits, slow, atol=1e-4, rtol=1e-4), row


@pytest.mark.parametrize("family", DECODERS)
def test_the_short_last_layer_gives_the_same_last_position(family: str):
    loaded = tiny_model(family)
    clean, base = recordings(loaded)
    rows = [
        (Patch(layer, node, position, clean.at(node, layer, head=head)[position : position + 2], head),)
        for node in NODES
        for layer, position, head in cells(loaded, node)
    ]
    rows += [tuple(patch for row in rows[n::7] for patch in row) for n in range(7)]  # many patches at once
    whole = torch.zeros(len(rows), loaded.anatomy.d_model)

    def read(numbers, start, residual_RTD):
        whole[list(numbers)] = residual_RTD[:, -1]

    with torch.inference_mode():
        replay(loaded, base, rows, read)
        short = last_residuals(loaded, base, rows)
    torch.testing.assert_close(short, whole, atol=1e-5, rtol=1e-4)
    assert (short[0] - short[-1]).abs().max() > 0.1
