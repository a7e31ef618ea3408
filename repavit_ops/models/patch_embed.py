"""Images to patch tokens."""

from __future__ import annotations

from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """One strided convolution: [B, in_chans, H, W] → [B, dim, H / patch, W / patch].

    Args:
        patch_size: pixels of a patch's side.
        in_chans: channels of the image.
        dim: C. bias: whether the convolution has a bias.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        check_divisible(x, self.patch_size)
        return self.proj(x)


def check_divisible(x: Tensor, patch_size: int) -> None:
    """Raise ValueError, naming the sizes, unless x is [B, in_chans, H, W] with H and W divisible by ``patch_size``."""
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted images [B, in_chans, H, W]")
    height, width = x.shape[-2:]
    if height % patch_size or width % patch_size:
        up = tuple(size + -size % patch_size for size in (height, width))
        raise ValueError(
            f"x: got images of {height}x{width}, wanted a height and a width divisible by the patch size {patch_size}; "
            f"resize or pad them, e.g. to {up[0]}x{up[1]}"
        )


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) from one number or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def image_of(model: nn.Module) -> tuple[tuple[int, int], int]:
    """(height, width) in pixels that a model was built for, 224 where it does not say; and its image channels."""
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    grid, patch = getattr(model, "grid_size", None), getattr(model, "patch_size", None)
    if grid is not None and isinstance(patch, int):
        return (grid[0] * patch, grid[1] * patch), channels
    embedding = getattr(model, "patch_embed", None)  # timm's models say it there
    size = getattr(model, "img_size", None) or getattr(embedding, "img_size", None) or 224
    return ((size, size) if isinstance(size, int) else (size[0], size[1])), channels
