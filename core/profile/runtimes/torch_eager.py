"""Plain transformers on torch, eager, on the CPU or a CUDA GPU: what ``from_pretrained`` gives everybody.

The artifact is loaded by the transformers Auto class alone, with no code of ours, so the number is what anyone
would get. Weights that were stored compressed are unpacked to their dense dtype by that loader, so a smaller file
is then no faster: the result says so. On a GPU regions are timed by CUDA events, with one synchronisation per
block. The CUDA path was run on an NVIDIA H100 (torch 2.11): at batch 1 a small model is bound there by the CPU that
launches its kernels, and that is what eager means.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from safetensors import SafetensorError

from core.errors import CannotMeasure, CannotOpen
from core.lazy import torch, transformers
from core.models.fp32_path import Fp32Path, Fp32Setting, choose_path, fast_fp32
from core.models.kv_cache import KvCache, new_cache
from core.models.library import library_of, load_quanto
from core.profile.measured import Facts
from core.profile.runtimes._base import Clock, Prepared, ProfileSettings, WallClock
from core.profile.session import profile_artifact
from core.registry import method
from core.routing.discover import EXPERT_COUNTS
from core.types import Progress, Result


class TorchEagerSettings(ProfileSettings):
    """Settings of plain torch."""

    device: Literal["cpu", "cuda"] = Field("cpu", description="Where to run")
    dtype: Literal["stored", "float32", "bfloat16"] = Field(
        "stored", description="Number format to compute in; stored takes the one the artifact names"
    )
    kv_cache: KvCache = Field(
        "model",
        description="What keys and values are kept in; model: the dtype it computes in. Other choices give numbers of "
        "their own names, e.g. decode_tokens_per_s_kv_int8",
    )
    fp32_path: Fp32Setting = Field(
        "auto",
        description="float32 kernels on the CPU: auto takes oneDNN where a parity check finds it equal to 1e-4, "
        "exact leaves torch as it is",
    )

    @property
    def device_name(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.device

    @property
    def marks(self) -> tuple[str, ...]:
        """Names the KV cache where it is not the model's own."""
        return () if self.kv_cache == "model" else (f"kv_{self.kv_cache}",)


@method("profile", title="PyTorch, eager", needs=())
def run(folder: Path, progress: Progress, settings: TorchEagerSettings) -> Result:
    """Speed and memory of an artifact in plain transformers, reloaded in a fresh process.

    A prompt of fixed token ids is read in one forward (prefill: its time is TTFT, its inverse prefill tokens/s);
    then tokens are generated one by one with the cache (decode: the time of a step is TPOT). An encoder has one
    phase, a forward over the batch. Warm-up lasts until the times are steady; headline numbers are medians with
    95 % order-statistics intervals; samples taken while other programs were busy are marked and left out. The
    intervals are about this one process: another may settle a little elsewhere, so repeat before you decide. Load
    time is the wall time of ``from_pretrained``; peak memory is the high-water mark of the whole process.
    """
    return profile_artifact(folder, "torch_eager", progress, settings)


LIBRARIES: tuple[str, ...] = ()
"""Nothing beside what everything here runs on."""


def create(settings: TorchEagerSettings, files: Path) -> TorchEager:
    """The runtime that the measuring process drives; ``files`` is the artifact's own folder."""
    return TorchEager(settings)


class CudaClock:
    """Times regions on the GPU's own time line."""

    def mark(self) -> Any:
        """Record an event in the current stream."""
        cuda: Any = torch.cuda  # torch does not type its events
        event = cuda.Event(enable_timing=True)
        event.record()
        return event

    def resolve(self, marks: Sequence[tuple[Any, Any]]) -> list[float]:
        """Wait for the GPU once, then read all pairs."""
        torch.cuda.synchronize()
        return [float(start.elapsed_time(end)) for start, end in marks]


