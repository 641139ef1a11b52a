"""Progress bars: lively on a screen, a state now and then in a file."""

from __future__ import annotations

import sys
from typing import Any

#: Seconds between two states of a bar whose output goes to a file, where they stay.
FILE_SECONDS = 30.0


def progress_bar(iterable: Any = None, *, shown: bool, **options: Any) -> Any:
    """A ``tqdm`` bar with these options, invisible unless ``shown``."""
    from tqdm.auto import tqdm

    if not (sys.stderr.isatty() or "ipykernel" in sys.modules):  # a notebook is a screen
        options["mininterval"] = FILE_SECONDS
    return tqdm(iterable, disable=not shown, **options)
