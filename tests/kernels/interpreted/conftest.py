"""These run Triton kernels on a CPU, in a process of their own: Triton reads the variable when it loads."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*"]
