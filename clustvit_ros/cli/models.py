# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros models`, `get` and `import-checkpoint`: what models there are, and how more come here.

An official checkpoint, downloaded or at hand, or an encoder for a fresh head, becomes a model folder.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clustvit_ros.classes import ClassSet, class_set_names, load_class_set
from clustvit_ros.cli.arguments import new_folder
from clustvit_ros.config import from_mapping, to_mapping
from clustvit_ros.download import check_address, download, progress_bar
from clustvit_ros.errors import ClustvitError, ConfigError, ModelError
from clustvit_ros.networks.architectures import check_sizes, network_config
from clustvit_ros.networks.checkpoint import Checkpoint, read_checkpoint, read_hyperparameters
from clustvit_ros.networks.model_folder import InputConfig, ModelConfig, load_config, save_model
from clustvit_ros.networks.official import hints_of
from clustvit_ros.networks.vit_config import ViTConfig
from clustvit_ros.networks.weights import (
    as_rgb,
    assumptions,
    check_stated,
    fill_network,
    is_as_said,
    network_for,
    with_policy_net,
)
from clustvit_ros.paths import (
    MODEL_FILE,
    hash_file,
    shipped_models,
    shipped_recipes,
    user_cache_dir,
    user_models,
    user_models_dir,
)
from clustvit_ros.released import Released, load_released

_NORMALISATIONS = {
    "half": InputConfig((1, 1)),
    "imagenet": InputConfig((1, 1), mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
}
_IMPORTED = "imported from "  # what the data of such a model begins with


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "import-checkpoint", help="make a model folder of an official ClustViT, CTS or ViT checkpoint"
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
    parser.add_argument("--classes", help="a packaged class list (default: the file's names, or the list with as many)")
    parser.add_argument("--arch", help="encoder only: architecture to put it in (default: the plain ViT of its size)")
    parser.add_argument("--head", choices=("segmenter", "upernet", "linear"), help="encoder only: its fresh head")
    parser.add_argument(
        "--normalisation", choices=_NORMALISATIONS,
        help="of the images it was trained with: half is (v - 127.5) / 127.5, imagenet is DeiT's (default: as its "
        "configuration in the file says, else half)",
    )  # fmt: skip
    parser.add_argument("--policy-net", type=Path, help="CTS: file of a policy network that the checkpoint lacks")
    parser.add_argument("--entry", help="where in the file the weights lie (default: state_dict or the like)")
    parser.set_defaults(run=run)


def add_list_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("models", help="list models and training recipes: shipped, got, or released by others")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--released", action="store_true", help="list what `clustvit-ros get` can fetch")
    _add_released_list(parser)
    parser.set_defaults(run=list_models)


def add_get_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "get", help="download released weights as a model, under a name that every command takes",
        description="Downloads a checkpoint, resumably, and imports it without executing anything in it.",
    )  # fmt: skip
    parser.add_argument("model", help="one of `clustvit-ros models --released`, or the address of a checkpoint")
    parser.add_argument("--out", type=Path, help="model folder to write (default: NAME among the user's models)")
    parser.add_argument("--file", type=Path, help="the checkpoint, already here: nothing is downloaded")
    parser.add_argument(
        "--max-gigabytes", type=float, default=4.0, help="refuse a larger file (default: 4)", metavar="GB"
    )
    parser.add_argument("--force", action="store_true", help="get it again, though it is here")
    _add_released_list(parser)
    parser.set_defaults(run=get)


def _add_released_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", type=Path, help="your own list, in the form of config/released.yaml", metavar="FILE")


def list_models(args: argparse.Namespace) -> int:
    """Print every model that is here, or that can be had: classes, scores, and what it may be used for."""
    if args.released or args.list:
        return _list_released(load_released(args.list), args.json)
    rows = [
        {
            "name": config.name, "architecture": config.architecture, "input_size": list(config.input.size),
            "classes": list(config.classes.names), "miou": config.scores.get("miou"),
            "split": config.scores.get("split"), "unseen": config.scores.get("unseen"),
            "data": config.training.get("data", ""), "terms": config.licence,
        }
        for config in map(load_config, [*shipped_models(), *user_models()])
    ]  # fmt: skip
    if args.json:
        print(json.dumps({"models": rows, "recipes": list(shipped_recipes())}, indent=1))
        return 0
    for row in rows:
        height, width = row["input_size"]
        # What the model is worth elsewhere comes first, where that was measured.
        stated = [s for s in (row["unseen"], row) if isinstance(s, dict) and isinstance(s.get("miou"), float)]
        score = f"mIoU {', '.join('{miou:.1f} ({split})'.format_map(s) for s in stated)}, " if stated else ""
        print(f"{row['name']}: {score}{row['architecture']} at {width}x{height}")
        for key in ("classes", "data", "terms"):
            text = ", ".join(row[key]) if key == "classes" else row[key]
            print(f"  {key:<8} {text}")
    print(f"recipes for `clustvit-ros train`: {', '.join(shipped_recipes())}")
    print("more: `clustvit-ros models --released`")
    return 0


