# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""What a GPU records as CUDA graphs keeps to what can be recorded, as far as that shows without a GPU.

While a graph is recorded, the device cannot be waited for (no value can be read back, no shape can follow from values)
and nothing can be brought to it from pageable memory. On the meta device, which has shapes and no values, the same
functions run, and an operation that would do either is caught.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clustvit_ros.engine.label_kernel import fused_label_maps
from clustvit_ros.engine.labels import static_label_maps
from clustvit_ros.engine.network_engine import cluster_map
from clustvit_ros.engine.pixels import device_input, upsampling
from clustvit_ros.networks import build_network, load_config, network_config
from clustvit_ros.networks.inference import for_inference
from clustvit_ros.networks.vit import grid_size_of

MODELS = sorted(path.parent.name for path in (Path(__file__).resolve().parents[2] / "models").glob("*/model.yaml"))
META = torch.device("meta")
CAMERA = (360, 480)


class NothingFromTheHost(TorchFunctionMode):
    """Refuses tensors that are made of the host's values on the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy) and result.is_meta:
            raise AssertionError(f"{func.__name__} brings values to the device")
        return result


class NothingBetweenDevices(TorchDispatchMode):
    """Refuses operations that read tensors of both devices; numbers in tensors are parameters of a kernel."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        read, made = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), result))
        kinds = {tensor.device.type for tensor in [*read, *made] if tensor.ndim > 0 or "copy" in str(func)}
        if len(kinds) > 1:
            raise AssertionError(f"{func} goes from one device to the other")
        return result


def record(config, num_classes, size, dtype=torch.float16):
    """Everything that `GraphEngine` records for a camera, on the meta device and watched."""
    with torch.no_grad():
        network = for_inference(build_network(config, num_classes).eval(), dtype).to(META)
        backbone = network.backbone
        grid_size = grid_size_of(size, backbone.patch_size)
        N = grid_size[0] * grid_size[1]
        with META:
            images = torch.empty(1, *CAMERA, 3, dtype=torch.uint8)
            offset, scale, number = torch.empty(1, 3, 1, 1), torch.empty(1, 3, 1, 1), torch.empty(())
            exempt = torch.empty(1, N, dtype=torch.bool)

        def run(how=None, shares=(1, 2, 8)):
            state = backbone.encode(device_input(images, size, offset, scale).to(dtype))
            if backbone.merges:
                state = backbone.exempt(state, exempt) if backbone.exempts else state
                backbone.count_kept(state, number).max()
            for share in shares if backbone.merges else (1,):
                features = backbone.finish(state, token_capacity=N // share)
                logits = network.decode(features).logits
            if how is not None:
                for threshold in (number, None):
                    static_label_maps(logits, how, threshold)
                if features.cluster_ids is not None:
                    cluster_map(features.cluster_ids, grid_size, CAMERA)
            return logits

        logits = run(shares=(2,))
        how = upsampling(tuple(logits.shape[2:]), CAMERA, META, logits.dtype)
        with NothingFromTheHost(), NothingBetweenDevices():
            run(how)


@pytest.mark.parametrize("name", MODELS)
def test_shipped_models(name):
    config = load_config(name)
    dtype = torch.float32 if name == "camvid_tiny" else torch.float16
    record(config.network, len(config.classes), config.input.size, dtype)


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=("float16", "float32")
)
@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("vit_t", {}),
        ("clustvit_t", {}),
        ("clustvit_t", {"decode": "grouped"}),
        ("clustvit_t", {"decode": "compact"}),
        ("clustvit_t", {"merging": "algm"}),
        ("clustvit_t", {"merging": "algm+clusters"}),
        ("vit_t", {"merging": "cts", "share_corner": True, "shared_windows": 103}),
        ("clustvit_t", {"merging": "tome"}),
        ("clustvit_t", {"merging": "kmeans"}),
        ("clustvit_t", {"merging": "stvit"}),
        *(("clustvit_t", {"merging": way, "decode": "compact"}) for way in ("algm", "tome", "kmeans", "stvit", "cts")),
        ("clustvit_t", {"injection_points": [2, 5]}),
        ("clustvit_t", {"head": "upernet"}),
        ("clustr_b1", {}),
        ("cast_t", {}),
    ],
)
def test_architectures(arch, overrides, dtype):
    record(network_config(arch, {"image_size": [512, 512], **overrides}), 20, (512, 512), dtype)


