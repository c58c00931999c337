"""Starting weights from elsewhere: our own encoders and models, and ImageNet ViTs of timm and OpenMMLab.

Known key layouts: ours; timm's `vision_transformer` (also used for the augreg weights of Steiner et al., arXiv
2106.10270); mmsegmentation's and mmpretrain's `VisionTransformer`. What fits is loaded, position embeddings are resized
to the network's grid, and everything else is listed.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from clustvit_ros.errors import ModelError
from clustvit_ros.networks.model_folder import WEIGHTS_FILE, load_config
from clustvit_ros.networks.official import from_official
from clustvit_ros.networks.segmenter import Segmenter
from clustvit_ros.networks.vit import VisionTransformer, grid_size_of
from clustvit_ros.paths import MODEL_FILE, share_dir
from clustvit_ros.training.widening import widen

ENCODER_FILE = "encoder.safetensors"
_WRAPPERS = ("state_dict", "model", "model_state", "module")


class InitReport(NamedTuple):
    """What became of a file of weights.

    Attributes:
        source: the file.
        loaded: names of the network that were filled.
        resized: those of them whose position embedding was resized.
        missing: names of the network that keep their random values.
        unknown: names of the file that have no place.
        mismatched: names that exist on both sides with different shapes, and which.
        widened: how many times as wide as the file the network is; 1 is as wide.
    """

    source: str
    loaded: list[str]
    resized: list[str]
    missing: list[str]
    unknown: list[str]
    mismatched: list[str]
    widened: int = 1

    def __str__(self) -> str:
        parts = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        if self.widened > 1:
            parts.append(f"widened {self.widened} times")
        for title, names in (
            ("resized", self.resized),
            ("left random", self.missing),
            ("not used", self.unknown),
            ("of another shape", self.mismatched),
        ):
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                parts.append(f"{title}: {', '.join(names[:8])}{more}")
        return "; ".join(parts)


def initialise(network: Segmenter, source: str | Path) -> InitReport:
    """Fill a network with what fits from a file or model folder.

    Weights of a ViT half as wide, or any other whole part, are widened: see `widening`.

    Args:
        network: its backbone has to be a ViT as this package builds it; changed in place.
        source: a model folder, a shipped model's name, or a file of weights (.safetensors, or what `torch.load` reads
            with `weights_only=True`).

    Raises:
        ModelError: unreadable, or nothing in it fits.
    """
    path = _find(source)
    weights = _to_ours(_read(path))
    own = network.state_dict()
    times = _times_wider(network, weights)
    if times > 1:
        weights = widen(weights, {name: value.shape for name, value in own.items()}, times)
    resized = []
    key = "backbone.pos_embed"
    if key in weights and key in own and weights[key].shape != own[key].shape:
        grid = getattr(network.backbone, "grid_size", None)
        fitted = None if grid is None else _resize_pos_embed(weights[key], grid, _source_grid(path))
        if fitted is not None and fitted.shape == own[key].shape:
            weights[key] = fitted
            resized.append(key)
    matching = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    # The norm statistics of a stem mean nothing without its kernels, so counters alone are no fit.
    if not any(value.ndim >= 2 for value in matching.values()):
        raise ModelError(
            f"{path}: none of its {len(weights)} tensors fits the network; expected a ViT of width "
            f"{network.backbone.embed_dim} or a whole part of it in the layout of this package, timm or mmsegmentation"
        )
    mismatched = [
        f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in weights.items()
        if name in own and own[name].shape != value.shape
    ]
    network.load_state_dict({name: value.to(own[name].dtype) for name, value in matching.items()}, strict=False)
    return InitReport(
        source=str(path),
        loaded=sorted(matching),
        resized=resized,
        missing=[name for name in own if name not in matching],
        unknown=sorted(name for name in weights if name not in own),
        mismatched=mismatched,
        widened=times,
    )


def _times_wider(network: Segmenter, weights: dict[str, Tensor]) -> int:
    """How many times as wide as the weights' ViT the network's is; 1 where it is no whole number."""
    source = weights.get("backbone.cls_token")
    if source is None or not isinstance(network.backbone, VisionTransformer):
        return 1
    width, source_width = network.backbone.embed_dim, source.shape[-1]
    return width // source_width if width % source_width == 0 else 1


def save_encoder(path: Path, backbone: VisionTransformer) -> None:
    """Write a backbone for `initialise`, without what pre-training does not reach (clusterer, regenerator).

    Args:
        path: `.safetensors` file; it is replaced when the new one is complete.
        backbone: as `Segmenter.backbone`.
    """
    skipped = ("clusterer.", "regenerator.")
    weights = {
        f"backbone.{name}": tensor.detach().cpu().contiguous()
        for name, tensor in backbone.state_dict().items()
        if not name.startswith(skipped)
    }
    grid = "x".join(map(str, backbone.grid_size))
    partial = path.with_name(path.name + ".partial")
    save_file(weights, partial, metadata={"grid_size": grid})
    partial.chmod(0o644)
    partial.replace(path)


def _find(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    for folder in (path, share_dir() / "models" / str(source)):
        if (folder / MODEL_FILE).is_file():
            return folder / WEIGHTS_FILE
    raise ModelError(
        f"init: {source} does not exist; expected a file of weights, a model folder or a shipped model's name"
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{path}: cannot be read as weights ({reason}); pass a .safetensors file, or save the state_dict alone"
        ) from error
    for name in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise ModelError(f"{path}: holds no tensors by name; expected a state_dict")
    return tensors


def _to_ours(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename to our keys; a bias of the patch projection, which our networks do not have, moves into the positions."""
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    if "patch_embed.proj.weight" in weights or "backbone.patch_embed.proj.weight" in weights:
        renamed = {_from_timm(name.removeprefix("backbone.")): value for name, value in weights.items()}
    elif any(re.match(r"(backbone\.)?layers\.\d+\.", name) for name in weights):
        prefixed = {
            name if name.startswith(("backbone.", "decode_head.", "head.")) else f"backbone.{name}": value
            for name, value in weights.items()
        }
        renamed = from_official(prefixed)
    else:
        return dict(weights)
    bias = renamed.pop("backbone.patch_embed.projection.bias", None)
    pos_embed = renamed.get("backbone.pos_embed")
    if bias is not None and pos_embed is not None:
        shift = torch.zeros_like(pos_embed)
        shift[:, 1:] = bias
        renamed["backbone.pos_embed"] = pos_embed + shift
    return renamed


