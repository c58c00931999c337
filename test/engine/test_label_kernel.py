# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The fused label kernel: Triton's source in its interpreter, CUDA's compiled for a CPU, both against `label_maps`."""

from __future__ import annotations

import ctypes
import importlib
import shutil
import subprocess

import pytest
import torch

from clustvit_ros.engine import label_kernel
from clustvit_ros.engine.labels import label_maps

# What CUDA has and C++ has not, for one thread after the other.
_SHIM = """
#include <cmath>
#include <algorithm>
using std::min;
#define __global__
#define __device__
struct Dim { int x, y, z; } blockIdx, blockDim, threadIdx;
"""
_LOOP = """
extern "C" void run(int columns, int rows, int images, const Logit* logits, void* mask, unsigned char* confidence,
    const float* threshold, int Q, int h, int w, int H, int W, int b, int q, int y, int x, int ignore, int confident) {
  blockDim = {columns, 1, 1};
  for (blockIdx.z = 0; blockIdx.z < images; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < rows; ++blockIdx.y)
      for (threadIdx.x = 0; threadIdx.x < columns; ++threadIdx.x)
        label_kernel(logits, mask, confidence, threshold, Q, h, w, H, W, b, q, y, x, ignore, confident);
}
"""


@pytest.fixture(scope="module")
def triton_launcher():
    pytest.importorskip("triton", "3.0", reason="needs triton 3, of the extra 'triton'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.reload(label_kernel).launch_triton
    importlib.reload(label_kernel)


@pytest.fixture(scope="module")
def cuda_launcher(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "kernel.cpp").write_text(_SHIM + label_kernel.cuda_source(torch.float32) + _LOOP)
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", folder / "kernel.so", folder / "kernel.cpp"]
    subprocess.run(command, check=True, timeout=60)
    run = ctypes.CDLL(str(folder / "kernel.so")).run

    def launch(logits, mask, confidence, threshold):
        tensors = logits, mask, confidence, threshold
        pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
        numbers = label_kernel._numbers(logits, mask, confidence is not None)
        run(mask.shape[2], mask.shape[1], mask.shape[0], *pointers, *numbers)

    return launch


@pytest.fixture(params=["triton", "cuda"])
def launch(request):
    return request.getfixturevalue(f"{request.param}_launcher")


@pytest.mark.parametrize(
    ("classes", "grid", "size"),
    [(11, (6, 8), (9, 30)), (3, (5, 5), (5, 5)), (260, (2, 2), (3, 4)), (7, (9, 9), (3, 4))],
)
@pytest.mark.parametrize("threshold", [0.4, None])
def test_maps_equal_those_of_single_operations(launch, classes, grid, size, threshold):
    torch.manual_seed(classes)
    logits = 3.0 * torch.randn(2, *grid, classes).permute(0, 3, 1, 2)  # as channels-last heads leave them
    given = None if threshold is None else torch.tensor(threshold)
    mask, confidence = label_kernel.fused_label_maps(launch, logits, size, given)
    expected, certainty = label_maps(logits, size, threshold or 0.0, threshold is not None)
    assert mask.dtype == expected.dtype and (mask == expected).float().mean() > 0.99
    assert (confidence is None) == (certainty is None)
    if confidence is not None:
        assert (confidence.int() - certainty.int()).abs().float().quantile(0.98) <= 1
        if threshold:
            assert 0 < (mask == 255).float().mean() < 1 and torch.equal(mask == 255, confidence == 0)


def test_what_is_no_number_is_unlabelled(launch):
    logits = torch.randn(1, 4, 3, 3)
    logits[0, 2, 0, 0] = torch.nan
    mask, confidence = label_kernel.fused_label_maps(launch, logits, (9, 9), torch.tensor(0.0))
    expected, _ = label_maps(logits.nan_to_num(), (9, 9), 0.0)
    unlabelled = torch.zeros(1, 9, 9, dtype=torch.bool)
    unlabelled[:, :4, :4] = True  # what lies between a number and none is none
    assert torch.equal(mask == 255, unlabelled) and torch.equal(confidence == 0, unlabelled)
    assert torch.equal(mask[~unlabelled], expected[~unlabelled])
    assert torch.equal(label_kernel.fused_label_maps(launch, logits, (9, 9), None)[0], mask)


def test_half_precision_is_read_as_it_is(triton_launcher):
    logits = (3.0 * torch.randn(1, 5, 6, 6)).half()
    mask, _ = label_kernel.fused_label_maps(triton_launcher, logits, (20, 20), None)
    assert (mask == label_maps(logits.float(), (20, 20), 0.0, False)[0]).float().mean() > 0.99


def test_a_kernel_is_believed_once_it_was_right(cuda_launcher, monkeypatch, caplog):
    def wrong(logits, mask, confidence, threshold):
        cuda_launcher(logits, mask, confidence, threshold)
        mask[0, 0] += 1

    def broken(*_):
        raise RuntimeError("no such architecture\nmore lines")

    find, cpu = label_kernel.find_launcher.__wrapped__, torch.device("cpu")
    made = [("first", lambda: wrong), ("second", lambda: broken), ("third", lambda: cuda_launcher)]
    monkeypatch.setattr(label_kernel, "_makers", lambda dtype: iter(made))
    assert find(cpu, torch.float32) is cuda_launcher and not caplog.text
    del made[2]
    assert find(cpu, torch.float32) is None
    assert "first: 3% of a test picture's labels are wrong; second: RuntimeError: no such architecture" in caplog.text
