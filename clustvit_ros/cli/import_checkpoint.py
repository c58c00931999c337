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
import sys
from pathlib import Path
from typing import Any

from clustvit_ros.classes import ClassSet, class_set_names, load_class_set
from clustvit_ros.errors import ConfigError, ModelError
from clustvit_ros.networks.architectures import network_config
from clustvit_ros.networks.model_folder import InputConfig, ModelConfig, save_model
from clustvit_ros.networks.official import hints_of
from clustvit_ros.networks.vit_config import ViTConfig
from clustvit_ros.networks.weights import fill_network, network_for, read_checkpoint

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
    try:
        architecture, overrides, num_classes = network_for(checkpoint, known, args.arch)
    except (IndexError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ModelError(
            f"{args.checkpoint}: holds no network of a known layout ({type(error).__name__}: {error}); expected an "
            "OpenMMLab checkpoint of ClustViT or ViT, or a ViT encoder of timm or DeiT"
        ) from error
    if num_classes is None:
        if args.classes is None:
            kind = "an encoder without a head; name the classes"
            if "clustr" in architecture:
                kind = "a ClusTR classifier; name the classes to segment"
            raise ConfigError(f"{args.checkpoint}: is {kind} with --classes")
        classes = load_class_set(args.classes)
        overrides |= {"head": args.head} if args.head else {}
    else:
        for option in ("arch", "head"):
            if getattr(args, option):
                raise ConfigError(f"--{option}: is for an encoder without a head, {args.checkpoint} has one")
        classes = _classes(args.classes, num_classes)
    settings = network_config(architecture, overrides)
    network, left_out, fresh = fill_network(settings, len(classes), checkpoint, str(args.checkpoint))
    config = ModelConfig(
        args.out.name, architecture, settings, classes, overrides=overrides,
        input=dataclasses.replace(_NORMALISATIONS[args.normalisation], size=settings.image_size),
        training={"data": f"imported from {args.checkpoint.name}"},
    )  # fmt: skip
    save_model(args.out, config, network)
    about = ""
    if isinstance(settings, ViTConfig):
        about = f"width {settings.embed_dim}, {settings.depth} blocks of {settings.num_heads} heads, "
        about += f"merging after block {settings.injection_point}, " if settings.merges else ""
        about += f"{settings.head} head, "
    print(f"{args.out}: {architecture}, {about}{len(classes)} classes")
    if isinstance(settings, ViTConfig):
        _tell_assumptions(settings, {**hints_of(checkpoint.model), **known})
    if left_out:
        print(f"left out: {', '.join(left_out)}")
    if fresh:
        modules = {".".join(name.split(".")[: 1 if name.startswith("head") else 2]) for name in fresh}
        print(f"fresh, to be trained: {', '.join(sorted(modules))}")
    return 0


def _tell_assumptions(settings: ViTConfig, told: dict[str, Any]) -> None:
    """Say what no shape tells and nobody said: other values fit the weights as well, and give wrong masks."""
    assumed = [] if "num_heads" in told else [f"{settings.num_heads} heads (--num-heads)"]
    if settings.merge_method == "clusters" and "injection_point" not in told:
        assumed.append(f"merging after block {settings.injection_point} (--injection-point)")
    if settings.head == "segmenter" and not {"head_heads", "num_heads"} & told.keys():
        assumed.append(f"{settings.head_heads or settings.num_heads} heads in the decode head (--head-heads)")
    if assumed:
        print(
            f"warning: assumed, since neither the file nor you say so: {', '.join(assumed)}; with others the weights "
            "fit as well, and masks are wrong: compare with the configuration they were trained with",
            file=sys.stderr,
        )


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
