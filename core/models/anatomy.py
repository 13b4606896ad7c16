"""Where things are in a transformer: module paths and facts, whatever its architecture calls them.

Plain data. How it is found is ``anatomy_find.py``, how it is proved is ``anatomy_verify.py``; a model whose
anatomy is not proved is refused at load, so everything else may trust these fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from core.types import Family

Fusion = Literal["separate", "concatenated", "per_head"]
"""How q, k and v are stored: three modules; one giving all q, then all k, then all v (GPT-2); or one giving
[q k v] head by head (GPT-NeoX)."""
NormPlace = Literal["pre", "post", "sandwich"]
"""Norms before each sublayer (most decoders), after each addition (BERT), or before and after (Gemma-2)."""
Mixer = Literal["heads", "sink_heads", "latent", "mamba"]
"""What moves values between positions: heads with a q, k and v each; the same with a learned sink that takes part of
every softmax (gpt-oss); heads whose keys and values are unpacked from one latent (DeepSeek's MLA); or a state-space
recurrence without heads (Mamba)."""
Path = str
"""Dotted module path, as ``model.get_submodule`` takes it."""


@dataclass(frozen=True)
class Block:
    """One transformer layer. Paths are absolute."""

    index: int
    path: Path
    attention: Path
    """The attention module, whose output is a tuple (output, pattern); a Mamba layer's mixer, whose output is a tensor."""
    q: Path
    k: Path
    v: Path
    """Equal to ``q`` and ``k`` when ``fusion`` is not ``separate``. Without heads (see ``mixer``), what reads instead."""
    o: Path
    """Its input is [batch, position, n_heads · head_dim]: all heads' weighted values side by side (but for Mamba)."""
    attention_norm: Path
    """Pre-norm: before attention. Post-norm: after attention was added to the residual."""
    mlp_norm: Path
    attention_write: Path
    """The module whose output is added to the residual stream by attention."""
    mlp_write: Path
    """The same for the MLP. OPT's MLP runs on flattened positions: its output is [batch · position, d_model]."""
    mlp: Path | None
    """The MLP's or MoE block's module; None where the layer holds the linears itself (OPT, BERT)."""
    gate: Path | None
    """The gated branch, activated then multiplied with ``up``; None for an MLP without gate or an MoE block."""
    up: Path | None
    down: Path | None
    """Its input is the neurons' activations; None for an MoE block."""
    router: Path | None = None
    experts: Path | None = None
    """The fused experts' module, called with (hidden, chosen experts, routing weights)."""
    shared_expert: Path | None = None
    shared_gate: Path | None = None
    """The linear whose sigmoid scales the shared expert's output (Qwen2-MoE)."""
    mixer: Mixer = "heads"
    latent: int = 0
    """Numbers a latent attention keeps in its cache per position."""
    state: int = 0
    """Numbers a Mamba layer keeps in its cache, however long the text."""

    @property
    def has_pattern(self) -> bool:
        """Whether its output is a sum over heads of an attention pattern times that head's values."""
        return self.mixer in ("heads", "sink_heads")

    @property
    def is_moe(self) -> bool:
        """Whether this layer's MLP is a mixture of experts."""
        return self.experts is not None


@dataclass(frozen=True)
class Anatomy:
    """Module paths and facts of one model."""

    model_type: str
    architecture: str
    """The class, e.g. ``LlamaForCausalLM``."""
    family: Family
    embedding: Path
    """Token embedding, or a ViT's patch projection."""
    embedding_scale: float
    """Embedding rows are multiplied by this (Gemma: √d_model)."""
    position_embedding: Path | None
    """Learned positions; None with rotary ones. For a ViT, the module that owns the parameter."""
    position_offset: int
    """Row of the first position in the position table (OPT: 2)."""
    token_type_embedding: Path | None
    """BERT adds a row for the first or second text of a pair."""
    embedding_norm: Path | None
    """BERT norms the sum of its embeddings."""
    blocks: tuple[Block, ...]
    final_norm: Path | None
    """None for a post-norm encoder, whose residual stream is already normed."""
    head_transform: Path | None
    """What a masked language model applies between its last block and its unembedding (dense, activation, norm)."""
    unembedding: Path | None
    """Unembedding, or a classifier on the CLS token; None for an encoder without a head and for a text classifier."""
    classifier: Path | None
    """What turns a text's one vector (or, in RoBERTa's head, all its vectors) into class logits; None where texts are not
    classified."""
    pooler: Path | None
    """What a text classifier applies before it to the first position (BERT); with none, the classifier reads all positions
    itself, or of a causal model each one, the last of which answers."""
    tied: bool
    """Embedding and unembedding share one tensor."""
    norm_place: NormPlace
    norm_offset: float
    """Added to a norm's weight before it multiplies (Gemma: 1, most: 0)."""
    fusion: Fusion
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_model: int
    d_ff: int
    """Neurons of a dense MLP, or of one expert where every layer is MoE."""
    activation: str
    """Name of the MLP's activation in transformers' ``ACT2FN``."""
    vocab_size: int
    """Rows of the embedding; for a ViT the number of classes."""
    context_length: int
    """Longest supported sequence, in positions (a ViT: patches + CLS)."""
    windows: tuple[int | None, ...]
    """Per layer: how many positions attention looks back, or None for all."""
    n_experts: int
    """Routed experts per MoE layer; 0 for a dense model."""
    experts_per_token: int
    parallel_residual: bool
    """Attention and MLP read the same residual (GPT-NeoX)."""
    residual_scale: float
    """What attention and MLP put out is multiplied by this before it is added to the stream (Granite)."""
    logit_scale: float
    logit_divisor: float
    """Logits are divided by this (Granite); ``logit_scale`` has it in it, to rounding."""
    logit_softcap: float | None
    attention_softcap: float | None

    @property
    def n_layers(self) -> int:
        """Number of transformer layers."""
        return len(self.blocks)

    @property
    def has_heads(self) -> bool:
        """Whether every layer attends by heads with a q, k, v and softmax of their own; what reads heads needs it."""
        return all(block.mixer == "heads" for block in self.blocks)

    @property
    def causal(self) -> bool:
        """Whether no position looks ahead."""
        return self.family == "decoder" or (self.family == "classifier" and self.norm_place != "post")

    def kv_head(self, head: int) -> int:
        """The key/value head that query head ``head`` reads: ⌊head · n_kv_heads / n_heads⌋."""
        return head * self.n_kv_heads // self.n_heads
