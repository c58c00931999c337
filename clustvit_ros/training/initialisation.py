"""Starting weights from elsewhere: our own encoders and models, and whatever `networks.weights` imports.

What fits is loaded, position embeddings are resized to the network's grid, and everything else is listed.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from clustvit_ros.errors import ModelError
from clustvit_ros.networks.model_folder import WEIGHTS_FILE, load_config
from clustvit_ros.networks.segmenter import Segmenter
from clustvit_ros.networks.vit import VisionTransformer, grid_size_of
from clustvit_ros.networks.weights import import_weights, read_checkpoint, resize_positions
from clustvit_ros.paths import MODEL_FILE, share_dir
from clustvit_ros.training.widening import widen

ENCODER_FILE = "encoder.safetensors"


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


def load_init(network: Segmenter, source: str | Path) -> InitReport:
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
    weights, grid_size, left_out = import_weights(read_checkpoint(path))
    weights = dict(weights)
    own = network.state_dict()
    times = _times_wider(network, weights)
    if times > 1:
        weights = widen(weights, {name: value.shape for name, value in own.items()}, times)
    resized = []
    key, grid = "backbone.pos_embed", getattr(network.backbone, "grid_size", None)
    if key in weights and key in own and weights[key].shape != own[key].shape and grid is not None:
        source_grid = _grid_of_folder(path) or grid_size or _square(weights[key])
        if source_grid is not None and weights[key].shape[1] == source_grid[0] * source_grid[1] + 1:
            weights[key] = resize_positions(weights[key], source_grid, grid)
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
        resized=[name for name in resized if name in matching],
        missing=[name for name in own if name not in matching],
        unknown=sorted([*left_out, *(name for name in weights if name not in own)]),
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
    """Write a backbone for `load_init`, without what pre-training does not reach (clusterer, regenerator).

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


def _grid_of_folder(path: Path) -> tuple[int, int] | None:
    """The grid that a model folder's position embedding was made for; None for a file that stands alone."""
    if not (path.name == WEIGHTS_FILE and (path.parent / MODEL_FILE).is_file()):
        return None
    network = load_config(path.parent).network
    return grid_size_of(network.image_size, network.patch_size)


def _square(pos_embed: Tensor) -> tuple[int, int] | None:
    side = round((pos_embed.shape[1] - 1) ** 0.5)
    return (side, side) if pos_embed.ndim == 3 and side * side == pos_embed.shape[1] - 1 else None