def _list_released(released: Released, as_json: bool) -> int:
    here = {folder.name for folder in user_models()}
    rows = [
        {
            **to_mapping(model), "split": released.split(model), "terms": released.terms(model),
            "source": released.source, "here": model.name in here,
        }
        for model in released.models
    ]  # fmt: skip
    if as_json:
        print(json.dumps({"released": rows}, indent=1))
        return 0
    for row in rows:
        got = ", here" if row["here"] else ""
        print(f"{row['name']}: mIoU {row['miou']:.2f} ({row['split']}), {row['architecture']}{got}")
        for key in ("address", "terms", "note"):
            if row[key]:
                print(f"  {key:<8} {row[key]}")
    print(f"from {released.source}; `clustvit-ros get NAME` makes a model of one")
    return 0


def get(args: argparse.Namespace) -> int:
    """Download a checkpoint, unless it is here, and import it."""
    released = load_released(args.list)
    model = next((model for model in released.models if model.name == args.model), None)
    address = model.address if model else args.model
    if model is None:
        if "/" not in address:
            names = ", ".join(model.name for model in released.models)
            raise ConfigError(f"get: got {address!r}, expected an address (https://...) or one of {names}")
        check_address(address, "get")
        if args.out is None:
            raise ConfigError(f"get: {address} has no name here; pass --out FOLDER")
    out = args.out or user_models_dir() / args.model
    if (out / MODEL_FILE).is_file() and not args.force:
        if load_config(out).training.get("checkpoint") != address:
            raise ConfigError(f"--out: {out} is another model; name another folder, or pass --force to replace it")
        print(f"{out.name}: is here already, in {out} (--force gets it again)")
        return 0
    if not 0.0 < args.max_gigabytes < math.inf:
        raise ConfigError(f"--max-gigabytes: got {args.max_gigabytes:g}, expected a positive number")
    folder = user_cache_dir() / "downloads" / (model.name if model else hashlib.sha256(address.encode()).hexdigest())
    file = args.file or folder / f"{out.name}.pth"
    if args.file:
        if not file.is_file():
            raise ModelError(f"{file}: is no file; pass the checkpoint that {address} gives")
        if model is not None and model.sha256 and (found := hash_file(file)) != model.sha256:
            raise ModelError(f"{file}: SHA-256 is {found}, expected {model.sha256}; fetch it again")
    elif not file.is_file():
        if model is not None:  # before gigabytes have come for nothing
            network_config(model.architecture.replace("cts_", "vit_"), model.network, f"{model.name}: network")
        download(address, file, int(args.max_gigabytes * 1e9), model.sha256 if model else "", progress_bar())
    try:
        checkpoint = read_checkpoint(file)
    except ModelError:
        if not args.file:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        if model is None:
            origin = {"data": f"{_IMPORTED}{file.name}", "checkpoint": address}
            import_model(checkpoint, str(file), out, about={"training": origin})
        else:
            about = {
                "training": {"data": f"{model.data}, by {released.source}", "checkpoint": model.address},
                "scores": {"miou": model.miou, "split": released.split(model)}, "licence": released.terms(model),
            }  # fmt: skip
            import_model(
                checkpoint, str(file), out, defaults=model.network, class_set=model.data, about=about,
                said=model.architecture,
            )  # fmt: skip
    except (ConfigError, ModelError) as error:
        raise type(error)(f"{error}; `clustvit-ros import-checkpoint` has more options for that file") from error
    if not args.file:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"use it: --model {args.model if args.out is None else out}")
    return 0


