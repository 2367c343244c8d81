"""Which inventory a command is about."""

from __future__ import annotations

import os
from pathlib import Path

from labdeploy.errors import InventoryError

FILE_NAME = "inventory.yaml"
ENV_NAME = "LABDEPLOY_INVENTORY"


def find(given: Path | None) -> Path:
    """Find the inventory: as given, else $LABDEPLOY_INVENTORY, else the nearest inventory.yaml upwards."""
    if given:
        return given
    if named := os.environ.get(ENV_NAME):
        return Path(named)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
    raise InventoryError(
        f"no {FILE_NAME} in {here} or above it",
        hint=f"labdeploy -i PATH/{FILE_NAME} ...  # or: labdeploy sandbox up, which writes one",
    )
