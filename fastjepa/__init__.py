"""fastjepa: fast V-JEPA pretraining of video encoders.

Importing the package does no work and loads no torch, so that settings are checked before anything heavy starts.
"""

__version__ = "0.1.0"
