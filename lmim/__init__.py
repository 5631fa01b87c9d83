"""Latent Masked Image Modeling (ECCV 2024) at scale: https://arxiv.org/abs/2407.15837."""

from lmim.config import load_config
from lmim.eval.features import load_images
from lmim.formats import load_encoder
from lmim.objective import LatentMIM
from lmim.train import train
from lmim.version import __version__
from lmim.vit import VisionTransformer

__all__ = ["LatentMIM", "VisionTransformer", "__version__", "load_config", "load_encoder", "load_images", "train"]