def run(args: argparse.Namespace) -> int:
    known = read_hyperparameters(args.config) if args.config else {}
    for name in ("injection_point", "num_heads", "head_heads"):
        if getattr(args, name) is not None:
            known[name] = getattr(args, name)
    if args.image_size:
        known["image_size"] = _size(args.image_size)
    options = {name: getattr(args, name) for name in ("classes", "arch", "head", "normalisation")}
    checkpoint = read_checkpoint(args.checkpoint, args.entry)
    if args.policy_net:
        checkpoint, replaced = with_policy_net(checkpoint, read_checkpoint(args.policy_net).weights)
        if replaced:
            print(f"its own policy network gives way to that of {args.policy_net}")
    # What an import made can be made again; anything else in that place is kept.
    made = (args.out / MODEL_FILE).is_file() and str(load_config(args.out).training.get("data")).startswith(_IMPORTED)
    with contextlib.nullcontext() if made else new_folder(args.out):
        import_model(checkpoint, str(args.checkpoint), args.out, known, **options)
    return 0


def import_model(
    checkpoint: Checkpoint, path: str, out: Path, known: dict[str, Any] | None = None,
    defaults: dict[str, Any] | None = None, classes: str | None = None, class_set: str | None = None,
    arch: str | None = None, head: str | None = None, normalisation: str | None = None,
    about: dict[str, Any] | None = None, said: str | None = None,
) -> None:  # fmt: skip
    """Make a model folder of a checkpoint, and say what was assumed.

    Args:
        checkpoint: as read.
        path: what messages call it.
        out: model folder to write.
        known: hyper-parameters by the names of the network's configuration, which hold whatever the file says.
        defaults: those that hold where the file says nothing.
        classes: a packaged class list, whatever the file says; None takes the file's own.
        class_set: a packaged class list for a file without names.
        arch, head: for an encoder: architecture to put it in, and its fresh head.
        normalisation: a name in `_NORMALISATIONS`; None takes the file's own, else "half".
        about: what the model folder says of its origin: `training`, `scores`, `licence`. Scores are left out where the
            file is another network than `defaults` and `said` tell, or its classes are not as many as `class_set`'s.
        said: kind and size that the file is said to be of, e.g. "cts_b".

    Raises:
        ModelError: no known network, or weights that do not fit it.
        ConfigError: options that contradict the file.
    """
    checkpoint = as_rgb(checkpoint)
    told = {**(defaults or {}), **hints_of(checkpoint.model), **(known or {})}
    known = {**{name: value for name, value in told.items() if name in (defaults or {})}, **(known or {})}
    with _of_a_known_layout(path):
        architecture, overrides, num_classes = network_for(checkpoint, known, arch)
    check_sizes(overrides, path)  # before anything is built of that size
    others = [] if said is None or is_as_said(architecture, overrides, said, path) else [f"not the size of a {said}"]
    if num_classes is None:
        if classes is None:
            kind = "an encoder without a head; name the classes"
            if "clustr" in architecture:
                kind = "a ClusTR classifier; name the classes to segment"
            raise ConfigError(f"{path}: is {kind} with --classes")
        labels, note = load_class_set(classes), ""
        overrides |= {"head": head} if head else {}
    else:
        for option, value in (("arch", arch), ("head", head)):
            if value:
                raise ConfigError(f"--{option}: is for an encoder without a head, {path} has one")
        labels, note = _classes(classes, num_classes, checkpoint, class_set)
        if class_set and num_classes != (expected := len(load_class_set(class_set))):
            others.append(f"{num_classes} classes, {class_set} has {expected}")
    settings = network_config(architecture, overrides)
    for name, expected in (defaults or {}).items():
        if (found := getattr(settings, name)) != (tuple(expected) if isinstance(expected, list) else expected):
            others.append(f"{name} {found}, the list says {expected}")
    if others:
        about = {**(about or {}), "scores": {}}
        text = f"{path} is not what the published score is of, which is left out: {'; '.join(others)}"
        print(f"warning: {text}", file=sys.stderr)
    if isinstance(settings, ViTConfig):
        check_stated(checkpoint.model, settings, path)
    images = _input(normalisation, checkpoint.model, settings.image_size)
    with _of_a_known_layout(path):
        network, left_out, fresh = fill_network(settings, len(labels), checkpoint, path)
    config = ModelConfig(
        out.name, architecture, settings, labels, overrides=overrides, input=images,
        **{"training": {"data": f"{_IMPORTED}{Path(path).name}"}, **(about or {})},
    )  # fmt: skip
    save_model(out, config, network)
    text = ""
    if isinstance(settings, ViTConfig):
        text = f"width {settings.embed_dim}, {settings.depth} blocks of {settings.num_heads} heads, "
        text += f"merging after block {settings.injection_point}, " if settings.merge_method == "clusters" else ""
        text += f"{settings.shared_windows} windows share a token (CTS), " if settings.merge_method == "cts" else ""
        text += f"{settings.head} head, "
    print(f"{out}: {architecture}, {text}{len(labels)} classes" + (f"\n{note}" if note else ""))
    if checkpoint.entries:
        print(
            f"took {checkpoint.entry or 'the weights at its top'}; the file holds weights below "
            f"{', '.join(checkpoint.entries)} as well (--entry takes those)"
        )
    if isinstance(settings, ViTConfig):
        backbone = checkpoint.model.get("backbone")
        scheduled = isinstance(backbone, dict) and "policy_schedule" in backbone
        if assumed := assumptions(settings, {*told, *(["shared_windows"] if scheduled else [])}):
            print(
                f"warning: assumed, since neither the file nor you say so: {', '.join(assumed)}; with others the "
                "weights fit as well, and masks are wrong: compare with the configuration they were trained with",
                file=sys.stderr,
            )
    left_out = sorted([*left_out, *checkpoint.left_out])
    if left_out:
        more = f" and {len(left_out) - 10} more" if len(left_out) > 10 else ""
        print(f"left out: {', '.join(left_out[:10])}{more}")
    if fresh:
        modules = {".".join(name.split(".")[: 1 if name.startswith("head") else 2]) for name in fresh}
        print(f"fresh, to be trained: {', '.join(sorted(modules))}")


