"""The engines that run in the agent's own process: five short verbs each, as the host's runtimes have them."""

from __future__ import annotations

import os
import random
from typing import Any

PAST, PRESENT = "input.past_key_values", "output.past_key_values"
"""Names in the graphs that the host writes (``core.profile.runtimes._onnx_decoder``)."""


def tokens(vocab_size: int, batch: int, length: int, seed: int) -> list[list[int]]:
    """Seeded ids [batch][length]."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab_size) for _ in range(length)] for _ in range(batch)]


def create(spec: dict[str, Any], folder: str) -> Any:
    """The engine that a job asks for."""
    return {"onnxruntime": OnnxRuntime, "torch": Torch}[spec["engine"]](spec, folder)


class OnnxRuntime:
    """A graph with its cache, or one that reads a text in one go."""

    def __init__(self, spec: dict[str, Any], folder: str) -> None:
        import numpy
        import onnxruntime

        onnxruntime.disable_telemetry_events()
        self._np, self._library, self._spec = numpy, onnxruntime, spec
        self._path = os.path.join(folder, "model.onnx")
        self._room = max(spec["prompt_tokens"], spec["depth"] + spec["new_tokens"])

    def load(self) -> None:
        """Bring the weights into memory."""
        options = self._library.SessionOptions()
        options.intra_op_num_threads = self._spec["threads"]
        options.log_severity_level = 3
        self._session = self._library.InferenceSession(
            self._path, options, providers=["CPUExecutionProvider"]
        )
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        outputs = [value.name for value in self._session.get_outputs()]
        self._taken = set(shapes)
        self._output = next(name for name in outputs if name in ("logits", "last_hidden_state"))
        self._past = [name for name in shapes if name.startswith(PAST)]
        self._present = [name.replace(PAST, PRESENT, 1) for name in self._past]
        self._shapes = [(shapes[name][1], shapes[name][3]) for name in self._past]
        self._binding = self._session.io_binding() if "past_length" in self._taken else None
        if self._binding is not None:
            for name, present, buffer in zip(
                self._past, self._present, self._empty(self._room), strict=False
            ):
                self._binding.bind_ortvalue_input(name, buffer)
                self._binding.bind_ortvalue_output(present, buffer)
            self._binding.bind_output(self._output)

    def prefill(self, ids: list[list[int]]) -> None:
        """Read a prompt [batch][tokens] from an empty cache, and pick."""
        np, array = self._np, self._np.asarray(ids, dtype=self._np.int64)
        if self._spec["family"] == "decoder":
            self._position = 0
            self._cache = [] if self._binding is not None else self._empty(0)
            return self._advance(array)
        feed = {
            "input_ids": array,
            "attention_mask": np.ones_like(array),
            "token_type_ids": np.zeros_like(array),
        }
        self._session.run(
            [self._output], {name: value for name, value in feed.items() if name in self._taken}
        )
        return None

    def decode(self) -> None:
        """One more token per sequence."""
        self._advance(self._picked)

    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(self._spec["sizes"].values())

    def facts(self) -> dict[str, Any]:
        """How it is computed."""
        return {"dtype": self._spec["weights"], "attention_kernel": "of the graph", "notes": []}

    def _advance(self, ids: Any) -> None:
        np, value_of = self._np, self._library.OrtValue.ortvalue_from_numpy
        batch, read = ids.shape
        places = np.arange(self._position, self._position + read)[None].repeat(batch, 0)
        given = {"input_ids": np.ascontiguousarray(ids), "position_ids": places}
        given["past_length"] = np.array([self._position])
        feed = {name: value_of(array) for name, array in given.items() if name in self._taken}
        if self._binding is not None:
            for name, value in feed.items():
                self._binding.bind_ortvalue_input(name, value)
            self._session.run_with_iobinding(self._binding)
            answer = self._binding.get_outputs()[len(self._present)].numpy()
        else:
            feed.update(zip(self._past, self._cache, strict=False))
            answer, *self._cache = self._session.run_with_ort_values([self._output, *self._present], feed)
            answer = answer.numpy()
        self._position += read
        self._picked = answer[:, -1].argmax(-1)[:, None]

    def _empty(self, length: int) -> list[Any]:
        make, batch = self._library.OrtValue.ortvalue_from_numpy, self._spec["batch"]
        return [make(self._np.zeros((batch, h, length, d), self._np.float32)) for h, d in self._shapes]


class Torch:
    """transformers' own model in float32, eager."""

    def __init__(self, spec: dict[str, Any], folder: str) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        import transformers

        logging: Any = transformers.utils.logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(spec["threads"])
        self._torch, self._transformers, self._spec, self._folder = torch, transformers, spec, folder

    def load(self) -> None:
        """Bring the weights into memory."""
        auto = self._transformers.AutoModelForCausalLM if self._decodes else self._transformers.AutoModel
        self._model = auto.from_pretrained(self._folder, dtype=self._torch.float32).eval()

    def prefill(self, ids: list[list[int]]) -> None:
        """Read a prompt [batch][tokens] from an empty cache, and pick."""
        with self._torch.inference_mode():
            given = self._torch.tensor(ids)
            if not self._decodes:
                self._model(given)
                return
            self._take(self._model(given, use_cache=True, logits_to_keep=1))

    def decode(self) -> None:
        """One more token per sequence."""
        with self._torch.inference_mode():
            self._take(self._model(self._picked, past_key_values=self._cache, use_cache=True))

    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        held = {p.data_ptr(): p.numel() * p.element_size() for p in self._model.parameters()}
        return sum(held.values())

    def facts(self) -> dict[str, Any]:
        """How it is computed."""
        kernel = getattr(self._model.config, "_attn_implementation", None) or "eager"
        return {"dtype": "float32", "attention_kernel": kernel, "notes": []}

    @property
    def _decodes(self) -> bool:
        return bool(self._spec["family"] == "decoder")

    def _take(self, output: Any) -> None:
        self._cache, self._picked = output.past_key_values, output.logits[:, -1].argmax(-1)[:, None]