# Operations that start no kernel on a device.
VIEWS = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "t",
    "split", "unbind", "detach", "alias", "as_strided", "empty", "empty_strided", "empty_like", "new_empty", "narrow",
    "split_with_sizes", "unflatten", "flatten", "_reshape_alias", "lift_fresh",
}  # fmt: skip


class Counted(TorchDispatchMode):
    """Counts kernels, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.kernels = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            read, made = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), result))
            # Who picks rows reads as much as is written.
            read = [*read[1:], *made] if name in ("index", "gather", "index_select") else read
            self.kernels += 1
            self.bytes += sum(tensor.nbytes for tensor in (*read, *made))
        return result


if hasattr(torch.library, "custom_op"):  # from PyTorch 2.4 on

    @torch.library.custom_op("clustvit_test::attention", mutates_args=())
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.empty_like(q)

    @attention.register_fake
    def _(q, k, v):
        B, H, L, D = q.shape
        return torch.empty(B, L, H, D, dtype=q.dtype, device=q.device).transpose(1, 2)

    @torch.library.custom_op("clustvit_test::labels", mutates_args={"mask", "confidence"})
    def labels(logits: Tensor, mask: Tensor, confidence: Tensor | None, threshold: Tensor | None) -> None:
        pass

    @labels.register_fake
    def _(logits, mask, confidence, threshold):
        return None


def count_frame(name, camera, share, monkeypatch):
    """Kernels and bytes of each of the three graphs of a frame in float16; B at a share of the tokens."""
    fused = "scaled_dot_product_attention"
    monkeypatch.setattr(torch.nn.functional, fused, lambda q, k, v, attn_mask: attention(q, k, v))
    config = load_config(name)
    size, half = config.input.size, {"dtype": torch.float16, "device": META}
    with torch.no_grad():
        network = for_inference(build_network(config.network, len(config.classes)).eval(), torch.float16).to(META)
        backbone = network.to(memory_format=torch.channels_last).backbone
        grid_size = grid_size_of(size, backbone.patch_size)
        N = grid_size[0] * grid_size[1]
        images, exempt = torch.empty(1, *camera, 3, dtype=torch.uint8, device=META), torch.empty(1, N, device=META) > 0
        offset, scale = torch.empty(1, 3, 1, 1, **half), torch.empty(1, 3, 1, 1, **half)
        number = torch.empty((), device=META)
        backbone.constants(grid_size)
        counts = {}
        with Counted() as counts["A"]:
            state = backbone.exempt(backbone.encode(device_input(images, size, offset, scale)), exempt)
            backbone.count_kept(state, number).max()
        with Counted() as counts["B"]:
            features = backbone.finish(state, token_capacity=int(N * share))
            logits = network.decode(features).logits
            logits.clone(), features.cluster_ids.clone()  # into the buffers that all capacities share
        with Counted() as counts["maps"]:
            fused_label_maps(labels, logits, camera, number)
            (features.cluster_ids == 0).sum(dim=1).float()
    return {stage: (count.kernels, count.bytes / 1e6) for stage, count in counts.items()}


@pytest.mark.skipif(not hasattr(torch.library, "custom_op"), reason="counting needs PyTorch 2.4 or later")
def test_a_frame_stays_lean(monkeypatch):
    counts = count_frame("camvid_tiny", (480, 640), 0.625, monkeypatch)
    assert counts["maps"][1] <= 2 and counts["B"][0] <= 161, counts
    assert sum(kernels for kernels, _ in counts.values()) <= 230, counts
    assert sum(megabytes for _, megabytes in counts.values()) <= 190, counts
    unmerged = count_frame("camvid_tiny", (480, 640), 1.0, monkeypatch)
    few = count_frame("camvid_tiny", (480, 640), 0.125, monkeypatch)
    assert few["B"][1] < 0.55 * unmerged["B"][1], "merging saves traffic"


def test_the_watch_notices():
    x, index = torch.empty(4, 5, device=META), torch.tensor([0, 1])
    offences = [
        lambda: torch.tensor([1.0, 2.0], device=META), lambda: x[index], lambda: index.to(META), lambda: x.sum().item(),
        lambda: x[x > 0],
    ]  # fmt: skip
    for offence in offences:
        with pytest.raises((AssertionError, RuntimeError)), NothingFromTheHost(), NothingBetweenDevices():
            offence()
    with NothingFromTheHost(), NothingBetweenDevices():
        torch.where(x > 0, x + torch.tensor(2.0), 0.0)
