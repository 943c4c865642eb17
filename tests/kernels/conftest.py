"""Skip these tests if Triton is missing. It is published for Linux only."""

import importlib.util

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("triton") is None else []
