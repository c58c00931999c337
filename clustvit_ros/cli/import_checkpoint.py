# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros import-checkpoint`: an official checkpoint, or an encoder for a fresh head, becomes a model folder."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import torch

from clustvit_ros.classes import ClassSet, class_set_names, load_class_set
from clustvit_ros.config import to_mapping
from clustvit_ros.errors import ConfigError
from clustvit_ros.networks.architectures import ARCHITECTURES, build_network, network_config
from clustvit_ros.networks.clustr import ClusTRConfig
from clustvit_ros.networks.model_folder import InputConfig, ModelConfig, check_weights, save_model
from clustvit_ros.networks.official import count_classes, network_of
from clustvit_ros.networks.segmenter import NetworkConfig, Segmenter
from clustvit_ros.networks.vit import grid_size_of
from clustvit_ros.networks.vit_config import ViTConfig
from clustvit_ros.networks.weights import (
    Checkpoint,
    clustr_shape,
    import_weights,
    is_clustr,
    is_vit_encoder,
    read_checkpoint,
    read_encoder,
    resize_positions,
)

# Keys of a configuration file, as the reference cases name them, and ours.
_CONFIG_KEYS = {
    "arch": "backbone", "embed_dims": "embed_dim", "num_layers": "depth", "num_heads": "num_heads",
    "img_size": "image_size", "patch_size": "patch_size", "num_clusters": "num_clusters",
    "injection_point": "injection_point", "cluster_mlp_size": "cluster_mlp_dim", "head_layers": "head_depth",
    "head_heads": "head_heads",
}  # fmt: skip
_NORMALISATIONS = {
    "half": InputConfig((1, 1)),
    "imagenet": InputConfig((1, 1), mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
}
_IGNORED_CONFIG_KEYS = {"num_classes", "batch_size", "input_size", "test_cfg", "weights"}
_CLUSTERING_ONLY = {"num_clusters", "injection_point", "cluster_mlp_dim"}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "import-checkpoint", help="make a model folder of an official ClustViT or ViT checkpoint"
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True,
        help="OpenMMLab checkpoint (.pth), or a ViT encoder of timm, DeiT or OpenMMLab (.pth, .safetensors)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="model folder to write, e.g. models/NAME")
    parser.add_argument("--config", type=Path, help="JSON file with what shapes cannot tell; options below override it")
    parser.add_argument("--injection-point", type=int, help="blocks before merging (official default: 3)")
    parser.add_argument("--num-heads", type=int, help="heads of the encoder (official default: one per 64 channels)")
    parser.add_argument("--head-heads", type=int, help="heads of the decode head (default: as the encoder)")
    parser.add_argument("--image-size", help="HxW the position embedding was trained for (default: square)")
    parser.add_argument("--classes", help="a packaged class list; default: the one with as many classes, else numbers")
    parser.add_argument("--arch", help="encoder only: architecture to put it in (default: the plain ViT of its size)")
    parser.add_argument("--head", choices=("segmenter", "upernet", "linear"), help="encoder only: its fresh head")
    parser.add_argument(
        "--normalisation", choices=_NORMALISATIONS, default="half",
        help="of the images it was trained with: half is (v - 127.5) / 127.5 (default), imagenet is DeiT's",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    checkpoint = read_checkpoint(args.checkpoint)
    known = _read_config(args.config) if args.config else {}
    for name in ("injection_point", "num_heads", "head_heads"):
        if getattr(args, name) is not None:
            known[name] = getattr(args, name)
    if args.image_size:
        known["image_size"] = _size(args.image_size)
    if is_clustr(checkpoint.weights):
        return _import_clustr(args, checkpoint, known)
    if is_vit_encoder(checkpoint.weights):
        return _import_encoder(args, checkpoint, known)
    for option in ("arch", "head"):
        if getattr(args, option):
            raise ConfigError(f"--{option}: is for an encoder without a head, {args.checkpoint} has one")
    architecture, overrides = network_of(checkpoint.weights, checkpoint.model, known)
    network_settings = cast(ViTConfig, network_config(architecture, overrides))
    classes = _classes(args.classes, count_classes(checkpoint.weights))
    network = build_network(network_settings, len(classes))
    weights = import_weights(checkpoint).weights
    check_weights(network, weights, str(args.checkpoint))
    network.load_state_dict(weights)
    _save(args, architecture, network_settings, overrides, classes, network)
    return 0


def _import_encoder(args: argparse.Namespace, checkpoint: Checkpoint, known: dict[str, Any]) -> int:
    """An encoder's weights in a network whose other parts are fresh."""
    encoder = read_encoder(checkpoint.weights, checkpoint.grid_size)
    embed_dim = encoder.shapes["embed_dim"]
    heads = known.get("num_heads", max(embed_dim // 64, 1))
    architecture = args.arch or next(
        (
            name
            for name, published in ARCHITECTURES.items()
            if isinstance(published, ViTConfig)
            and (published.embed_dim, published.depth) == (embed_dim, encoder.shapes["depth"])
        ),
        "vit_t",
    )
    if not isinstance(ARCHITECTURES.get(architecture), ViTConfig):
        names = ", ".join(name for name, published in ARCHITECTURES.items() if isinstance(published, ViTConfig))
        raise ConfigError(f"--arch: got {architecture!r}, expected one of {names}")
    if args.classes is None:
        raise ConfigError(f"{args.checkpoint}: is an encoder without a head; name the classes with --classes")
    patch_size = encoder.shapes["patch_size"]
    wanted: dict[str, Any] = {
        "image_size": [length * patch_size for length in encoder.grid_size], "num_heads": heads,
        **({"head": args.head} if args.head else {}), **encoder.shapes, **known,
    }  # fmt: skip
    published = ARCHITECTURES[architecture]
    overrides = {name: value for name, value in wanted.items() if getattr(published, name) != value}
    network_settings = cast(ViTConfig, network_config(architecture, overrides))
    classes = load_class_set(args.classes)
    torch.manual_seed(0)
    network = build_network(network_settings, len(classes))
    weights = dict(encoder.weights)
    target = grid_size_of(network_settings.image_size, patch_size)
    weights["backbone.pos_embed"] = resize_positions(weights["backbone.pos_embed"], encoder.grid_size, target)
    fresh = [
        name
        for name in network.state_dict()
        if name.startswith(("head.", "backbone.clusterer.", "backbone.regenerator.", "backbone.later_"))
    ]
    own = network.state_dict()
    check_weights(network, {**{name: own[name] for name in fresh}, **weights}, str(args.checkpoint))
    network.load_state_dict(weights, strict=False)
    _save(args, architecture, network_settings, overrides, classes, network)
    if encoder.left_out:
        print(f"left out: {', '.join(encoder.left_out)}")
    modules = sorted({".".join(name.split(".")[: 1 if name.startswith("head") else 2]) for name in fresh})
    print(f"fresh, to be trained: {', '.join(modules)}")
    return 0


def _import_clustr(args: argparse.Namespace, checkpoint: Checkpoint, known: dict[str, Any]) -> int:
    """An official ClusTR classifier's encoder in a segmentation network whose head is fresh."""
    if args.classes is None:
        raise ConfigError(f"{args.checkpoint}: is a ClusTR classifier; name the classes to segment with --classes")
    shape = {**clustr_shape(checkpoint.weights), **known}
    size = ("embed_dims", "depths")
    architecture = args.arch or next(
        (
            name
            for name, published in ARCHITECTURES.items()
            if isinstance(published, ClusTRConfig) and all(list(getattr(published, key)) == shape[key] for key in size)
        ),
        "clustr_b1",
    )
    if not isinstance(ARCHITECTURES.get(architecture), ClusTRConfig):
        names = ", ".join(name for name, published in ARCHITECTURES.items() if isinstance(published, ClusTRConfig))
        raise ConfigError(f"--arch: got {architecture!r} for a ClusTR classifier, expected one of {names}")
    published = to_mapping(ARCHITECTURES[architecture])
    overrides = {name: value for name, value in shape.items() if published.get(name) != value}
    network_settings = network_config(architecture, overrides)
    classes = load_class_set(args.classes)
    torch.manual_seed(0)
    network = build_network(network_settings, len(classes))
    own = network.state_dict()
    weights = {name: x for name, x in import_weights(checkpoint).weights.items() if name.startswith("backbone.")}
    fresh = {name: own[name] for name in own if name.startswith("head.")}
    check_weights(network, {**fresh, **weights}, str(args.checkpoint))
    network.load_state_dict(weights, strict=False)
    _save_model(args, architecture, network_settings, overrides, classes, network)
    print(f"{args.out}: {architecture}, {len(classes)} classes\nfresh, to be trained: head")
    return 0


def _save(
    args: argparse.Namespace, architecture: str, network_settings: ViTConfig, overrides: dict[str, Any],
    classes: ClassSet, network: Segmenter,
) -> None:  # fmt: skip
    _save_model(args, architecture, network_settings, overrides, classes, network)
    point = f", merging after block {network_settings.injection_point}" if network_settings.merges else ""
    print(
        f"{args.out}: {architecture}, width {network_settings.embed_dim}, {network_settings.depth} blocks of "
        f"{network_settings.num_heads} heads{point}, {network_settings.head} head, {len(classes)} classes"
    )


def _save_model(
    args: argparse.Namespace, architecture: str, network_settings: NetworkConfig, overrides: dict[str, Any],
    classes: ClassSet, network: Segmenter,
) -> None:  # fmt: skip
    config = ModelConfig(
        name=args.out.name, architecture=architecture, network=network_settings, classes=classes,
        input=dataclasses.replace(_NORMALISATIONS[args.normalisation], size=network_settings.image_size),
        overrides=overrides, training={"data": f"imported from {args.checkpoint.name}"},
    )  # fmt: skip
    save_model(args.out, config, network)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: got {type(content).__name__}, expected an object")
    unknown = sorted(content.keys() - _CONFIG_KEYS.keys() - _IGNORED_CONFIG_KEYS)
    if unknown:
        raise ConfigError(f"{path}: unknown keys {', '.join(unknown)}; known: {', '.join(_CONFIG_KEYS)}")
    known = {_CONFIG_KEYS[key]: value for key, value in content.items() if key in _CONFIG_KEYS and value is not None}
    if known.get("backbone") == "vit":
        known = {key: value for key, value in known.items() if key not in _CLUSTERING_ONLY}
    return known


def _size(text: str) -> list[int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ConfigError(f"--image-size: got {text!r}, expected HEIGHTxWIDTH such as 512x512")
    return [int(height), int(width)]


def _classes(name: str | None, count: int) -> ClassSet:
    if name is not None:
        classes = load_class_set(name)
        if len(classes) != count:
            raise ConfigError(f"--classes: {name} has {len(classes)} classes, the checkpoint has {count}")
        return classes
    for packaged in class_set_names():
        classes = load_class_set(packaged)
        if len(classes) == count:
            print(f"{count} classes: named as in {packaged} (--classes chooses another list)")
            return classes
    return ClassSet.numbered(count)
