"""Skip these tests if transformers is missing."""

import importlib.util

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("transformers") is None else []
