"""Features of videos: a frozen encoder over windows of a file or a collection, in memory or into a file.

```
from fastjepa.features import embed
features = embed("runs/demo-3f9a21", "video.mp4")
features.features, features.start_seconds  # [W, E], [W]
```
"""

from fastjepa.features.embedding import Features, Report, embed, embed_to_file
from fastjepa.features.windows import Hop, Windows

__all__ = ["Features", "Hop", "Report", "Windows", "embed", "embed_to_file"]