def _from_timm(name: str) -> str:
    if name.startswith("patch_embed.proj."):
        return "backbone.patch_embed.projection." + name.removeprefix("patch_embed.proj.")
    if name in ("cls_token", "pos_embed") or name.startswith(("blocks.", "norm.")):
        return f"backbone.{name}"
    return name


def _source_grid(path: Path) -> tuple[int, int] | None:
    """The grid a file's position embedding was made for, where something beside or in the file says so."""
    if (path.parent / MODEL_FILE).is_file() and path.name == WEIGHTS_FILE:
        network = load_config(path.parent).network
        return grid_size_of(network.image_size, network.patch_size)
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("grid_size", "")
        if re.fullmatch(r"\d+x\d+", text):
            height, width = map(int, text.split("x"))
            return height, width
    return None


def _resize_pos_embed(
    pos_embed: Tensor, grid_size: tuple[int, int], source_grid: tuple[int, int] | None
) -> Tensor | None:
    """Bicubic: (1, 1+N, C) -> (1, 1+h*w, C); None when N patches are no grid (square unless known)."""
    num_tokens = pos_embed.shape[1] - 1
    if source_grid is None:
        side = round(num_tokens**0.5)
        source_grid = side, side
    if pos_embed.ndim != 3 or source_grid[0] * source_grid[1] != num_tokens:
        return None
    cls, grid = pos_embed[:, :1].float(), pos_embed[:, 1:].float()
    grid = grid.transpose(1, 2).unflatten(2, source_grid)
    grid = F.interpolate(grid, size=grid_size, mode="bicubic", align_corners=False)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)
