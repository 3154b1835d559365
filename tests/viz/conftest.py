"""What tests of pictures share: the images that were drawn."""

import matplotlib.axes
import pytest


@pytest.fixture
def drawn(monkeypatch):
    """Every image that goes into a figure, in the order of drawing."""
    found = []
    imshow = matplotlib.axes.Axes.imshow

    def watched(axes, image, **options):
        found.append(image)
        return imshow(axes, image, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "imshow", watched)
    return found