@contextlib.contextmanager
def _of_a_known_layout(path: str) -> Iterator[None]:
    """Tell as a ModelError what weights that are no network's make the code below stumble over."""
    try:
        yield
    except ClustvitError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise ModelError(
            f"{path}: holds no network of a known layout ({type(error).__name__}: {str(error)[:200]}); expected an "
            "OpenMMLab checkpoint of ClustViT or ViT, or a ViT encoder of timm or DeiT"
        ) from error


def _size(text: str) -> list[int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ConfigError(f"--image-size: got {text!r}, expected HEIGHTxWIDTH such as 512x512")
    return [int(height), int(width)]


def _classes(name: str | None, count: int, checkpoint: Checkpoint, class_set: str | None) -> tuple[ClassSet, str]:
    """Classes of a checkpoint with so many: as asked for, as the file names them, as its data set does, or numbers.

    What is to be told of them comes with them.
    """
    if name is not None:
        classes = load_class_set(name)
        if len(classes) != count:
            raise ConfigError(f"--classes: {name} has {len(classes)} classes, the checkpoint has {count}")
        return classes, ""
    note = checkpoint.classes_note
    if checkpoint.classes is not None and len(checkpoint.classes) == count:
        return checkpoint.classes, note
    if checkpoint.classes is not None:
        note = f"the file names {len(checkpoint.classes)} classes, its head has {count}"
    if note:
        return ClassSet.numbered(count), f"{note}; its classes are numbered (--classes names them)"
    for packaged in [class_set] if class_set else class_set_names():
        classes = load_class_set(packaged)
        if len(classes) == count:
            return classes, f"{count} classes: named as in {packaged} (--classes chooses another list)"
    return ClassSet.numbered(count), ""


def _input(normalisation: str | None, model: dict[str, Any], size: tuple[int, int]) -> InputConfig:
    """Size and normalisation of the images: as asked for, as the file's configuration says, or the official one."""
    stated = model.get("data_preprocessor")
    if normalisation is None and isinstance(stated, dict) and {"mean", "std"} & stated.keys():
        # Without a mean, MMEngine normalises nothing.
        mean, std = ((0, 0, 0), (1, 1, 1)) if stated.get("mean") is None else (stated["mean"], stated.get("std"))
        try:
            return from_mapping(InputConfig, {"size": size, "mean": mean, "std": std}, "")
        except ConfigError as error:
            raise ConfigError(f"data_preprocessor in the file: {error}; say what holds with --normalisation") from error
    return dataclasses.replace(_NORMALISATIONS[normalisation or "half"], size=size)
