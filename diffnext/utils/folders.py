"""Folders of models, here or on the Hub; nothing here needs torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffnext.utils.messages import did_you_mean

__all__ = ["HUB_ARGUMENTS", "find_folder"]

HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "token",
)  # of from_pretrained, for snapshot_download


def find_folder(path_or_id: str | os.PathLike, **hub_kwargs: Any) -> Path:
    """A local folder as it is, or the snapshot of a Hub repository.

    Args:
        path_or_id: Folder or Hub id. The Hub is not asked for ``a/b`` where there is a folder
            ``a``, only its cache is.
        **hub_kwargs: ``cache_dir``, ``revision``, ``token``, ``local_files_only`` and such, for
            ``huggingface_hub.snapshot_download``.

    Raises:
        FileNotFoundError: If there is no such folder, nor such a repository on the Hub, or the
            Hub cannot be reached and has left no copy in its cache.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder.absolute()
    name = str(path_or_id)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"there is no folder {name}, and this is not a Hub id such as BAAI/nova-..."
            f"{did_you_mean(folder)}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if folder.parent.is_dir():
        hub_kwargs["local_files_only"] = True
    try:
        return Path(snapshot_download(name, **hub_kwargs))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        where = "in the Hub's cache" if hub_kwargs.get("local_files_only") else "on the Hub"
        reason = str(error).split("\n")[0]
        raise FileNotFoundError(
            f"there is no folder {name}, nor a model of that name {where}: {reason}"
            f"{did_you_mean(folder)}"
        ) from error
