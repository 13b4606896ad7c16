"""Train ``demo:moe``, a small OLMoE on eight domains, measure its ship gates, and write its files.

    python scripts/train_demo_moe.py [--minutes 45] [--work FOLDER]     train on all cores, write the model
    python scripts/train_demo_moe.py --dense [--work FOLDER]            train the dense twin on the same batches
    python scripts/train_demo_moe.py --gates                            measure the committed model and print its gates

Two processes, one thread each, average their gradients. Both trainings go on from their own file in FOLDER when cut
off. The learning rate follows the share of the time budget spent, so a slow machine sees less text, not half a
schedule; that makes weights differ from machine to machine. The twin repeats the same tokens and learning rates.

The committed weights are of one run of 29 minutes on a busy 2-core machine that was cut off at step 1,150 of 1,603 and
gone on with: until there the balance loss had half its weight and counted choices within pools, and pools would have
stayed to the end. Free routing then left 1 of 64 experts nearly unused and 3 below a fifth of the uniform load; with
what stands here they came back.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from demo_moe import gates
from demo_moe.loop import (
    LATE,
    LATE_LENGTH,
    LENGTH,
    MARKS,
    SEQUENCES_PER_DOMAIN,
    Run,
    State,
    decisions,
    new_model,
    train,
)
from demo_moe.text import held_out_windows, make_tokenizer, save_tokenizer, training_streams

from core.evaluate._domain_loss import nll_by_domain

FOLDER = Path(__file__).parents[1] / "core" / "models" / "demo_moe"
PROCESSES = 2
WINDOWS = 4
"""Held-out windows of each domain whose routing is written down."""


def main() -> None:
    """Read the arguments and do one of the three things."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "demo-moe")
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--gates", action="store_true")
    options = parser.parse_args()
    if options.gates:
        gates.report(FOLDER)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer_folder = options.work / "tokenizer"
    if not tokenizer_folder.exists():
        save_tokenizer(make_tokenizer(), tokenizer_folder)
    streams = options.work / "streams.npz"
    if not streams.exists():
        np.savez(streams, **training_streams(read_tokenizer(tokenizer_folder)))
    torch.multiprocessing.spawn(work, (options.work, options.minutes * 60, options.dense), nprocs=PROCESSES)
    if options.dense:
        write_twin(options.work)
    else:
        write(options.work)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer as plain transformers reads it."""
    return transformers.AutoTokenizer.from_pretrained(folder)


def work(rank: int, folder: Path, seconds: float, dense: bool) -> None:
    """One process: join the others, go on from the file if there is one, train."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    meeting = folder / f"meeting-{'dense' if dense else 'moe'}"
    store = dist.FileStore(str(meeting), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    with np.load(folder / "streams.npz") as found:
        streams = dict(found.items())
    replay = torch.load(folder / "moe.pt", weights_only=False)["state"].progress if dense else []
    run = Run(
        new_model(dense=dense),
        streams,
        seconds=None if dense else seconds,
        replay=replay,
        rank=rank,
        world=PROCESSES,
        add_up=dist.all_reduce,
    )
    file = folder / ("dense.pt" if dense else "moe.pt")
    if file.exists():
        run.load(file)
    dist.barrier()
    windows_BP, _ = held_out_windows(read_tokenizer(folder / "tokenizer"), windows=WINDOWS, length=LENGTH)
    train(run, file=file, windows_BP=windows_BP)
    dist.barrier()
    if rank == 0:
        meeting.unlink(missing_ok=True)
    dist.destroy_process_group()


def restored(folder: Path, *, dense: bool) -> tuple[Any, State]:
    """A trained model and what its run wrote down."""
    found = torch.load(folder / ("dense.pt" if dense else "moe.pt"), weights_only=False)
    model = new_model(dense=dense)
    model.load_state_dict(found["model"])
    return model.eval(), found["state"]


def write(folder: Path) -> None:
    """The model in float16 with its tokenizer, how it was trained, and its routing at the marks."""
    model, state = restored(folder, dense=False)
    FOLDER.mkdir(exist_ok=True)
    model.half().save_pretrained(FOLDER)
    tokenizer = read_tokenizer(folder / "tokenizer")
    save_tokenizer(tokenizer, FOLDER)
    written = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    windows_BP, domains = held_out_windows(tokenizer, windows=WINDOWS, length=LENGTH)
    marks = [*state.marks, (len(state.progress), decisions(written, windows_BP))]
    np.savez_compressed(
        FOLDER / "routing_checkpoints.npz",
        experts_CLTK=torch.stack([chosen for _, chosen in marks]).numpy(),
        steps_C=np.array([step for step, _ in marks]),
        progress_C=np.array([*MARKS, 1.0]),
        token_ids_T=windows_BP.flatten().numpy().astype(np.uint16),
        domains=np.array(domains),
        window=np.array(LENGTH),
    )
    late = sum(progress >= LATE for progress in [0.0, *state.progress[:-1]])
    per_step = (
        8 * SEQUENCES_PER_DOMAIN * LENGTH
    )  # late batches hold half as many sequences of twice the length
    assert LATE_LENGTH == 2 * LENGTH
    note = {
        "steps": len(state.progress),
        "late_steps": late,
        "tokens": len(state.progress) * per_step,
        "minutes": round(state.elapsed / 60, 1),
        "balance_last_100_steps": float(np.mean([balance for _, balance in state.losses[-100:]])),
    }
    (FOLDER / gates.NOTES).write_text(json.dumps(note) + "\n")


def write_twin(folder: Path) -> None:
    """The twin's loss on the evaluation text; its weights are not kept."""
    model, state = restored(folder, dense=True)
    path = FOLDER / gates.NOTES
    notes = json.loads(path.read_text())
    assert notes["steps"] == len(state.progress)
    notes["dense_twin_nll"] = nll_by_domain(model, read_tokenizer(FOLDER))
    path.write_text(json.dumps(notes) + "\n")


if __name__ == "__main__":
    main()
