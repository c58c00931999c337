# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Types of command-line arguments that several commands take."""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from clustvit_ros.config import read_yaml
from clustvit_ros.engine import Settings
from clustvit_ros.errors import ConfigError, ModelError
from clustvit_ros.networks.model_folder import WEIGHTS_FILE, check_folder, load_config, weights_path
from clustvit_ros.networks.segmenter import NetworkConfig
from clustvit_ros.networks.vit_config import DECODINGS, MERGINGS, ViTConfig
from clustvit_ros.paths import MODEL_FILE, find_model, model_name, shipped_models
from clustvit_ros.policy.parameters import MOST_THREADS

# Of any command, and what says that they were not given.
_MERGE_OPTIONS = (
    ("merge_threshold", Settings.merge_threshold), ("token_capacity", Settings.token_capacity),
    ("kept_fraction", None), ("capacity", None),
)  # fmt: skip


def parse_size(text: str) -> tuple[int, int]:
    """A size such as "512x512": HEIGHTxWIDTH -> (height, width)."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected HEIGHTxWIDTH in pixels, e.g. 512x512")
    return int(found[1]), int(found[2])


def add_threads(parser: argparse.ArgumentParser, note: str = "") -> None:
    """Option `--threads`, in the same range as the node's parameter: what is above it ends native code."""
    parser.add_argument(
        "--threads", type=_parse_threads, default=0, metavar="N",
        help=f"CPU threads, up to {MOST_THREADS}, 0 = automatic (default: 0){note}",
    )  # fmt: skip


def add_input_scale(parser: argparse.ArgumentParser, least: str = "above 0") -> None:
    """Option `--input-scale`, whose values begin at `least`."""
    parser.add_argument(
        "--input-scale", type=_parse_scale, default=1.0, metavar="SHARE",
        help=f"share of the sides of the model's input at which images are seen, {least} to 1 (default: 1)",
    )  # fmt: skip


def _parse_scale(text: str) -> float:
    scales = parse_fractions(text)
    if len(scales) != 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one number above 0 and up to 1")
    return scales[0]


