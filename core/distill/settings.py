"""What a training is told: on which rows, for how long, which parameters move, and how far from a teacher counts.

Flat and bounded, so that forms, flags and recipes follow from the fields. Knows no model and no data.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from core.registry import Settings

Loss = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"]
Moves = Literal["all", "head", "norms", "lora", "dora", "scales_and_norms", "straight_through"]
Schedule = Literal["cosine", "wsd", "constant"]
Precision = Literal["float32", "bfloat16"]


class TrainingSettings(Settings):
    """How a student is trained, whatever it learns from."""

    data: str = Field(
        default="pydoc",
        min_length=1,
        max_length=1000,
        description="Rows to learn from: pydoc, stdlib, builtin:NAME, a .txt, .csv, .tsv, .jsonl or .parquet file, a "
        "folder of texts, or hub:ID[:split]",
    )
    held_out: float = Field(
        default=0.1,
        gt=0,
        le=0.5,
        description="Share of the rows that is never learned from: on it the best weights are chosen",
    )
    held_out_tokens: int = Field(
        default=16_384, ge=256, le=4_194_304, description="Held-out tokens that are measured on, at most"
    )
    max_tokens: int = Field(
        default=1_000_000,
        ge=256,
        le=10_000_000_000,
        description="Training tokens that are read, padding not counted, the last update whole; it ends with this or "
        "with epochs, whichever comes first",
    )
    epochs: int = Field(default=10, ge=1, le=1000, description="Times every row is read, at most")
    window: int = Field(
        default=256, ge=8, le=8192, description="Tokens of a row, at most the model's context"
    )
    packing: Literal["packed", "padded"] = Field(
        default="packed",
        description="packed: short texts share a row and do not see each other; padded: one text a row",
    )
    batch_tokens: int = Field(
        default=4096,
        ge=8,
        le=4_194_304,
        description="Tokens of one update, padding counted: batch_tokens / window rows",
    )
    micro_batch: int = Field(
        default=4, ge=1, le=1024, description="Rows of one forward and backward pass: what memory must hold"
    )
    learning_rate: float = Field(default=2e-4, gt=0, le=1, description="Highest learning rate of AdamW")
    schedule: Schedule = Field(
        default="cosine",
        description="cosine: to a tenth of it; wsd: warmup, stable, then to 0 over the last fifth; constant",
    )
    warmup: float = Field(
        default=0.05,
        ge=0,
        le=0.5,
        description="Share of all tokens over which the learning rate rises from 0",
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="AdamW's decay of matrices; vectors (norms, biases, scales) have none",
    )
    clip: float = Field(default=1.0, ge=0, le=1000, description="Largest norm of the gradient; 0: as it is")
    precision: Precision = Field(
        default="float32",
        description="What the student computes in; with bfloat16 the weights that are updated stay float32",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute activations twice instead of keeping them: less memory, a third slower",
    )
    train: Moves = Field(
        default="all",
        description="What moves: all; head: what comes behind the last layer; norms; lora or dora: low-rank updates, "
        "merged at the end; of a quantized model scales_and_norms, straight_through: weights that stay on their grid, or "
        "lora: low-rank updates of those, for which 1e-2 is a good learning rate",
    )
    lora_rank: int = Field(default=16, ge=1, le=1024, description="Rank of the updates of lora and dora")
    lora_alpha: float = Field(
        default=32.0, gt=0, le=4096, description="Their scale: updates are multiplied by alpha / rank"
    )
    lora_targets: str = Field(
        default="all-linear",
        max_length=1000,
        description="all-linear, or ends of module names, e.g. q_proj, v_proj",
    )
    evaluate_every: int = Field(
        default=100_000,
        ge=0,
        le=10_000_000_000,
        description="Training tokens between two measurements on held-out rows; 0: only before and after",
    )
    patience: int = Field(
        default=5, ge=0, le=1000, description="Measurements without a new best after which it stops; 0: never"
    )
    samples: int = Field(
        default=1,
        ge=0,
        le=8,
        description="Continuations of held-out texts that are generated at each measurement",
    )
    checkpoint_minutes: float = Field(
        default=5.0, ge=0, le=1440, description="Minutes between two checkpoints; 0: after every update"
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="Seed of the split, the order of rows, and all that is drawn",
    )


class DistilSettings(TrainingSettings):
    """What the teacher is, and how its student's distance to it is counted."""

    teacher: str = Field(
        default="auto",
        min_length=1,
        max_length=1000,
        description="auto: the model as it was before this recipe's steps, or, where distil is the first, its base; else "
        "demo:smollm2, variant:ID, a folder or a hub id",
    )
    loss: Loss = Field(
        default="forward_kl",
        description="forward_kl: KL(teacher ‖ student), covers all it says; reverse_kl: KL(student ‖ teacher), seeks "
        "what it says most; jsd: between both, by beta; skew_kl and skew_reverse_kl: against a mixture, by alpha",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        le=20,
        description="Both models' logits are divided by T; the loss is multiplied by T²",
    )
    beta: float = Field(default=0.5, gt=0, lt=1, description="With jsd: weight of the teacher in the mixture")
    alpha: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="With the skew losses: weight of the distribution that is mixed in",
    )
    kd_weight: float = Field(
        default=1.0,
        ge=0,
        le=100,
        description="Weight of the loss against the teacher; 0: plain training, the control",
    )
    task_weight: float = Field(
        default=0.0, ge=0, le=100, description="Weight of the task's own loss: next token, label or score"
    )
    hidden_weight: float = Field(default=0.0, ge=0, le=100, description="Weight of matching hidden states")
    hidden_loss: Literal["squared", "cosine"] = Field(
        default="cosine", description="Hidden states: ‖P h − t‖² with P learned, or 1 − cos"
    )
    relation_weight: float = Field(
        default=0.0, ge=0, le=100, description="Weight of MiniLM's relations in attention"
    )
    relations: Literal["attention_and_value", "qq_kk_vv"] = Field(
        default="attention_and_value", description="MiniLM: attention and V-V; MiniLMv2: Q-Q, K-K and V-V"
    )
    relation_heads: int = Field(
        default=0, ge=0, le=512, description="With qq_kk_vv: relation heads; 0: as many as the teacher's"
    )
    router_weight: float = Field(
        default=0.0, ge=0, le=100, description="Weight of KL between routers, per token and layer"
    )
    expert_weight: float = Field(
        default=0.0, ge=0, le=100, description="Weight of matching what the experts of a layer give"
    )
    expert_loss: Literal["together", "each"] = Field(
        default="together",
        description="Of experts: together: what a layer's experts write for a token, which also fits dropped, merged or "
        "densified ones; each: what every expert says to the tokens that the teacher sends it",
    )
    layer_map: str = Field(
        default="auto",
        min_length=1,
        max_length=2000,
        description="Which layer teaches which: auto (as the student was cut from its teacher), even, last, or pairs "
        "student:teacher, e.g. 0:1, 1:3",
    )
    top_k: int = Field(
        default=64,
        ge=0,
        le=65_536,
        description="The teacher runs once and this many of its likeliest tokens are kept for each; 0: it runs at every "
        "update, over the whole vocabulary",
    )
    teacher_precision: Precision = Field(default="float32", description="What the teacher computes in")
    on_policy: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of updates on texts that the student continues itself, judged by the teacher as it runs",
    )


class FineTuneSettings(TrainingSettings):
    """Training on data alone: next tokens, or the labels of a task."""
