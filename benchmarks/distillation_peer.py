"""TRL's distillation trainer on given tokens: run by the Python of an environment that has it, never by ours.

    PYTHON benchmarks/distillation_peer.py TEACHER STUDENT IDS UPDATES ROWS MICRO

TEACHER and STUDENT are folders, IDS a JSON file of token windows, each learned from behind its first token. TRL's trainer
writes its own completions; here it is handed the windows instead, so that its time is that of learning alone, on the very
tokens that ours learns from. Prints one JSON line: seconds and processor seconds of every update, losses, version.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset


class OnGivenTokens(trl.DistillationTrainer):
    """The trainer with its generation replaced by the windows it is to learn from."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        ids_BP = torch.tensor([row["ids"] for row in inputs])
        completion_BP = ids_BP[:, 1:]
        return {
            "prompt_ids": ids_BP[:, :1],
            "prompt_mask": torch.ones_like(ids_BP[:, :1]),
            "completion_ids": completion_BP,
            "completion_mask": torch.ones_like(completion_BP),
            "num_items_in_batch": torch.tensor(completion_BP.numel()),
        }


class Clock(transformers.TrainerCallback):
    """Wall and processor seconds of every update, optimizer included."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self._began = (0.0, 0.0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._began = (time.perf_counter(), time.process_time())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it."""
        self.wall.append(time.perf_counter() - self._began[0])
        self.cpu.append(time.process_time() - self._began[1])


def main() -> None:
    """Train for so many updates, and say how long each took."""
    teacher, student, ids, updates, rows, micro = sys.argv[1:]
    windows = json.loads(Path(ids).read_text(encoding="utf-8"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (teacher, student)
    ]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.DistillationConfig(
            output_dir=folder,
            beta=0.0,
            temperature=1.0,
            max_steps=int(updates),
            per_device_train_batch_size=int(micro),
            gradient_accumulation_steps=int(rows) // int(micro),
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            weight_decay=0.0,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            shuffle_dataset=False,
            max_completion_length=len(windows[0]) - 1,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = OnGivenTokens(
            model=models[1],
            teacher_model=models[0],
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": "-", "ids": window} for window in windows]),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    told = {"wall": clock.wall, "cpu": clock.cpu, "losses": losses, "version": f"TRL {trl.__version__}"}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