class TorchEager:
    """A transformers model run eagerly; the state between two calls is the cache and the token picked last."""

    def __init__(self, settings: TorchEagerSettings) -> None:
        self._settings = settings
        self.clock: Clock = CudaClock() if settings.device == "cuda" else WallClock()
        self._globals = ExitStack()
        self._fp32: Fp32Path | None = None  # None where no float32 is computed on the CPU
        self._model: Any = None
        self._cache: Any = None
        self._token: Any = None  # [batch, 1]
        self._answer: Any = None  # the last forward's logits or hidden states, still where it left them
        self._library: str | None = None  # whose kernels run, where not torch's

    @property
    def model(self) -> Any:
        """The module that runs, for whoever looks where its time goes; None before ``load``."""
        return self._model

    def prepare(self, folder: Path) -> Prepared:
        """Import torch and the model's code, set threads, read the configuration."""
        if self._settings.device == "cuda" and not torch.cuda.is_available():
            raise CannotMeasure("this machine has no CUDA device that torch can use; set device=cpu")
        torch.set_num_threads(self._settings.n_threads)
        self._folder = folder
        self._config = config = transformers.AutoConfig.from_pretrained(folder)
        self._library = library_of(folder, getattr(config, "quantization_config", None))
        if self._library and (self._settings.device, self._settings.dtype) != ("cpu", "stored"):
            raise CannotMeasure(
                f"{self._library} runs its kernels as it stored its weights, and here on the CPU; set device=cpu and "
                "dtype=stored"
            )
        text = config.get_text_config()
        architecture = (config.architectures or [""])[0]
        if not hasattr(transformers, architecture):  # asking imports the model's code, which is not load time
            raise CannotOpen(f"transformers {transformers.__version__} has no architecture {architecture!r}")
        if config.is_encoder_decoder or architecture.endswith("ForConditionalGeneration"):
            raise CannotMeasure(
                f"{architecture} is more than one model; only decoders and encoders are measured"
            )
        self._generates = "CausalLM" in architecture or architecture.endswith("LMHeadModel")
        if self._settings.kv_cache != "model" and not self._generates:
            raise CannotMeasure(f"{architecture} keeps no keys and values; set kv_cache=model")
        ends = ("ForImageClassification", "ForSequenceClassification")
        self._classifies = next((end for end in ends if architecture.endswith(end)), "")
        if self._is_float32():
            choose_path(self._settings.fp32_path)  # its parity check is not load time either
        if getattr(text, "vocab_size", None) is None:
            size = config.image_size
            height, width = (size, size) if isinstance(size, int) else size
            return Prepared("vision", None, None, (config.num_channels, height, width))
        return Prepared(
            "decoder" if self._generates else "encoder",
            text.vocab_size,
            getattr(text, "max_position_embeddings", None),
        )

    def load(self) -> None:
        """``from_pretrained`` and the move to the device."""
        if self._is_float32():
            text = self._config.get_text_config()
            n_experts = max(getattr(text, name, None) or 0 for name in EXPERT_COUNTS)
            path = fast_fp32(self._settings.fp32_path, n_experts=n_experts)
            self._fp32 = self._globals.enter_context(path)
        kind = "ForCausalLM" if self._generates else self._classifies
        auto = getattr(transformers, f"AutoModel{kind}")
        dtype = "auto" if self._settings.dtype == "stored" else self._settings.dtype
        try:
            model: Any = (
                load_quanto(self._folder, f"AutoModel{kind}")
                if self._library == "quanto"
                else auto.from_pretrained(self._folder, dtype=dtype)
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise CannotOpen(
                f"transformers cannot load this artifact: {str(error).splitlines()[0]}"
            ) from error
        # bitsandbytes places its own weights.
        self._model = (
            model.eval() if self._library == "bitsandbytes" else model.eval().to(self._settings.device)
        )

    def prefill(self, inputs: np.ndarray) -> None:
        """One forward over token ids [batch, prompt_tokens] or pixels [batch, channels, height, width]."""
        self._cache = None
        tensor = torch.from_numpy(inputs).to(self._settings.device)
        with self._forward():
            if inputs.ndim == 4:
                self._answer = _answer_of(self._model(pixel_values=tensor.to(self._model.dtype)))
            elif not self._generates:
                self._answer = _answer_of(
                    self._model(input_ids=tensor, attention_mask=torch.ones_like(tensor))
                )
            else:
                self._cache = new_cache(self._model, self._settings.kv_cache)
                self._advance(tensor)

    def decode(self, tokens_B1: np.ndarray | None = None) -> None:
        """One forward of the last token, or of the given ones, with the cache."""
        token = self._token if tokens_B1 is None else torch.from_numpy(tokens_B1).to(self._settings.device)
        with self._forward():
            self._advance(token)

    def logits(self) -> np.ndarray:
        """The last forward's logits or hidden states."""
        found = self._answer[:, -1] if self._generates else self._answer
        array: np.ndarray = found.float().cpu().numpy()
        return array

    def close(self) -> None:
        """Drop model and cache, restore the float32 path."""
        self._model = self._cache = self._token = self._answer = None
        self._globals.close()

    def facts(self) -> Facts:
        """What was really run."""
        on_gpu = self._settings.device == "cuda"
        tensors = [*self._model.parameters(), *self._model.buffers()]
        dtype = str(self._model.dtype).removeprefix("torch.")
        notes = []
        if self._library:
            notes.append(f"{self._library}'s own kernels were run on its packed weights, in {dtype}")
        elif getattr(self._config, "quantization_config", None) is not None:
            notes.append(
                f"the stored weights are compressed; this loader unpacks them to {dtype}, so speed and memory are "
                "those of the dense model, and only file size and load time tell of the compression"
            )
        return Facts(
            dtype=dtype,
            attention_kernel=str(self._model.config._attn_implementation),
            weights_memory_bytes=sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values()),
            device_peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
            exact=False if self._library else None,  # its kernels sum in an order, and a form, of their own
            kv_cache_bytes=self._cache_bytes(),
            conditions={
                "kv_cache": self._settings.kv_cache,
                "fp32_path": self._fp32.name
                if self._fp32
                else f"unused ({dtype} on {self._settings.device})",
                "torch_threads": torch.get_num_threads(),
                "torch_interop_threads": torch.get_num_interop_threads(),
            },
            notes=tuple(notes),
        )

    def _forward(self) -> Any:
        """Without gradients; quanto's layers refuse inference mode."""
        return torch.no_grad() if self._library == "quanto" else torch.inference_mode()

    def _advance(self, ids_BP: Any) -> None:
        """Forward with the cache, logits of the last position only, and the greedy pick; end of text is ignored."""
        output = self._model(input_ids=ids_BP, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._answer = output.past_key_values, output.logits
        self._token = output.logits[:, -1:].argmax(-1)

    def _cache_bytes(self) -> int | None:
        """Bytes of the cache as it lies in memory; None where a layer keeps something else than keys and values."""
        layers = getattr(self._cache, "layers", [])
        kept: list[Any] = [getattr(layer, part, None) for layer in layers for part in ("keys", "values")]
        if not kept or any(tensor is None for tensor in kept):
            return None
        return sum(int(tensor.nbytes) for tensor in kept)

    def _is_float32(self) -> bool:
        """Whether CPU float32 kernels will be used, so that their path matters."""
        stored = self._config.get_text_config().dtype or self._config.dtype
        float32 = self._settings.dtype == "float32" or (
            self._settings.dtype == "stored" and stored in (None, torch.float32)
        )
        return float32 and self._settings.device == "cpu"


def _answer_of(output: Any) -> Any:
    """A model's logits, or the last hidden states of one without a head."""
    return output["logits"] if "logits" in output else output["last_hidden_state"]
