# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Self-supervised pre-training by masked auto-encoding, for images without labels.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377. The encoder sees a quarter of the
patches, a small decoder that is thrown away afterwards paints the rest, and the loss is the squared error of the masked
patches, each normalised by its own mean and deviation. Different from the paper: masked patches are blanked in the
image as well, since the convolutions of a conv stem would otherwise see into them; and the decoder's positions are
learned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from clustvit_ros.classes import IGNORE_INDEX, Sample
from clustvit_ros.config import to_mapping
from clustvit_ros.errors import ConfigError
from clustvit_ros.images import read_image
from clustvit_ros.networks.architectures import build_network
from clustvit_ros.networks.vit import BACKBONE_NORM_EPS, Block, VisionTransformer, grid_size_of
from clustvit_ros.training.crops import DEFAULT_CACHE_BYTES, Batch, Crops, Place
from clustvit_ros.training.distributed import Processes
from clustvit_ros.training.initialisation import ENCODER_FILE, save_encoder
from clustvit_ros.training.loop import Losses, RunOptions, TrainingLoop
from clustvit_ros.training.recipe import Pretraining, Recipe
from clustvit_ros.training.run_folder import hash_names, writing

_HEAD_DIM = 32


class MaskedAutoencoder(nn.Module):
    """A ViT encoder with a small decoder that paints what the encoder did not see.

    Args:
        encoder: trained in place.
        grid_size: (h, w) patches of the images.
        mask_ratio: share of patches that are masked.
        decoder_dim, decoder_depth: width and blocks of the decoder.
    """

    def __init__(
        self, encoder: VisionTransformer, grid_size: tuple[int, int], mask_ratio: float, decoder_dim: int,
        decoder_depth: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder = encoder
        self.grid_size = grid_size
        self.num_tokens = grid_size[0] * grid_size[1]
        self.num_kept = max(round(self.num_tokens * (1.0 - mask_ratio)), 1)
        patch_values = 3 * encoder.patch_size**2
        self.embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_tokens, decoder_dim))
        self.blocks = nn.ModuleList(
            Block(decoder_dim, decoder_dim // _HEAD_DIM, 4.0, BACKBONE_NORM_EPS) for _ in range(decoder_depth)
        )
        self.norm = nn.LayerNorm(decoder_dim, eps=BACKBONE_NORM_EPS)
        self.paint = nn.Linear(decoder_dim, patch_values)
        for module in (self.embed, self.paint):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        for embedding in (self.mask_token, self.pos_embed):
            nn.init.trunc_normal_(embedding, std=0.02)

    def forward(self, images: Tensor, order: Tensor) -> Losses:
        """Reconstruction loss.

        Args:
            images: (B, 3, H, W) float, normalised, whole patches.
            order: (B, N) a permutation of each image's patches; the first are kept, the rest masked.
        """
        kept = order[:, : self.num_kept]
        masked = torch.ones(order.shape, device=order.device).scatter(1, kept, 0.0)  # B N, 1 = masked
        decoded = self._decode(self._encode(images, kept, masked), order)
        targets = _patches(images, self.encoder.patch_size)
        deviation, mean = torch.std_mean(targets, dim=2, keepdim=True)
        errors = (decoded.float() - (targets - mean) / (deviation + 1e-3)) ** 2
        return Losses({"reconstruction_loss": (errors.mean(dim=2) * masked).sum() / masked.sum()}, {})

    def _encode(self, images: Tensor, kept: Tensor, masked: Tensor) -> Tensor:
        patch_size = self.encoder.patch_size
        cover = masked.unflatten(1, self.grid_size)[:, None]
        cover = cover.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)
        x = self.encoder.patch_embed(images * (1.0 - cover)).flatten(2).transpose(1, 2)
        positions = self.encoder.resized_pos_embed(self.grid_size)
        x = _gather(x + positions[:, 1:], kept)
        cls = (self.encoder.cls_token + positions[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls, x], dim=1)
        for block in self.encoder.blocks:
            x = block(x)
        return self.encoder.norm(x)

    def _decode(self, encoded: Tensor, order: Tensor) -> Tensor:
        x = self.embed(encoded)
        missing = self.mask_token.to(x.dtype).expand(x.shape[0], self.num_tokens - self.num_kept, -1)
        patches = _gather(torch.cat([x[:, 1:], missing], dim=1), order.argsort(dim=1))  # back to image order
        x = torch.cat([x[:, :1], patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.paint(self.norm(x)[:, 1:])


class Pretrainer(TrainingLoop[MaskedAutoencoder]):
    """Pre-trains the encoder of a recipe's network on unlabelled images.

    Args:
        recipe: its network, input, augmentation and `pretraining` count; with any classes.
        images: files; their labels, if any, are not read.
        run_dir: checkpoint, log and `encoder.safetensors` go here; an existing checkpoint is continued.
        device, processes, options, cache_bytes: as for `Trainer`.

    Raises:
        ConfigError: the recipe has no `pretraining`, or its crop is not whole patches.
        DataError: the checkpoint in `run_dir` was made with another recipe or other images.
    """

    def __init__(
        self, recipe: Recipe, images: list[Path], run_dir: Path, device: torch.device,
        processes: Processes = Processes(), options: RunOptions = RunOptions(), cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:  # fmt: skip
        self.pretraining = _section(recipe)
        network_settings = recipe.model_config().network
        patch_size = network_settings.patch_size
        crop_size = self.pretraining.crop_size if max(self.pretraining.crop_size) else recipe.augmentation.crop_size
        if crop_size[0] % patch_size or crop_size[1] % patch_size:
            raise ConfigError(
                f"pretraining: crop_size is {list(crop_size)}, expected multiples of the patch size {patch_size}"
            )
        torch.manual_seed(self.pretraining.seed)
        self.segmenter = build_network(network_settings, max(len(recipe.classes), 2))
        encoder = self.segmenter.backbone
        if not isinstance(encoder, VisionTransformer):
            raise ConfigError(
                f"pretraining: {recipe.architecture} is no ViT; masked auto-encoding needs an encoder of patches alone"
            )
        autoencoder = MaskedAutoencoder(
            encoder, grid_size_of(crop_size, patch_size), self.pretraining.mask_ratio, self.pretraining.decoder_dim,
            self.pretraining.decoder_depth,
        )  # fmt: skip
        for name, parameter in self.segmenter.backbone.named_parameters():
            # They do not take part here, and would only be decayed.
            parameter.requires_grad_(not name.startswith(("clusterer.", "regenerator.")))

        def read(index: int) -> Sample:
            image = read_image(images[index])
            return Sample(image, np.full(image.shape[:2], IGNORE_INDEX, np.uint8), images[index].stem)

        augmentation = dataclasses.replace(recipe.augmentation, crop_size=crop_size)
        self.crops = Crops(
            read, len(images), augmentation, recipe.input.size, self.pretraining.seed, device, cache_bytes
        )
        fingerprint = {
            "name": f"{recipe.name} (pre-training)", "architecture": recipe.architecture, "network": recipe.network,
            "input": to_mapping(recipe.input), "augmentation": to_mapping(augmentation),
            "pretraining": to_mapping(self.pretraining), "images": hash_names(images),
        }  # fmt: skip
        super().__init__(
            autoencoder, self.pretraining, len(images), fingerprint, run_dir, device, processes, options
        )  # fmt: skip
        self._mean, self._std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (recipe.input.mean, recipe.input.std)
        )

    def pretrain(self) -> Path:
        """Train to the end; the averaged encoder's file.

        Raises:
            TimeUp: the time limit was reached first; the same call continues.
            DataError: a loss was not finite, or something could not be written.
        """

        def end_of_epoch(epoch: int, record: dict[str, Any]) -> None:
            if epoch % self.pretraining.save_every == 0 or epoch == self.pretraining.epochs:
                self._save_encoder()
                tqdm.write(f"epoch {epoch}/{self.pretraining.epochs}: loss {record['loss']:.4f}")

        self.run(end_of_epoch)
        if self.processes.is_main and not (self.run_dir / ENCODER_FILE).exists():
            self._save_encoder()
        return self.run_dir / ENCODER_FILE

    def _save_encoder(self) -> None:
        with writing(self.run_dir / ENCODER_FILE):
            save_encoder(self.run_dir / ENCODER_FILE, self.averaged.encoder)

    def _step_module(self) -> nn.Module:
        return self.network

    def _batches(self, epoch: int, batches: list[list[Place]]) -> Iterator[Batch]:
        return self.crops.batches(epoch, [self.processes.share(batch) for batch in batches])

    def _inputs(self, step: int, batch: Batch) -> tuple[Any, ...]:
        images = (batch.images - self._mean) / self._std
        order = torch.rand(images.shape[0], self.network.num_tokens, device=images.device).argsort(dim=1)
        return images, order


def _section(recipe: Recipe) -> Pretraining:
    if recipe.pretraining is None:
        raise ConfigError(f"recipe {recipe.name}: pretraining is missing, expected at least pretraining: {{epochs: N}}")
    return recipe.pretraining


def _patches(images: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, W) -> (B, N, 3 * p * p), row-major over the grid."""
    return F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
