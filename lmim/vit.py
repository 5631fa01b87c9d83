"""The networks: a Vision Transformer that reads any subset of patches, and the decoder.

Owns attention, blocks, positions, the projector and the initialisation. The invariants: parameter names are a public
contract that follows timm, and `initial_values` gives every parameter and buffer from (seed, name) alone, so the
values depend neither on the device nor on how the model is cut over ranks.

Letters: B images · T tokens (class token first) · N cells · K patches given · V visible · P predicted, of the masked ·
D encoder width · E decoder width. Paper: section 3.2; pre-LN blocks as in ViT (arXiv:2010.11929) and MAE
(arXiv:2111.06377).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm import layers as timm_layers
from timm.layers import Mlp, resample_abs_pos_embed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmim.patches import tile_patches
from lmim.randomness import fold, purpose, uniform

NORM_EPS = 1e-6
PROJECTOR_NORM_EPS = 1e-5
CLASS_TOKEN_STD = 0.02
ELEMENT = purpose("element")  # of dropout's draws


def sincos_positions(dim: int, grid_size: int, cut_into: tuple[int, int] | None = None) -> Tensor:
    """Return the fixed position table (1, 1 + N, dim) in fp32: a zero row for the class token, then cell by cell.

    For cell (row r, column c) and ω_k = 10000^(−k/(dim/4)) the row is [sin xω, cos xω, sin yω, cos yω] with
    x = c·G/(G−1), y = r·G/(G−1). The released code spaces cells by G/(G−1), not by 1; kept for its checkpoints' sake.
    Where the same image is cut into another number of (rows, columns), r and c are the fractional cells of the G x G
    grid that the new cells' centres fall on.
    """
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = cut_into or (grid_size, grid_size)
    along_y, along_x = (
        ((torch.arange(cells, dtype=torch.float64) + 0.5) * (grid_size / cells) - 0.5)
        * (grid_size / max(grid_size - 1, 1))
        for cells in (rows, columns)
    )
    y, x = torch.meshgrid(along_y, along_x, indexing="ij")
    parts = [wave(along.flatten()[:, None] * omega) for along in (x, y) for wave in (torch.sin, torch.cos)]
    cells = torch.cat(parts, dim=1).float()
    return torch.cat([torch.zeros(1, dim), cells])[None]


class Noise(NamedTuple):
    """What a branch draws for each sample: a factor for the whole branch, and a key for its single numbers."""

    factor_B: Tensor
    element_key_B: Tensor


class BranchNoise(nn.Module):
    """Drop-path and dropout of one residual branch, drawn from the samples' keys rather than from a random state.

    Drawing stands apart from applying, so that rate and name, which differ from block to block, are not part of what
    `torch.compile` sees of a block: it would compile every block anew.
    """

    def __init__(self, drop_path: float, dropout: float, name: str):
        super().__init__()
        self.drop_path, self.dropout = drop_path, dropout
        self.path_use, self.element_use = purpose(f"drop_path {name}"), purpose(f"dropout {name}")

    def draw(self, keys_B: Tensor | None) -> Noise | None:
        """Return the noise of some samples; None in evaluation and where there is nothing to draw."""
        if not self.training or not (self.drop_path or self.dropout):
            return None
        assert keys_B is not None, "drop-path and dropout draw from the samples' keys: pass them"
        keep_B = uniform(keys_B, self.path_use, 0) >= self.drop_path
        return Noise(keep_B.float() / (1 - self.drop_path), fold(keys_B, self.element_use))

    def forward(self, branch_BTD: Tensor, noise: Noise | None) -> Tensor:
        if noise is None:
            return branch_BTD
        branch_BTD = branch_BTD * noise.factor_B.to(branch_BTD.dtype)[:, None, None]
        if self.dropout:
            _, T, D = branch_BTD.shape
            counter = torch.arange(T * D, device=branch_BTD.device).view(T, D)
            keep_BTD = uniform(noise.element_key_B[:, None, None], ELEMENT, counter) >= self.dropout
            branch_BTD = branch_BTD * keep_BTD.to(branch_BTD.dtype) / (1 - self.dropout)
        return branch_BTD


def attend(q_BHTC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, kernel: str) -> Tensor:
    """Return softmax(q·kᵀ/√C)·v, of any number of heads, "fused" in one kernel or by "plain" products."""
    if kernel == "fused":
        return F.scaled_dot_product_attention(q_BHTC, k_BHSC, v_BHSC)
    weights_BHTS = (q_BHTC * q_BHTC.shape[-1] ** -0.5) @ k_BHSC.transpose(-2, -1)
    return weights_BHTS.softmax(dim=-1) @ v_BHSC


class Attention(timm_layers.Attention):
    """timm's multi-head self-attention (B, T, D), by names and numbers, with a choice of kernel."""

    kernel = "fused"

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v, self.kernel).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-LN block: x += Attn(LN(x)); x += MLP(LN(x)), with timm's attention and MLP."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: float,
        dropout: float,
        name: str,
        norm_eps: float = NORM_EPS,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads=num_heads, qkv_bias=True)
        self.noise1 = BranchNoise(drop_path, dropout, f"{name} attn")
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.noise2 = BranchNoise(drop_path, dropout, f"{name} mlp")

    def forward(self, x_BTD: Tensor, noise1: Noise | None = None, noise2: Noise | None = None) -> Tensor:
        x_BTD = x_BTD + self.noise1(self.attn(self.norm1(x_BTD)), noise1)
        return x_BTD + self.noise2(self.mlp(self.norm2(x_BTD)), noise2)


