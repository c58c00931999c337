# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Files of weights as trainings leave them: the weights, and what else the file says about its network.

Nothing in a file is ever executed. It is read with `weights_only=True`; of the other objects that trainings are known
to save beside their weights (MMEngine's message hub, NumPy's numbers, configurations) an empty stand-in takes the
place, and a file that asks for anything else is refused. A checkpoint's own configuration, Python text in the file, is
read as literals.
"""

from __future__ import annotations

import _compat_pickle
import ast
import contextlib
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch._weights_only_unpickler import _get_allowed_globals

from clustvit_ros.classes import ClassSet
from clustvit_ros.config import read_json
from clustvit_ros.download import check_weights_file
from clustvit_ros.errors import ConfigError, ModelError
from clustvit_ros.networks.model_folder import WEIGHTS_FILE, load_config
from clustvit_ros.networks.vit import grid_size_of
from clustvit_ros.paths import MODEL_FILE

# What a training may keep its weights below; averaged ones are last, since MMEngine saves them as `state_dict` and the
# others as `ema_state_dict`. DINO's teacher is what it publishes.
_ENTRIES = (
    "state_dict", "model_state_dict", "model", "model_state", "module", "network", "net", "weights",
    "state_dict_ema", "model_ema", "ema_state_dict", "ema",
    "teacher", "student",
)  # fmt: skip
# What wrappers put in front of a network's own names, repeatedly; a second, averaged copy is marked.
_WRAPPER = re.compile(
    r"(?:(?:module|_orig_mod|model|network|net|segmentor|encoder|vit|(ema|ema_model|model_ema|averaged))\.)*"
)
_ROOT = re.compile(r"(?:backbone\.|decode_head\.|cls_token$|patch_embed)")
_AVERAGED = re.compile(r"ema_(?!model\.)")
# Libraries whose objects stand beside weights, and what refers to their members.
_BESIDE = ("mmengine", "mmcv", "mmseg", "numpy", "omegaconf", "argparse", "pathlib", "datetime", "collections", "torch")
_BESIDE_NAMES = {
    "builtins.getattr", "builtins.slice", "builtins.range", "builtins.object", "copyreg._reconstructor",
    "_codecs.encode",
}  # fmt: skip

# Keys of a configuration file, as the reference cases name them, and ours.
_CONFIG_KEYS = {
    "arch": "backbone", "embed_dims": "embed_dim", "num_layers": "depth", "num_heads": "num_heads",
    "img_size": "image_size", "patch_size": "patch_size", "num_clusters": "num_clusters",
    "injection_point": "injection_point", "cluster_mlp_size": "cluster_mlp_dim", "head_layers": "head_depth",
    "head_heads": "head_heads", "out_indices": "head_blocks",
}  # fmt: skip
_IGNORED_CONFIG_KEYS = {"num_classes", "batch_size", "input_size", "test_cfg", "weights"}
_CLUSTERING_ONLY = {"num_clusters", "injection_point", "cluster_mlp_dim"}


class Checkpoint(NamedTuple):
    """A file of weights.

    Attributes:
        weights: parameter names to tensors; names are as in the file, without what wrappers put in front.
        model: the `model` section of the configuration that the file carries; empty when it carries none.
        grid_size: (h, w) patches of the position embedding, where the file or its model folder says so.
        others: names beside the weights of what is no tensor.
        classes: names and colours that the file carries for its classes.
        classes_note: what is odd about the names that it carries, and what became of it; else empty.
        left_out: names of tensors that are a second copy of the weights, or a wrapper's own.
        entry: where in the file the weights lie, e.g. "state_dict"; empty at its top.
        entries: where else weights lie.
    """

    weights: dict[str, Tensor]
    model: dict[str, Any]
    grid_size: tuple[int, int] | None = None
    others: Sequence[str] = ()
    classes: ClassSet | None = None
    classes_note: str = ""
    left_out: Sequence[str] = ()
    entry: str = ""
    entries: Sequence[str] = ()


def read_checkpoint(path: Path, entry: str | None = None) -> Checkpoint:
    """Read a file of weights without executing anything in it.

    Args:
        path: `.safetensors` file, or what `torch.load` reads with `weights_only=True`; the weights may lie below
            `state_dict`, `model` and the like, beside whatever else a training saved.
        entry: which of several entries to take; None takes the first that is usual.

    Raises:
        ModelError: unreadable, or no weights in it.
        ConfigError: the `model.yaml` beside a model folder's weights cannot be used, or there is no such entry.
    """
    grid_size = None
    if path.is_file():
        try:
            check_weights_file(path)
        except ModelError as error:
            raise ModelError(f"{path}: {error}; fetch or save it again") from error
    elif path.exists():
        raise ModelError(f"{path}: is no regular file; expected a file of weights, .pth or .safetensors")
    try:
        if path.suffix == ".safetensors" or _is_safetensors(path):
            content: Any = load_file(path)
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get("grid_size", "")
            if re.fullmatch(r"\d+x\d+", text):
                height, width = map(int, text.split("x"))
                grid_size = height, width
        else:
            with _stand_ins(path), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old forms of pickles, which are read or told below
                content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: does not exist; expected a file of weights, .pth or .safetensors") from error
    except Exception as error:  # the readers raise whatever a damaged file makes them stumble over
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if not isinstance(error, (OSError, RuntimeError, SafetensorError, ModelError)):
            # PyTorch recommends to load without `weights_only`, which would execute what is in the file.
            reason = "it is damaged or holds other objects"
        raise ModelError(
            f"{path}: cannot be read as weights of plain tensors ({reason}); pass a .safetensors file, or, if it is a "
            "training checkpoint with other objects in it, save its state_dict alone"
        ) from error
    if path.name == WEIGHTS_FILE and (path.parent / MODEL_FILE).is_file():
        network = load_config(path.parent).network
        grid_size = grid_size_of(network.image_size, network.patch_size)
    content = content if isinstance(content, dict) else {}
    meta = content.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    found = _entries(content)
    if entry is not None:
        if entry not in found:
            raise ConfigError(f"{path}: holds no weights below {entry!r}, expected one of {', '.join(found) or 'none'}")
        content = _descend(content[entry])
    else:
        entry, content = (found[0] if found else ""), _descend(content)
    weights, left_out = _unwrapped({k: v for k, v in content.items() if isinstance(v, Tensor) and isinstance(k, str)})
    if not weights:
        raise ModelError(f"{path}: holds no tensors by name; expected a state_dict of tensors")
    for name, tensor in weights.items():
        if (size := tensor.numel() * tensor.element_size()) > path.stat().st_size:
            raise ModelError(
                f"{path}: {name} stands for {size} bytes, more than there are in the file: it repeats one number, or "
                "leaves most out; save it as a plain tensor (contiguous())"
            )
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    text = meta.get("cfg", meta.get("config", ""))
    model = _model_section(text) if isinstance(text, str) else {}
    found = [name for name in found if name != entry]
    return Checkpoint(weights, model, grid_size, others, *_classes(meta), left_out, entry, found)


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as they do, whatever it is called: the length of a JSON text, and that text."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _entries(content: dict[Any, Any]) -> list[str]:
    """Names below which weights lie, in the order of preference."""
    return [name for name in _ENTRIES if isinstance(below := content.get(name), dict) and _has_tensors(below, 3)]


def _has_tensors(content: dict[Any, Any], depth: int) -> bool:
    """Whether tensors lie in it, or below its usual entries, at most so deep: a file may hold itself."""
    if any(isinstance(value, Tensor) for value in content.values()):
        return True
    below = [content[name] for name in _ENTRIES if isinstance(content.get(name), dict)]
    return depth > 0 and any(_has_tensors(part, depth - 1) for part in below)


def _descend(content: dict[Any, Any]) -> dict[Any, Any]:
    """The weights below a checkpoint's usual entries, one below the other."""
    for _ in range(4):
        below = [content[name] for name in _ENTRIES if isinstance(content.get(name), dict)]
        content = next((part for part in below if _has_tensors(part, 3)), below[0] if below else content)
    return content


