"""DeepSeek-OCR as its authors compute it (deepencoder/clip_sdpa.py and sam_vary_sdpa.py of their repository), on
mlx-vlm's classes. mlx-vlm 0.7 differs from them in the CLIP tower's activation (they: x sigmoid(1.702 x)) and, for the
crops of images over 640 pixels, in how both towers' position tables are resized; and it takes one image a prompt."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

CLIP_NORM_EPS = 1e-5        # of theirs; config.json doesn't say


def bicubic_matrix(source, target):
    """(target, source): torch's bicubic interpolation of one axis, antialias=True, align_corners=False."""
    scale = source / target
    stretch = max(scale, 1.0)
    centers = (np.arange(target)[:, None] + 0.5) * scale
    x = np.abs(np.arange(source)[None] + 0.5 - centers) / stretch
    a = -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return mx.array((weights / weights.sum(1, keepdims=True)).astype(np.float32))


def linear_matrix(source, target):
    """(target, source): torch's linear interpolation of one axis, align_corners=False."""
    places = np.maximum((np.arange(target) + 0.5) * source / target - 0.5, 0)
    low = np.minimum(places.astype(int), source - 1)
    high, part = np.minimum(low + 1, source - 1), places - places.astype(int)
    weights = np.zeros((target, source))
    np.add.at(weights, (np.arange(target), low), 1 - part)
    np.add.at(weights, (np.arange(target), high), part)
    return mx.array(weights.astype(np.float32))


def resized_grid(table, side):
    """A (S, S, D) table of positions as (side, side, D)."""
    matrix = bicubic_matrix(table.shape[0], side)
    return mx.einsum("ys,xt,std->yxd", matrix, matrix, table.astype(mx.float32)).astype(table.dtype)


def as_published(model):
    """Change mlx-vlm's DeepSeek-OCR (in place) into what the docstring above tells. Returns it."""
    for layer in model.vision_model.transformer.layers:
        layer.mlp.activation_fn = nn.GELU(approx="fast")            # x sigmoid(1.702 x)
    embeddings = model.vision_model.embeddings
    embeddings.__class__ = clip_embeddings(type(embeddings))
    for block in model.sam_model.blocks:
        block.attn.__class__ = sam_attention(type(block.attn))
    model.__class__ = several_images(type(model))
    return model


def clip_embeddings(Embeddings):
    """CLIP's embeddings, whose table of positions is resized for a crop's smaller grid."""
    class Resized(Embeddings):
        def _get_abs_pos(self, abs_pos, tgt_size):
            """abs_pos: (1, 1 + S S, D), the class token first; tgt_size: 1 + side side. Returns (1, tgt_size, D)."""
            if abs_pos.shape[1] == tgt_size:
                return abs_pos
            source, side = round((abs_pos.shape[1] - 1) ** 0.5), round((tgt_size - 1) ** 0.5)
            grid = resized_grid(abs_pos[0, 1:].reshape(source, source, -1), side)
            return mx.concatenate([abs_pos[:, :1], grid.reshape(1, side * side, -1)], axis=1)
    return Resized


def sam_attention(Attention):
    """SAM's attention, whose tables of relative positions are resized where the image is smaller than 1024 pixels."""
    class Resized(Attention):
        def __call__(self, x):
            whole = self.rel_pos_h, self.rel_pos_w              # (2 S - 1, head size)
            lengths = [2 * side - 1 for side in x.shape[1:3]]
            if [table.shape[0] for table in whole] == lengths:
                return super().__call__(x)
            self.rel_pos_h, self.rel_pos_w = (
                (linear_matrix(table.shape[0], n) @ table.astype(mx.float32)).astype(table.dtype)
                for table, n in zip(whole, lengths))
            try:
                return super().__call__(x)
            finally:
                self.rel_pos_h, self.rel_pos_w = whole
    return Resized


def several_images(Model):
    """DeepSeek-OCR, whose prompts may hold more than one image: each is embedded by itself."""
    class SeveralImages(Model):
        def get_input_embeddings(self, input_ids=None, pixel_values=None, images_spatial_crop=None,
                                 images_seq_mask=None, spans=(), **rest):
            """pixel_values: [crops of all images (C, 3, H, W), whole images (N, 3, H, W)]; spans: (begin, end) of each
            image's tokens in the row."""
            result = super().get_input_embeddings(input_ids)
            taken, embeddings = 0, result.inputs_embeds                                     # (1, L, D)
            places = mx.arange(input_ids.shape[1])[None]
            for n, (begin, end) in enumerate(spans):
                shape = images_spatial_crop[n].tolist()
                crops = int(shape[0] * shape[1]) if max(shape) > 1 else 0
                mask = (places >= begin) & (places < end)                                   # (1, L)
                pixels = [p.astype(embeddings.dtype) for p in
                          (pixel_values[0][taken:taken + crops], pixel_values[1][n:n + 1])]
                taken += crops
                one = super().get_input_embeddings(input_ids, pixels, images_spatial_crop[n:n + 1], mask)
                embeddings = mx.where(mask[..., None], one.inputs_embeds, embeddings)
            result.inputs_embeds = embeddings
            return result
    return SeveralImages