def _parse_threads(text: str) -> int:
    if not text.isdecimal() or int(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 0 to {MOST_THREADS}")
    return int(text)


def parse_batch(text: str) -> int | None:
    """A batch size, or None for "dynamic"."""
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive count or dynamic")
    return int(text)


def parse_names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected names separated by commas, each once")
    return names


def refuse_shipped(models: Sequence[str], option: str) -> None:
    """What `option` writes into a model, every command and node would read from then on."""
    shipped = {path.name for path in shipped_models()}
    if named := [model for model in models if model in shipped]:
        raise ConfigError(
            f"{option}: {named[0]} is a shipped model, which every command would read otherwise from then on; copy "
            "its folder, or name it by its path to change it there"
        )


def refuse_other_data(args: argparse.Namespace) -> None:
    """Options of labelled images that contradict each other: one of them would count for nothing.

    Raises:
        ConfigError: `--data` beside `--images` or `--labels`, or `--split` without it.
    """
    if args.data is not None and (args.images is not None or args.labels is not None):
        other = "--labels" if args.images is None else "--images"
        raise ConfigError(f"--data: got {other} as well, expected either --data or --images and --labels")
    if args.data is None and args.split is not None:
        raise ConfigError("--split: got no --data, which is what has splits; leave it out, or pass --data")


def add_merge_options(parser: argparse.ArgumentParser) -> None:
    """`--merge-threshold` and `--token-capacity`: how much of an image is merged."""
    parser.add_argument(
        "--merge-threshold", type=float, default=Settings.merge_threshold,
        help="0..1, 1 merges nothing (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--token-capacity", type=int, default=Settings.token_capacity,
        help="bound on kept tokens, 0 = none (default: %(default)s)",
    )  # fmt: skip


def tell_merges_nothing(args: argparse.Namespace, model: str, merges: bool) -> None:
    """Say on standard error which options change nothing because a model merges no tokens."""
    given = [name for name, default in _MERGE_OPTIONS if getattr(args, name, default) != default]
    if given and not merges:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        print(f"{options}: no effect, {model} merges no tokens", file=sys.stderr)


def add_variants(parser: argparse.ArgumentParser) -> None:
    """Options that run a model's weights with another way to merge or decode."""
    parser.add_argument(
        "--merge", type=parse_names, default=("",),
        help="ways to merge, separated by commas: none, clusters (ClustViT's own), algm, algm+clusters, cts (of a "
        "model that has a policy network), tome, kmeans, stvit (default: the model's)",
    )  # fmt: skip
    parser.add_argument(
        "--decode", type=parse_names, default=("",),
        help="full, or compact: the head runs on kept tokens and representatives alone, or grouped: groups of merged "
        "tokens go through Segmenter's head as one (default: the model's)",
    )  # fmt: skip


def find_variants(args: argparse.Namespace, model: str | Path, folder: Path) -> list[Path]:
    """Model folders for all combinations that `add_variants` took, made in `folder` and named after them.

    Raises:
        ModelError, ConfigError: the model cannot be used, or not in such a way.
    """
    source, models = find_model(model), []
    for merging in args.merge:
        if merging == "none" and not load_config(source).network.merges:
            merging = ""  # which is all that such a model can do
        for decode in args.decode:
            network = {name: value for name, value in (("merging", merging), ("decode", decode)) if value}
            if network:
                _check_variant(load_config(source).network, model_name(source), merging, decode)
            name = "+".join([model_name(source), *network.values()])
            models.append(_variant(source, folder / name, network) if network else source)
    return models


def _variant(source: Path, folder: Path, network: dict[str, Any]) -> Path:
    """A variant whose weights are known to be there, before anything is computed with the first of several."""
    write_variant(source, folder, network)
    try:
        check_folder(folder)
    except ModelError as error:
        check_folder(source)
        raise ConfigError(
            f"--merge: the weights of {model_name(source)} have no part for {network.get('merging')!r}; train one "
            "(config/train/add_merging.yaml), or leave it out"
        ) from error
    return folder


def _check_variant(network: NetworkConfig, name: str, merging: str, decode: str) -> None:
    """Refuse ways that do not exist, or that a model's weights have no part for."""
    for option, value, known in (("merge", merging, MERGINGS), ("decode", decode, DECODINGS)):
        if value and value not in known:
            raise ConfigError(f"--{option}: got {value!r}, expected one of {', '.join(known)}")
    if not isinstance(network, ViTConfig):
        option = "merge" if merging else "decode"
        raise ConfigError(f"--{option}: {name} is of another family than ViT and ClustViT; leave it out")
    if merging == "cts" and network.merge_method != "cts":
        raise ConfigError(
            f"--merge: {name} has no policy network, which cts shares tokens by; import a checkpoint of CTS, or train "
            "one (config/train/add_merging.yaml)"
        )
    if merging == "algm+clusters" and network.merge_method == "clusters" and len(network.points) > 1:
        raise ConfigError(
            f"--merge: algm+clusters has one Clusterer, {name} has {len(network.points)}, for its injection_points "
            f"{list(network.points)}; use clusters or algm"
        )


def write_variant(
    model: str | Path, folder: Path, network: dict[str, Any], input_size: tuple[int, int] | None = None
) -> Path:
    """A model folder with a model's weights and some of its `network` section replaced, e.g. another way to merge.

    Args:
        model: a model folder, or a shipped model's name.
        folder: to make; its name becomes the variant's.
        network: hyper-parameters to replace, as in `model.yaml`.
        input_size: another (height, width) of the input; None keeps the model's.

    Returns:
        `folder`, with a copy of the weights.

    Raises:
        ModelError: no such model.
        ConfigError: `model.yaml` cannot be used, or not with these values.
    """
    source = find_model(model).resolve()
    content = read_yaml(source / MODEL_FILE)
    own = {"merging": content.pop("merging")} if "merging" in content else {}
    content["network"] = {**(content.get("network") or {}), **own, **network}
    content.pop("operating_points", None)  # which are worth something else now
    if input_size is not None:
        content["input"] = {**content["input"], "size": list(input_size)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_FILE).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    shutil.copyfile(weights_path(source), folder / WEIGHTS_FILE)
    load_config(folder)
    return folder


def parse_counts(text: str) -> tuple[int, ...]:
    """Positive whole numbers separated by commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected positive whole numbers separated by commas")
    return tuple(int(part) for part in parts)


def parse_fractions(text: str) -> tuple[float, ...]:
    """Numbers above 0 and up to 1, separated by commas."""
    try:
        fractions = tuple(float(part) for part in text.split(","))
    except ValueError:
        fractions = ()
    if not fractions or not all(0.0 < fraction <= 1.0 for fraction in fractions):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers above 0 and up to 1 separated by commas")
    return fractions


_MOST_OPTION = 1e9
EXIT_TIME_UP = 75
"""Exit code when the time limit ended a run that the same command continues (EX_TEMPFAIL)."""


def make_out(asked: Path) -> None:
    """Make the folder that `--out` names.

    Raises:
        ConfigError: it holds something, or cannot be made.
    """
    if asked.exists() and (not asked.is_dir() or any(asked.iterdir())):
        raise ConfigError(f"--out: {asked} is there and not empty; expected a new or empty folder")
    try:
        asked.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {asked} cannot be made ({error.strerror}); name a folder elsewhere") from error


@contextlib.contextmanager
def new_folder(asked: Path) -> Iterator[None]:
    """`make_out`, before anything is computed for nothing; gone again where that fails before anything is written."""
    was_there = asked.exists()
    make_out(asked)
    try:
        yield
    except BaseException:
        if not was_there and not any(asked.iterdir()):
            asked.rmdir()
        raise


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Options of `train` and `pretrain`."""
    parser.add_argument("--epochs", type=int, help="instead of the recipe's number of epochs")
    parser.add_argument("--batch-size", type=int, help="crops per step, instead of the recipe's")
    parser.add_argument("--learning-rate", type=float, help="peak of AdamW's, instead of the recipe's")
    parser.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16", "float16"),
        help="of the forward pass, instead of the recipe's",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="of everything random, instead of the recipe's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add_threads(parser)
    parser.add_argument(
        "--bad-data", choices=("strict", "skip"), default="strict",
        help="strict stops on files that cannot be used and lists them, skip goes on without them (default: strict)",
    )  # fmt: skip
    parser.add_argument(
        "--time-limit", type=float, default=0.0, metavar="MINUTES",
        help=f"save and stop after so long with exit code {EXIT_TIME_UP}; the same command continues",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="fuse network and losses with torch.compile")
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard logs into the run folder")
    parser.add_argument(
        "--cache-gb", type=float, default=4.0, help="keep images on the device if they fit into this (default: 4)"
    )


def prepare(args: argparse.Namespace) -> None:
    """Process-wide settings that the options ask for.

    Raises:
        ConfigError: an option is out of range.
    """
    for option, value in (("--time-limit", args.time_limit), ("--cache-gb", args.cache_gb)):
        if not 0.0 <= value < _MOST_OPTION:
            raise ConfigError(f"{option}: got {value:g}, expected a number of 0 or above")
    if args.threads > 0:
        torch.set_num_threads(args.threads)