def _unwrapped(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights by the network's own names, and the names of a second copy of them and of what wrappers add."""
    copies: dict[tuple[bool, str], dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        found = _WRAPPER.match(name)
        wrapper = found[0] if found else ""
        rest = name[len(wrapper) :]
        averaged = found is not None and found[1] is not None
        if _AVERAGED.match(rest):  # OpenMMLab 1.x keeps a copy so, its dots replaced
            wrapper, rest, averaged = f"{wrapper}ema_", rest.removeprefix("ema_"), True
        copies.setdefault((averaged, wrapper), {})[rest] = tensor
    networks = [key for key, copy in copies.items() if any(_ROOT.match(name) for name in copy)]
    if not networks:
        return weights, []
    chosen = min(networks, key=lambda key: (key[0], -len(copies[key])))
    left_out = [key[1] + name for key, copy in copies.items() if key != chosen for name in copy]
    return copies[chosen], left_out


class _StandIn:
    """Takes the place of an object that nobody needs: it takes whatever a file gives it, and keeps none of it."""

    def __new__(cls, *_: Any, **__: Any) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _StandInDict(_StandIn):
    """Becomes a plain dictionary, since PyTorch fills no other."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return {}


@contextlib.contextmanager
def _stand_ins(path: Path) -> Iterator[None]:
    """Let `torch.load(weights_only=True)` put a stand-in wherever a file asks for a known library's object.

    Raises:
        ModelError: the file asks for something that no training saves, or this PyTorch has no stand-ins.
    """
    known = _get_allowed_globals()
    wanted = sorted((module, name) for module, name in _globals(path) if f"{module}.{name}" not in known)
    foreign = [
        f"{module}.{name}"
        for module, name in wanted
        if f"{module}.{name}" not in _BESIDE_NAMES and module.partition(".")[0] not in _BESIDE
    ]
    if foreign:
        raise ModelError(f"it asks for {', '.join(foreign[:5])}, which no weights need and an attack might")
    if not wanted:
        yield
        return
    if not hasattr(torch.serialization, "add_safe_globals"):
        raise ModelError(
            f"it holds {'.'.join(wanted[0])}, which PyTorch {torch.__version__} cannot leave out; import it where "
            "PyTorch is 2.4 or newer, and copy the model folder"
        )
    # PyTorch knows an allowed class by its module and name; 2.4 takes the names of Python 2, in which they are saved.
    names = {*wanted, *(("__builtin__", name) for module, name in wanted if module == "builtins")}
    allowed: list[Any] = [
        type(name, (_StandInDict if name == "defaultdict" else _StandIn,), {"__module__": module})
        for module, name in names
    ]
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals(allowed)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _globals(path: Path) -> set[tuple[str, str]]:
    """(module, name) of everything that the pickles in a file refer to; empty for what is no checkpoint."""
    found = set()
    with contextlib.suppress(zipfile.BadZipFile, ValueError, EOFError), path.open("rb") as file:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                pickles = [archive.open(name) for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        else:
            file.seek(0)
            pickles = [file] * 4  # magic number, version, machine, content, one after the other
        for pickled in pickles:
            for code, argument, _ in pickletools.genops(pickled):
                if code.name == "GLOBAL":
                    module, _, name = str(argument).partition(" ")
                    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
                    found.add((_compat_pickle.IMPORT_MAPPING.get(module, module), name))
    return found


def read_hyperparameters(path: Path) -> dict[str, Any]:
    """A JSON file with what shapes cannot tell, by the names of the network's configuration.

    Raises:
        ConfigError: unreadable, or keys that mean nothing here.
    """
    content = read_json(path)
    unknown = sorted(content.keys() - _CONFIG_KEYS.keys() - _IGNORED_CONFIG_KEYS)
    if unknown:
        raise ConfigError(f"{path}: unknown keys {', '.join(unknown)}; known: {', '.join(_CONFIG_KEYS)}")
    known = {_CONFIG_KEYS[key]: value for key, value in content.items() if key in _CONFIG_KEYS and value is not None}
    if "image_size" in known:
        known["image_size"] = image_size_of(known["image_size"])
    if known.get("backbone") == "vit":
        known = {key: value for key, value in known.items() if key not in _CLUSTERING_ONLY}
    return known


def image_size_of(stated: Any) -> list[int]:
    """Height and width of a configuration's `img_size`, which may be one side of a square, alone or in a list.

    Raises:
        ConfigError: it is something else.
    """
    sides = list(stated) if isinstance(stated, (list, tuple)) else [stated]
    sides = sides * 2 if len(sides) == 1 else sides
    if len(sides) != 2 or any(not isinstance(side, int) or side < 1 for side in sides):
        raise ConfigError(f"img_size: got {stated!r}, expected height and width in pixels, or one side of a square")
    return sides


def _classes(meta: dict[str, Any]) -> tuple[ClassSet | None, str]:
    """Classes of a checkpoint's `meta`, as MMEngine and OpenMMLab 1.x write them, and what was odd in them."""
    about = meta.get("dataset_meta")
    about = {str(k).lower(): v for k, v in {**meta, **(about if isinstance(about, dict) else {})}.items()}
    names, palette = about.get("classes"), about.get("palette")
    palette = palette if isinstance(palette, (list, tuple)) else ()
    if names is None or (isinstance(names, (list, tuple)) and not names):
        return None, ""
    if not isinstance(names, (list, tuple)):
        return None, f"the file's class names are of no use ({type(names).__name__}, expected a list)"
    usable: list[str] = []
    for index, name in enumerate(names):
        text = "".join(filter(str.isprintable, name)).strip() if isinstance(name, str) else ""
        text = text or f"class_{index}"
        usable.append(text if text not in usable else f"{text}_{index}")
    odd = [f"{name!r:.60} is {new!r:.60}" for name, new in zip(names, usable, strict=True) if name != new]
    note = f"class names of the file that cannot be used as they are: {', '.join(odd[:5])}" if odd else ""
    with contextlib.suppress(ConfigError, TypeError):
        return ClassSet(tuple(usable), tuple(tuple(colour) for colour in palette)), note
    with contextlib.suppress(ConfigError):
        return ClassSet(tuple(usable), ClassSet.numbered(len(usable)).colours), note
    return None, f"the file's class names are of no use ({', '.join(usable[:3])}, ...)"


def _model_section(text: str) -> dict[str, Any]:
    """The `model = dict(...)` of a configuration text, literals and dict() calls only; empty when there is none.

    Images' normalisation, which older ones state elsewhere, becomes its `data_preprocessor`.
    """
    try:
        sections = {
            node.targets[0].id: _literal(node.value)
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id in ("model", "data_preprocessor", "img_norm_cfg")
        }  # fmt: skip
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return {}
    model = sections.get("model")
    model = dict(model) if isinstance(model, dict) else {}
    for name in ("data_preprocessor", "img_norm_cfg"):
        if not isinstance(model.get("data_preprocessor"), dict) and isinstance(sections.get(name), dict):
            model["data_preprocessor"] = sections[name]
    return model


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
