"""Does an exported file compute what PyTorch computes? Asked after every export."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clustvit_ros.errors import EngineError
from clustvit_ros.modeling.clustering import merge_scores, threshold_margin
from clustvit_ros.modeling.clustvit import ClustViT, Injection
from clustvit_ros.modeling.segmenter import Segmenter
from clustvit_ros.runtime.capacity import choose_capacity, default_ladder
from clustvit_ros.runtime.onnx_session import import_onnxruntime

LOGIT_TOLERANCE = 1e-3
# Tokens that are closer than this to a decision (merge margin, cluster logit) may be decided either way.
_TIE = 1e-3


def check_against_torch(path: Path, network: Segmenter, size: tuple[int, int], batch: int | None) -> float:
    """Compare an exported file with its network on several images, thresholds and capacities.

    Args:
        path: the file.
        network: in evaluation mode, on the CPU.
        size: (height, width) of the file's input.
        batch: its batch size; None (dynamic) is checked with one and two images.

    Returns:
        The largest difference of logits.

    Raises:
        EngineError: the file cannot be run, or a capacity, a cluster id or a logit differs.
    """
    onnxruntime = import_onnxruntime()
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        raise EngineError(f"export: ONNX Runtime {onnxruntime.__version__} cannot read the file: {error}") from error
    difference = 0.0
    for images, many_settings in zip(_images(size, batch), (True, False), strict=True):
        with torch.inference_mode():
            difference = max(difference, _check_images(session, network, images, many_settings))
    return difference


def _images(size: tuple[int, int], batch: int | None) -> tuple[Tensor, Tensor]:
    """Noise, and smooth gradients that cross the image: two batches of normalised images."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch or 1, 3, *size, generator=generator)
    rows, columns = torch.linspace(-1, 1, size[0])[:, None], torch.linspace(-1, 1, size[1])
    directions = torch.rand(batch or 2, 3, 2, 1, 1, generator=generator) * 6 - 3
    return noise, torch.sin(directions[:, :, 0] * rows + directions[:, :, 1] * columns)


def _check_images(session, network: Segmenter, images: Tensor, many_settings: bool) -> float:
    backbone = network.backbone if isinstance(network.backbone, ClustViT) else None
    state = None if backbone is None else backbone.encode(images)
    plain = network(images, merge_threshold=1.0).logits
    difference = 0.0
    for merge_threshold, token_capacity in _settings(state, many_settings):
        feed = {
            "images": images.numpy(),
            "merge_threshold": np.array(merge_threshold, np.float32),
            "token_capacity": np.array(token_capacity, np.int64),
        }
        logits, ids, capacity = (torch.from_numpy(np.asarray(output)) for output in session.run(None, feed))
        where = f"at merge_threshold {merge_threshold:.4g} and token_capacity {token_capacity}"
        expected = plain
        if backbone is not None and state is not None:
            _check_capacity(state, int(capacity), merge_threshold, token_capacity, where)
            _check_ids(state, ids, int(capacity), where)
            if int(capacity) < ids.shape[1]:
                features = backbone.finish(_decided(state, ids), token_capacity=int(capacity))
                expected = network.decode(features).logits
        found = float((logits - expected).abs().max())
        if not found <= LOGIT_TOLERANCE:  # a NaN is no match either
            raise EngineError(
                f"export: logits differ from PyTorch's by {found:.2g} {where}, allowed {LOGIT_TOLERANCE:g}; the file "
                f"was removed; try other versions than PyTorch {torch.__version__} and the ONNX Runtime here"
            )
        difference = max(difference, found)
    return difference


def _settings(state: Injection | None, many: bool) -> list[tuple[float, int]]:
    """Pairs of threshold and capacity, among them thresholds that split this image's tokens."""
    if state is None:
        return [(1.0, 0), (0.5, 3)]
    margin = merge_scores(state.cluster_logits).margin
    tokens_total = margin.shape[1]
    splitting = [float(torch.sigmoid(margin.quantile(share))) for share in (0.2, 0.6)]
    few = [(1.0, 0), (splitting[0], 0), (1.0, tokens_total // 3)]
    rest = [(0.0, 0), (0.5, 0), (splitting[1], 0), (0.5, 1), (1.0, tokens_total // 2), (splitting[1], tokens_total)]
    return few + rest if many else few


def _check_capacity(state: Injection, found: int, merge_threshold: float, token_capacity: int, where: str) -> None:
    margin, cut = merge_scores(state.cluster_logits).margin, threshold_margin(merge_threshold)
    ladder = default_ladder(margin.shape[1])
    least, most = (
        choose_capacity(ladder, int((~(margin > cut + tie)).sum(dim=1).max()), token_capacity) for tie in (-_TIE, _TIE)
    )
    if not least <= found <= most:
        raise EngineError(f"export: {found} tokens are kept {where}, PyTorch keeps {most}; the file was removed")


def _check_ids(state: Injection, ids: Tensor, capacity: int, where: str) -> None:
    """Exactly `capacity` tokens are kept, those of the lowest scores, and the others have their best cluster."""
    scores = merge_scores(state.cluster_logits)
    kept = ids == 0
    highest_kept = scores.margin.where(kept, -math.inf).amax(dim=1)
    lowest_merged = scores.margin.where(~kept, math.inf).amin(dim=1)
    chosen = state.cluster_logits.gather(2, ids[..., None])[..., 0]
    best = state.cluster_logits[..., 1:].amax(dim=2)
    wrong = int(((chosen < best - _TIE) & ~kept).sum())
    if not bool((kept.sum(dim=1) == capacity).all() and (highest_kept <= lowest_merged + _TIE).all()) or wrong:
        raise EngineError(
            f"export: the tokens that are kept, or the clusters of {wrong} merged ones, are not PyTorch's {where}; "
            "the file was removed"
        )


def _decided(state: Injection, ids: Tensor) -> Injection:
    """The same state with cluster logits that leave no doubt about `ids`: a tie then decides nothing."""
    return state._replace(cluster_logits=torch.nn.functional.one_hot(ids, state.cluster_logits.shape[2]).float())
