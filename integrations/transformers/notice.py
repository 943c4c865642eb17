"""Print a line for the user who started a run."""

import logging
from typing import Any

try:
    from tqdm.auto import tqdm
except ImportError as error:
    raise ImportError(
        'rlloss.integrations.transformers.notice needs transformers: pip install "rlloss[trl]"'
    ) from error


def say(args: Any, text: str) -> None:
    """Print `text` to stdout in the main process, unless the run's `log_level` is above "warning".

    args: TrainingArguments of transformers. A logger does not fit: INFO is not shown without setup, and WARNING is for
    problems. tqdm prints above a progress bar instead of into it.
    """
    if getattr(args, "process_index", 0) != 0:
        return
    level = getattr(args, "get_process_log_level", None)
    if level is None or level() <= logging.WARNING:
        tqdm.write(text)
