"""The classifier of fine-tuning: an encoder that is trained on, its pooled tokens, a norm and a linear head.

Owns `Classifier`, which a backend trains as it trains `LatentMIM`: its encoder is named `online`, so that whatever
reads an encoder out of a run's checkpoints reads a fine-tuned one too. The invariants: what an image gives depends on
no other image but the one it is mixed with, its neighbour; logits and losses are fp32 whatever the autocast.

As in MAE's recipe (arXiv:2111.06377, appendix A), the mean of the patch tokens goes through a new norm in place of the
encoder's last, the class token through the encoder's own; positions are learned; the head starts near zero.

Letters: B images · C classes · K cells · D encoder width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim.config import model_dimensions
from lmim.optim import layer_decay_groups
from lmim.options import FinetuneConfig, ModelConfig
from lmim.patches import normalize_images, tile_patches
from lmim.randomness import fold, purpose
from lmim.vit import VisionTransformer, initial_values

HEAD_STD = 2e-5


class ClassifierOutput(NamedTuple):
    """Scalars of one micro-batch, all on its device; only `loss` carries a gradient."""

    loss: Tensor
    accuracy: Tensor  # share of images of which the class of the larger part comes first


class Classifier(nn.Module):
    """Encoder, pooling, norm and head; `forward` is one micro-batch's loss."""

    output = ClassifierOutput

    def __init__(self, model: ModelConfig, finetune: FinetuneConfig, classes: int):
        super().__init__()
        self.finetune = finetune
        self.online = VisionTransformer(
            grid_size=model.grid_size,
            mlp_ratio=model.mlp_ratio,
            projector_depth=0,
            learnable_positions=True,
            drop_path=model.drop_path,
            dropout=model.dropout,
            norm_eps=finetune.norm_eps,
            **model_dimensions(model),
        )
        self.head = nn.Linear(self.online.embed_dim, classes)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.online.blocks

    def parts(self) -> tuple[nn.Module, ...]:
        """Return what is cut as a root of its own: the whole."""
        return (self,)

    def between_blocks(self) -> list[tuple[nn.Module, tuple[str, ...]]]:
        """Return what else is worth compiling."""
        return [(self.online, ("embed",))]

    def averages(self) -> list[tuple[str, Tensor, Tensor]]:
        """Return no moving averages."""
        return []

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Return AdamW's groups, two a layer, with their shares of the learning rate."""
        return layer_decay_groups(self, weight_decay, self.finetune.layer_decay)

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Tell which layer a name is of, as timm's models do: the new norm of pooled patches goes with the head."""
        last = [] if self.finetune.pooling == "mean" else [(r"^online\.norm", (99999,))]
        return dict(
            stem=r"^online\.(?:cls_token|pos_embed|patch_embed)", blocks=[(r"^online\.blocks\.(\d+)", None), *last]
        )

    def no_weight_decay(self) -> set[str]:
        """Return the names that weight decay spares beyond biases and norms, as timm's models do."""
        return {"online.pos_embed", "online.cls_token"}

    def new_names(self) -> set[str]:
        """Return the names that do not begin with an encoder's weights but anew."""
        return {"head.weight", "head.bias"} | (
            {"online.norm.weight", "online.norm.bias"} if self.finetune.pooling == "mean" else set()
        )

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole value) of every parameter; the encoder's are those of pretraining from scratch."""
        for name, value in initial_values(self.online, seed, "online."):
            yield f"online.{name}", value
        generator = torch.Generator("cpu").manual_seed(fold(0, seed, purpose("head.weight")))
        weight = torch.empty(self.head.weight.shape, device="cpu")
        yield "head.weight", nn.init.trunc_normal_(weight, std=HEAD_STD, generator=generator)
        yield "head.bias", torch.zeros(self.head.bias.shape, device="cpu")

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Set every parameter to its value of `initial_values`."""
        tensors = self.state_dict(keep_vars=True)
        for name, value in self.initial_values(seed):
            tensors[name].copy_(value)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward."""
        self.online.set_grad_checkpointing(enable)

    def logits(self, images_BCSS: Tensor, keys_B: Tensor | None = None) -> Tensor:
        """Return the logits (B, C) in fp32 of uint8 images; in training, drop-path follows from the samples' keys."""
        patches_BKC = tile_patches(normalize_images(images_BCSS), self.online.patch_size)
        cells_BK = torch.arange(patches_BKC.shape[1], device=images_BCSS.device).expand(len(images_BCSS), -1)
        tokens_BTD = self.online(patches_BKC, cells_BK, keys_B, norm=False)
        with torch.autocast(tokens_BTD.device.type, enabled=False):
            tokens_BTD = tokens_BTD.float()
            pooled_BD = tokens_BTD[:, 1:].mean(dim=1) if self.finetune.pooling == "mean" else tokens_BTD[:, 0]
            return self.head(self.online.norm(pooled_BD))

    def forward(self, images_BCSS: Tensor, keys_B: Tensor, labels_B: Tensor, shares_B: Tensor) -> ClassifierOutput:
        """Return the loss of a micro-batch of uint8 images.

        A share is how much of an image is of its own label; the rest is of its neighbour's: 1 is that of 0, 3 of 2 and
        so on. Where the last has none, its share is 1.
        """
        logits_BC = self.logits(images_BCSS, keys_B)
        neighbour_B = torch.arange(len(labels_B), device=labels_B.device).bitwise_xor(1).clamp(max=len(labels_B) - 1)
        others_B = labels_B[neighbour_B]
        own_B, other_B = (
            F.cross_entropy(logits_BC, labels, reduction="none", label_smoothing=self.finetune.label_smoothing)
            for labels in (labels_B, others_B)
        )
        loss = (shares_B * own_B + (1 - shares_B) * other_B).mean()
        larger_B = torch.where(shares_B >= 0.5, labels_B, others_B)
        accuracy = (logits_BC.detach().argmax(dim=1) == larger_B).float().mean()
        return ClassifierOutput(loss, accuracy)
