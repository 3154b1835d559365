"""Pictures of a run: what the masks hide, what the features tell apart, how the figures went, and one page of it all.

A file for each kind. They take tensors and rows, and know nothing of encoders, videos or runs: `fastjepa.pictures`
brings these together.
"""

from fastjepa.viz.animation import animation
from fastjepa.viz.clips import clip_picture
from fastjepa.viz.curves import curve_picture, curve_svgs, loss_curve
from fastjepa.viz.masks import mask_picture
from fastjepa.viz.page import Section, Shown, write_page
from fastjepa.viz.pca import Components, content, fit, pca_picture
from fastjepa.viz.record import Record, read_record
from fastjepa.viz.similarity import most_salient, similarities, similarity_picture

__all__ = [
    "Components",
    "Record",
    "Section",
    "Shown",
    "animation",
    "clip_picture",
    "content",
    "curve_picture",
    "curve_svgs",
    "fit",
    "loss_curve",
    "mask_picture",
    "most_salient",
    "pca_picture",
    "read_record",
    "similarities",
    "similarity_picture",
    "write_page",
]
