# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The engine that runs an exported file with ONNX Runtime, on a CPU or with its CUDA or TensorRT provider."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clustvit_ros.engine.engine import Settings
from clustvit_ros.engine.ladder import choose_capacity, default_ladder
from clustvit_ros.engine.network_engine import (
    Lap,
    NetworkEngine,
    NetworkOutput,
    check_memory,
    describe_device,
    select_device,
)
from clustvit_ros.engine.onnx_export import EXEMPT_NAME, describe_export, export_onnx
from clustvit_ros.engine.onnx_session import describe_providers, open_session, read_metadata
from clustvit_ros.errors import ConfigError, EngineError, ModelError
from clustvit_ros.networks.model_folder import ModelConfig, hash_weights, inside, load_config
from clustvit_ros.networks.vit import grid_size_of
from clustvit_ros.paths import find_model, temporary_cache_dir, user_cache_dir

ONNX_FILE = "model.onnx"
# One for each rung of the ladder of input sizes, for two cameras of different aspects.
_MOST_SESSIONS = 12
_MOST_LOGITS_PX = 1 << 26
_LOG = logging.getLogger(__name__)


class OnnxEngine(NetworkEngine):
    """Runs a model's ONNX file; makes the file when the model has none for the size at hand.

    A file is for one size of the network's input; the sessions of the sizes used last stay open.

    Args:
        model: a shipped model's name or a model folder's path. Its `model.onnx` is used when it was made from its
            weights for the size at hand, else one in the cache, which is made on first use.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads; 0 is automatic.
        execution_provider: "cpu", "cuda" or "tensorrt"; empty takes the device's own (TensorRT must be asked for: it
            builds for minutes on first use).
        cache_dir: folder of exported files and TensorRT's engines; None is the user's cache.
        precision: "float32", or "float16" with TensorRT, which builds its engine for it; files are float32 either way.
            "auto" takes the latter where it can.

    Raises:
        ModelError, ConfigError: the model cannot be loaded, or the provider does not run on such a device.
        EngineError: onnxruntime is missing, or a named device does not work, or its provider fell back to the CPU.
    """

    def __init__(
        self, model: str | Path, device: str = "auto", threads: int = 0, execution_provider: str = "",
        cache_dir: Path | None = None, precision: str = "float32",
    ) -> None:  # fmt: skip
        if precision == "auto":
            precision = "float16" if execution_provider == "tensorrt" else "float32"
        if precision != "float32" and (precision, execution_provider) != ("float16", "tensorrt"):
            raise ConfigError(
                f"precision: got {precision!r}, expected float32 with the engine onnxruntime"
                " (float16 with its provider tensorrt only), or another engine"
            )
        self._half = precision == "float16"
        if threads > 0:
            torch.set_num_threads(threads)
        self._model, self._threads, self._execution_provider = model, threads, execution_provider
        self._cache_dir = cache_dir or user_cache_dir() / "onnx"
        config = load_config(model)
        self._weights_sha256 = hash_weights(model)
        selected, reason = select_device(device)
        check_memory(config, selected)  # the export runs the network, too
        session, problem = self._open(config, config.input.size, selected)
        if problem:
            if device != "auto" or execution_provider:
                raise EngineError(
                    f"device {device!r} cannot be used: {problem}; install an onnxruntime-gpu that fits this "
                    "machine's CUDA, or set device to cpu or auto"
                )
            selected, reason = torch.device("cpu"), problem
            session, _ = self._open(config, config.input.size, selected)
        super().__init__(
            "onnxruntime", config, selected, describe_device(selected), reason, self._weights_sha256, precision
        )
        self._sessions: dict[tuple[int, int], Any] = {}
        self._keep(config.input.size, session)

    def infer(
        self, x: Tensor, settings: Settings, lap: Lap = lambda stage: None, exempt: Tensor | None = None
    ) -> NetworkOutput:
        """Run the network alone; its one stage is `network`.

        A batch's images share their exempt tokens: what must be kept in one is kept in all.
        """
        output = self._run(x, settings.merge_threshold, settings.token_capacity, exempt)
        total = output.grid_size[0] * output.grid_size[1]
        floor = min(settings.min_tokens, settings.token_capacity or total, total)
        if self._config.network.merges and output.token_capacity < floor:
            # The file knows an upper bound only. With a threshold of 1 that is what is kept.
            rung = choose_capacity(default_ladder(total), floor)
            bound = min(rung, settings.token_capacity or rung)
            output = self._run(x, 1.0, bound, exempt)
        lap("network")
        return output

    def _run(self, x: Tensor, merge_threshold: float, token_capacity: int, exempt: Tensor | None) -> NetworkOutput:
        size = (x.shape[2], x.shape[3])
        session = self._session(size)
        grid_size = grid_size_of(size, self._config.network.patch_size)
        B, N = x.shape[0], grid_size[0] * grid_size[1]
        x = x.contiguous()
        logits = torch.empty(B, len(self._config.classes), *_logits_size(session), device=self._device)
        cluster_ids = torch.empty(B, N, dtype=torch.int64, device=self._device)
        capacity = np.empty((), np.int64)

        if exempt is not None:
            return self._run_exempt(session, x, merge_threshold, token_capacity, exempt)
        if self._device.type == "cuda":
            # ONNX Runtime has a stream of its own, which does not wait for the one that fills x.
            torch.cuda.current_stream(self._device).synchronize()
        try:
            binding = session.io_binding()
            binding.bind_cpu_input("merge_threshold", np.array(merge_threshold, np.float32))
            binding.bind_cpu_input("token_capacity", np.array(token_capacity, np.int64))
            device = {"device_type": self._device.type, "device_id": self._device.index or 0}
            binding.bind_input("images", **device, **_buffer(x, np.float32))
            binding.bind_output("logits", **device, **_buffer(logits, np.float32))
            binding.bind_output("cluster_ids", **device, **_buffer(cluster_ids, np.int64))
            binding.bind_output("capacity", "cpu", 0, element_type=np.int64, shape=(), buffer_ptr=capacity.ctypes.data)
            session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
            raise EngineError(f"{self._info.device} failed on a batch of shape {tuple(x.shape)}: {error}") from error
        merges = self._config.network.merges
        return NetworkOutput(logits, cluster_ids if merges else None, grid_size, int(capacity))

    def _run_exempt(
        self, session: Any, x: Tensor, merge_threshold: float, token_capacity: int, exempt: Tensor
    ) -> NetworkOutput:
        """As `_run`, through host memory: optional inputs cannot be bound."""
        if EXEMPT_NAME not in {value.name for value in session.get_overridable_initializers()}:
            raise ConfigError(
                "this network's way to merge cannot exempt single tokens; leave merge_exempt_classes and "
                "merge_exempt_region empty"
            )
        shared = exempt if exempt.ndim == 1 else exempt.any(dim=0)
        feed = {
            "images": x.cpu().numpy(), "merge_threshold": np.array(merge_threshold, np.float32),
            "token_capacity": np.array(token_capacity, np.int64), EXEMPT_NAME: shared.numpy(),
        }  # fmt: skip
        try:
            logits, cluster_ids, capacity = session.run(None, feed)
        except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
            raise EngineError(f"{self._info.device} failed on a batch of shape {tuple(x.shape)}: {error}") from error
        grid_size = grid_size_of((x.shape[2], x.shape[3]), self._config.network.patch_size)
        ids = torch.from_numpy(cluster_ids).to(self._device)
        return NetworkOutput(torch.from_numpy(logits).to(self._device), ids, grid_size, int(capacity))

    def _session(self, size: tuple[int, int]) -> Any:
        """The session for a size of the network's input, made first if need be."""
        session = self._sessions.pop(size, None)
        if session is None:
            session, problem = self._open(self._config, size, self._device)
            if problem:
                raise EngineError(f"{self._info.device}: {problem}")
            self._keep(size, session)
        self._sessions[size] = session  # the last one now
        return session

    def _keep(self, size: tuple[int, int], session: Any) -> None:
        while len(self._sessions) >= _MOST_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        self._sessions[size] = session
        self._info = replace(self._info, execution_providers=describe_providers(session))

    def _open(self, config: ModelConfig, size: tuple[int, int], device: torch.device) -> tuple[Any, str]:
        """A session for a size of the network's input, and why it is not on the wanted provider."""
        path = self._find_file(config, size)
        opened = open_session(path, device, self._threads, self._execution_provider, self._cache_dir, self._half)
        session = opened[0]
        found = {value.name: tuple(value.shape[1:]) for value in (*session.get_inputs(), *session.get_outputs())}
        wanted = {"images": (3, *size), "logits": (len(config.classes), *_logits_size(session))}
        for name, shape in wanted.items():
            dimensions = found.get(name, ())
            # A text is a size that the file computes.
            fits = [size == n or isinstance(size, str) for size, n in zip(dimensions, shape, strict=False)]
            if len(dimensions) != len(shape) or not all(shape) or not all(fits):
                raise ModelError(
                    f"{path}: its {name} are {dimensions}, the model's and its metadata's {shape}; delete the file, or "
                    f"make it again with 'clustvit-ros export --model {self._model}'"
                )
        return opened

    def _find_file(self, config: ModelConfig, size: tuple[int, int]) -> Path:
        wanted = describe_export(config, self._weights_sha256, size, None)
        shipped = find_model(self._model) / ONNX_FILE
        if shipped.exists():
            inside(shipped.parent, ONNX_FILE)
        if shipped.is_file():
            found = {"temperature": "1.0", **read_metadata(shipped)}
            decisive = ["format", "weights_sha256", "network", "temperature"]
            decisive += [name for name in ("input_size", "batch") if name not in found]
            stale = [name for name in decisive if found.get(name) != wanted[name]]
            if stale:
                raise ModelError(
                    f"{shipped}: its {', '.join(stale)} differs from the model's; delete the file, or make it again "
                    f"with 'clustvit-ros export --model {self._model}'"
                )
            if found["input_size"] == wanted["input_size"] and found["batch"] == wanted["batch"]:
                return shipped
        # The metadata decides a file's content, so it also names the file.
        key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
        folders = dict.fromkeys((self._cache_dir, temporary_cache_dir() / "onnx"))  # a home may have no room
        paths = [folder / f"{config.name}-{size[0]}x{size[1]}-{key}.onnx" for folder in folders]
        if (made := next(filter(os.path.isfile, paths), None)) is not None:
            return made
        problem = ""
        for path in paths:
            _LOG.info("exporting %s for %dx%d to %s", config.name, *size, path)
            try:
                return export_onnx(self._model, path, size).path
            except OSError as error:
                problem = f"{path}: {error.strerror or error}"
                _LOG.warning("the export cannot be written to %s", problem)
        raise EngineError(
            f"the engine onnxruntime has no place for its exported file ({problem}); set XDG_CACHE_HOME to a folder "
            "with room for the model, or use the engine torch, which writes none"
        )


def _logits_size(session: Any) -> tuple[int, int]:
    """(h, w) of a file's logits, which need not be the tokens' grid; zeros where its metadata does not say."""
    try:
        height, width = map(int, json.loads(session.get_modelmeta().custom_metadata_map["logits_size"]))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return 0, 0
    return (height, width) if 0 < height * width <= _MOST_LOGITS_PX else (0, 0)


def _buffer(tensor: Tensor, element_type: type) -> dict[str, Any]:
    """A tensor's memory, as ONNX Runtime wants it bound."""
    return {"element_type": element_type, "shape": tuple(tensor.shape), "buffer_ptr": tensor.data_ptr()}
