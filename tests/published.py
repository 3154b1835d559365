"""Settings of the published recipes on one GPU, and the mean tokens a clip that their masks were counted to keep."""

from dataclasses import replace

import torch

from fastjepa.build import build_jepa, build_masks
from fastjepa.config import Data, Mask, Model, Optim, Runtime, Settings
from fastjepa.costs import SetTokens, StepShape
from fastjepa.plan import make_plan

# (context, target, context squared, sequence squared, target x sequence) of both sets: means over more than 1,000
# batches of the published collator, which cuts a batch to its shortest clip.
SETS_224 = (SetTokens(365.2, 749.3, 137304, 1248347, 838338), SetTokens(99.9, 1102.9, 11597, 1449035, 1328017))
SETS_384 = (
    SetTokens(1289.9, 2306.7, 1700442, 13002414, 8333200),
    SetTokens(426.2, 3321.3, 211166, 14083897, 12459492),
)
# Of the second generation: 256 px, batches of 24. Squares from the counted work of its attention.
SETS_256 = (SetTokens(493, 973, 249800, 2152000, 1426900), SetTokens(128, 1440, 18000, 2458600, 2257900))
# name, crop, clips, tokens of the sets, tokens that any set predicts
RECIPES = {
    "L": ("vit_large", 224, 24, SETS_224, 1197.3),
    "H": ("vit_huge", 224, 24, SETS_224, 1197.3),
    "H384": ("vit_huge", 384, 10, SETS_384, 3599.8),
    "V2L": ("vit_large", 256, 24, SETS_256, 1557),
    "V2g": ("vit_giant_xformers", 256, 24, SETS_256, 1557),
}


def settings(recipe: str, parts: int = 1, dtype: str = "bfloat16", **runtime: str) -> Settings:
    name, crop, clips, *_ = RECIPES[recipe]
    second = recipe.startswith("V2")
    return Settings(
        model=Model(name=name, positions="rope_v2", predictor_heads=12) if second else Model(name=name),
        mask=Mask(group=clips),
        data=Data(crop=crop, batch_size=clips),
        optim=Optim(global_batch=clips * parts, dtype=dtype, clip_grad=None if second else 10.0),
        runtime=Runtime(**runtime),
    )


def published_shape(recipe: str, parts: int = 1, dtype: str = "bfloat16", **runtime: str) -> StepShape:
    """The step of a recipe, with the counted tokens in the place of those that a few draws give."""
    s = settings(recipe, parts, dtype, **runtime)
    with torch.device("meta"):
        jepa = build_jepa(s)
    shape = make_plan(s, jepa, build_masks(s), 1e12).shape
    return replace(shape, sets=RECIPES[recipe][3], union=RECIPES[recipe][4])
