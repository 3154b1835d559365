"""From pixels to tokens: a strided convolution whose stride is its kernel."""

from einops import rearrange
from torch import Tensor, nn


def _check_grid(name: str, size: int, patch: int) -> None:
    # The published convolution silently drops what does not fill a patch: a model that sees less than it is given.
    if size % patch:
        raise ValueError(f"{name} must be a multiple of {patch}, got {size}")


class PatchEmbed(nn.Module):
    """Images to tokens: [B, C, H, W] -> [B, h*w, embed_dim], rows before columns.

    Errors: ValueError where H or W is not a multiple of `patch_size`. Source: ViT (arXiv 2010.11929).
    """

    def __init__(self, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, h*w, embed_dim]."""
        _check_grid("image height", x.shape[-2], self.patch_size)
        _check_grid("image width", x.shape[-1], self.patch_size)
        return rearrange(self.proj(x), "b e h w -> b (h w) e")


class PatchEmbed3D(nn.Module):
    """Clips to tokens: [B, C, T, H, W] -> [B, t*h*w, embed_dim], time before rows before columns.

    Errors: ValueError where T is not a multiple of `tubelet_size` or H or W of `patch_size`.
    Source: ViViT tubelets (arXiv 2103.15691), as V-JEPA (arXiv 2404.08471, section 3) uses them.
    """

    def __init__(self, patch_size: int = 16, tubelet_size: int = 2, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.tubelet_size = tubelet_size
        kernel = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=kernel, stride=kernel)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, t*h*w, embed_dim]."""
        _check_grid("clip frames", x.shape[-3], self.tubelet_size)
        _check_grid("clip height", x.shape[-2], self.patch_size)
        _check_grid("clip width", x.shape[-1], self.patch_size)
        return rearrange(self.proj(x), "b e t h w -> b (t h w) e")
