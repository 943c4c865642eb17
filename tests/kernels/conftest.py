"""Not collected where Triton is missing: it is published for Linux only."""

import importlib.util

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("triton") is None else []