def run_block(block: nn.Module, recompute: bool, *inputs: Tensor | Noise | None) -> Tensor:
    """Run a block; with `recompute` it keeps only its inputs and runs again in the backward.

    Nothing in a block draws from a random state, so none is kept for the second run.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


class PatchEmbed(nn.Module):
    """Linear map of flat patches (…, P·P·3), numbers ordered as (row, column, channel), to tokens (…, D)."""

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Linear(patch_size**2 * 3, embed_dim)

    def forward(self, patches_BKC: Tensor) -> Tensor:
        return self.proj(patches_BKC)


class Projector(nn.Module):
    """Linear layers without bias, each with LN after it, GELU between: D → H → … → H → D; depth 0: the identity."""

    def __init__(self, dim: int, hidden_dim: int, depth: int):
        super().__init__()
        self.depth = depth
        widths = [dim] + [hidden_dim] * (depth - 1) + [dim]
        for i in range(depth):
            self.add_module(f"linear{i}", nn.Linear(widths[i], widths[i + 1], bias=False))
            self.add_module(f"norm{i}", nn.LayerNorm(widths[i + 1], eps=PROJECTOR_NORM_EPS))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.depth):
            x = self.get_submodule(f"norm{i}")(self.get_submodule(f"linear{i}")(x))
            if i < self.depth - 1:
                x = F.gelu(x)
        return x


def resized_positions(table_1ND: Tensor, grid_size: int, cut_into: tuple[int, int]) -> Tensor:
    """Return the position table (1, 1 + N, D) for images cut into (rows, columns) instead of G x G cells.

    The fixed table is computed anew where the new cells lie; one that was learned is resampled bicubically, by timm.
    """
    dim = table_1ND.shape[-1]
    if dim % 4 == 0 and torch.allclose(table_1ND.cpu().float(), sincos_positions(dim, grid_size), atol=1e-5):
        return sincos_positions(dim, grid_size, cut_into).to(table_1ND)
    return resample_abs_pos_embed(table_1ND, list(cut_into), num_prefix_tokens=1)


def _register_positions(module: nn.Module, dim: int, grid_size: int, learnable: bool) -> None:
    """Give a module its `pos_embed` (1, 1 + N, dim): a parameter if learnable, else a buffer that is saved."""
    table = torch.empty(1, 1 + grid_size**2, dim)
    if learnable:
        module.pos_embed = nn.Parameter(table)
    else:
        module.register_buffer("pos_embed", table)


class VisionTransformer(nn.Module):
    """The encoder. In pretraining it reads some patches and their cells; `forward_features` reads whole images.

    `forward` returns tokens after the last norm and the projector (B, 1 + K, D), the class token first.
    """

    def __init__(
        self,
        *,
        grid_size: int = 14,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        projector_dim: int = 4096,
        projector_depth: int = 3,
        learnable_positions: bool = False,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        norm_eps: float = NORM_EPS,
    ):
        super().__init__()
        self.grid_size, self.patch_size, self.embed_dim, self.mlp_ratio = grid_size, patch_size, embed_dim, mlp_ratio
        self.recompute = False
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        _register_positions(self, embed_dim, grid_size, learnable_positions)
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()  # grows with depth, as in DeiT and MAE
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, rate, dropout, f"encoder {i}", norm_eps)
            for i, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.projector = Projector(embed_dim, projector_dim, projector_depth)

    def embed(self, patches_BKC: Tensor, cells_BK: Tensor) -> Tensor:
        """Return the tokens (B, 1 + K, D) that enter the first block: positions added, class token in front."""
        x_BKD = self.patch_embed(patches_BKC) + F.embedding(cells_BK, self.pos_embed[0, 1:])
        class_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(len(x_BKD), -1, -1)
        return torch.cat([class_B1D.to(x_BKD.dtype), x_BKD], dim=1)

    def forward(
        self, patches_BKC: Tensor, cells_BK: Tensor, keys_B: Tensor | None = None, *, norm: bool = True
    ) -> Tensor:
        """Return the tokens (B, 1 + K, D); without `norm`, as they leave the last block."""
        x_BTD = self.embed(patches_BKC, cells_BK)
        for block in self.blocks:
            x_BTD = run_block(block, self.recompute, x_BTD, block.noise1.draw(keys_B), block.noise2.draw(keys_B))
        return self.projector(self.norm(x_BTD)) if norm else x_BTD

    def forward_intermediates(
        self, images_BCHW: Tensor, indices: int | list[int] | None = None, *, norm: bool = False
    ) -> list[Tensor]:
        """Return the tokens (B, 1 + N, D) after the chosen blocks (as in timm: the last n, or their numbers).

        `images_BCHW` is normalised and has sides that are multiples of the patch side; a grid other than the training
        grid gets `resized_positions`. The projector is left out.
        """
        depth = len(self.blocks)
        if indices is None:
            indices = depth
        chosen = (
            list(range(depth - indices, depth)) if isinstance(indices, int) else [i + depth * (i < 0) for i in indices]
        )
        if not chosen or not all(0 <= i < depth for i in chosen):
            raise ValueError(f"indices ({indices}) must name blocks of {depth}")
        rows, cols = images_BCHW.shape[2] // self.patch_size, images_BCHW.shape[3] // self.patch_size
        positions = self.pos_embed
        if (rows, cols) != (self.grid_size, self.grid_size):
            positions = resized_positions(positions, self.grid_size, (rows, cols))
        x_BND = self.patch_embed(tile_patches(images_BCHW, self.patch_size)) + positions[:, 1:]
        x_BTD = torch.cat([(self.cls_token + positions[:, :1]).expand(x_BND.shape[0], -1, -1), x_BND], dim=1)
        outputs = {}
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD)
            if i in chosen:
                outputs[i] = self.norm(x_BTD) if norm else x_BTD
        return [outputs[i] for i in chosen]

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        """Return the tokens (B, 1 + N, D) after the last norm, the class token first, as timm's models do."""
        return self.forward_intermediates(images_BCHW, 1, norm=True)[0]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward, which runs them again."""
        self.recompute = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names that weight decay spares beyond biases and norms, as timm's optimizers ask."""
        return {"pos_embed", "patch_embed.proj.weight"}

    def init_weights(self, seed: int = 0) -> None:
        """Set every parameter and buffer from the seed and its name."""
        init_parameters(self, seed)


