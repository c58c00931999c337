# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""A stand-in for TensorRT's Python package: its compiled files are ONNX files, which ONNX Runtime runs on a CPU."""

from __future__ import annotations

import ctypes
import enum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime

__version__ = "10.3.0"
broken: set[str] = set()
"""What fails: "parse", "build", "read", "run"."""
DataType = enum.Enum("DataType", "FLOAT HALF INT32 INT64 BOOL")
TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
BuilderFlag = enum.Enum("BuilderFlag", "FP16 PREFER_PRECISION_CONSTRAINTS")
NetworkDefinitionCreationFlag = SimpleNamespace(EXPLICIT_BATCH=0)
_TYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32), "tensor(int64)": (DataType.INT64, np.int64),
    "tensor(bool)": (DataType.BOOL, np.bool_),
}  # fmt: skip


class Logger:
    WARNING = 1

    def __init__(self, severity):
        pass


class Builder:
    def __init__(self, logger):
        pass

    def create_network(self, flags):
        names = "/clusterer/fc1/MatMul", "/blocks.0/mlp/MatMul"
        layers = [SimpleNamespace(name=name, precision=None) for name in names]
        for layer in layers:
            layer.get_output = lambda index: SimpleNamespace(dtype=DataType.FLOAT)
        return SimpleNamespace(source=b"", layers=layers, num_layers=len(layers), get_layer=layers.__getitem__)

    def create_builder_config(self):
        flags = set()
        return SimpleNamespace(flags=flags, set_flag=flags.add)

    def build_serialized_network(self, network, config):
        if BuilderFlag.FP16 in config.flags:
            assert [layer.precision for layer in network.layers] == [DataType.FLOAT, None]
        return None if "build" in broken else network.source


class OnnxParser:
    num_errors = 1

    def __init__(self, network, logger):
        self._network = network

    def parse_from_file(self, path):
        self._network.source = Path(path).read_bytes()
        return "parse" not in broken

    def get_error(self, index):
        return "no such operator"


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, content):
        return None if "read" in broken else _Engine(content)


class _Engine:
    def __init__(self, content):
        self._session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._values = self._inputs | {value.name: value for value in self._session.get_outputs()}
        self.num_io_tensors = len(self._values)

    def get_tensor_name(self, index):
        return list(self._values)[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return _TYPES[self._values[name].type][0]

    def get_tensor_shape(self, name):
        return self._values[name].shape

    def create_execution_context(self):
        addresses = {}

        def at(name):
            shape, kind = tuple(self.get_tensor_shape(name)), _TYPES[self._values[name].type][1]
            size = int(np.prod(shape)) * np.dtype(kind).itemsize
            buffer = (ctypes.c_char * size).from_address(addresses[name])
            return np.frombuffer(buffer, kind).reshape(shape)

        def run(stream):
            outputs = [name for name in self._values if name not in self._inputs]
            for name, value in zip(outputs, self._session.run(outputs, {n: at(n) for n in self._inputs}), strict=True):
                at(name)[...] = value
            return "run" not in broken

        return SimpleNamespace(set_tensor_address=addresses.__setitem__, execute_async_v3=run)