class CrossAttention(nn.Module):
    """Multi-head attention of queries (B, T, E) over a context (B, S, E), with biases."""

    kernel = "fused"

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.kv_proj = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries_BTE: Tensor, context_BSE: Tensor) -> Tensor:
        q = self.q_proj(queries_BTE).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        kv = self.kv_proj(context_BSE).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, kv[0], kv[1], self.kernel).transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """q += SelfAttn(LN(q)); q += CrossAttn(LN(q), LN′(x)); q += MLP(LN(q)). The context x stays as it is."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.self_attn = Attention(dim, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm_context = nn.LayerNorm(dim, eps=NORM_EPS)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm3 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, queries_BTE: Tensor, context_BSE: Tensor) -> Tensor:
        q = queries_BTE + self.self_attn(self.norm1(queries_BTE))
        q = q + self.cross_attn(self.norm2(q), self.norm_context(context_BSE))
        return q + self.mlp(self.norm3(q))


class Decoder(nn.Module):
    """Predicts the latents of the masked cells from the encoder's tokens of the visible ones.

    Mask tokens are one learned vector plus, as visual cues, the softmax(PE(q)·PE(j)ᵀ/√E)-weighted sum of the visible
    tokens j, so that every query starts from what lies near it (paper, section 3.2). With `attention="self"` blocks are
    an encoder's, in which mask tokens and visible ones attend to each other (MAE): what the paper compares with.
    """

    kernel = "fused"

    def __init__(
        self,
        *,
        grid_size: int,
        encoder_dim: int,
        embed_dim: int = 512,
        depth: int = 3,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        attention: str = "cross",
        visual_cues: bool = True,
        learnable_positions: bool = False,
    ):
        super().__init__()
        self.attention, self.visual_cues = attention, visual_cues
        self.embed = nn.Linear(encoder_dim, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        _register_positions(self, embed_dim, grid_size, learnable_positions)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, 0.0, 0.0, f"decoder {i}")
            if attention == "self"
            else DecoderBlock(embed_dim, num_heads, mlp_ratio)
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.head = nn.Linear(embed_dim, encoder_dim)
        self.grid_size, self.recompute = grid_size, False

    def forward(self, encoded_BTD: Tensor, visible_BV: Tensor, decoded_BP: Tensor) -> Tensor:
        """Map encoder tokens (B, 1 + V, D) to predictions (B, 1 + P, D), the decoder's class token first."""
        q_BTE, x_BTE = self.enter(encoded_BTD, visible_BV, decoded_BP)
        if self.attention == "self":
            all_BTE = torch.cat([q_BTE, x_BTE], dim=1)
            for block in self.blocks:
                all_BTE = run_block(block, self.recompute, all_BTE)
            return self.leave(all_BTE[:, : q_BTE.shape[1]])
        for block in self.blocks:
            q_BTE = run_block(block, self.recompute, q_BTE, x_BTE)
        return self.leave(q_BTE)

    def enter(self, encoded_BTD: Tensor, visible_BV: Tensor, decoded_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries (B, 1 + P, E) that enter the first block, and their context (B, 1 + V, E)."""
        x_BTE = self.embed(encoded_BTD)
        class_11E, cells_NE = self.pos_embed[:, :1], self.pos_embed[0, 1:]
        visible_pos_BVE, decoded_pos_BPE = F.embedding(visible_BV, cells_NE), F.embedding(decoded_BP, cells_NE)
        queries_BPE = self.mask_token.expand(*decoded_pos_BPE.shape)
        if self.visual_cues:
            # attention with positions as queries and keys has exactly the scale 1/√E
            queries_BPE = queries_BPE + attend(decoded_pos_BPE, visible_pos_BVE, x_BTE[:, 1:], self.kernel)
        B = len(x_BTE)
        class_B1E = (self.cls_token + class_11E).expand(B, -1, -1)
        q_BTE = torch.cat([class_B1E, queries_BPE + decoded_pos_BPE], dim=1)
        return q_BTE, x_BTE + torch.cat([class_11E.expand(B, -1, -1), visible_pos_BVE], dim=1)

    def leave(self, queries_BTE: Tensor) -> Tensor:
        """Return the predictions (B, 1 + P, D) that follow from the last block's queries."""
        return self.head(self.norm(queries_BTE))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward, which runs them again."""
        self.recompute = enable

    def init_weights(self, seed: int = 0) -> None:
        """Set every parameter and buffer from the seed and its name."""
        init_parameters(self, seed)


def initial_values(root: nn.Module, seed: int, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole value) of every parameter and buffer, fp32 on the CPU, one tensor at a time.

    Linear: Xavier-uniform with zero bias; LN: 1/0; class tokens: normal(0, 0.02); mask token: zero; positions: the
    fixed table. Each random tensor is drawn by a generator of its own, seeded from (seed, prefix + name); so `root` may
    lie on `meta` or be cut over ranks, and nobody needs to hold it whole.
    """
    for path, module in root.named_modules():
        for name, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            generator = torch.Generator("cpu").manual_seed(fold(0, seed, purpose(f"{prefix}{path}.{name}")))
            value = torch.zeros(tensor.shape, dtype=torch.float32, device="cpu")
            if name == "weight" and isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(value, generator=generator)
            elif name == "weight" and isinstance(module, nn.LayerNorm):
                value.fill_(1.0)
            elif name == "cls_token":
                value.normal_(0, CLASS_TOKEN_STD, generator=generator)
            elif name == "pos_embed":
                value.copy_(sincos_positions(value.shape[-1], module.grid_size))
            else:
                assert name in ("bias", "mask_token"), f"{path}.{name} has no initial value"
            yield f"{path}.{name}" if path else name, value


@torch.no_grad()
def init_parameters(root: nn.Module, seed: int, prefix: str = "") -> None:
    """Set every parameter and buffer to its value of `initial_values`."""
    tensors = dict(chain(root.named_parameters(), root.named_buffers()))
    for name, value in initial_values(root, seed, prefix):
        tensors[name].copy_(value)
