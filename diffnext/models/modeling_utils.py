"""Loading rules shared by every network of the package."""

from __future__ import annotations

from typing import Any

# What `from_pretrained(output_loading_info=True)` reports besides a fitting state dict.
_MISFITS = {
    "missing_keys": "missing from the weights",
    "unexpected_keys": "unknown to the model",
    "mismatched_keys": "of another shape",
}


def check_loading_info(name: str, path: Any, info: dict[str, Any]) -> None:
    """Reject weights that do not fit the model they were loaded into.

    Args:
        name: Class name of the model, for the message.
        path: Where the weights came from, for the message.
        info: The loading report of diffusers or transformers.

    Raises:
        RuntimeError: If any key is missing, unexpected or of another shape; lists them all.
    """
    lines = []
    for field, meaning in _MISFITS.items():
        keys = [str(key) for key in info.get(field) or ()]
        if keys:
            lines.append(f"  {len(keys)} {meaning}: {', '.join(sorted(keys))}")
    if lines:
        raise RuntimeError(f"The weights in {path} do not fit {name}:\n" + "\n".join(lines))


class StrictLoadingMixin:
    """Put before diffusers' ``ModelMixin``, refuses weights with missing or unexpected keys."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a model folder; every weight must be present and known.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            **kwargs: As for diffusers' ``ModelMixin.from_pretrained``.

        Raises:
            RuntimeError: If the weights do not fit; the message lists the keys.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        check_loading_info(cls.__name__, pretrained_model_name_or_path, info)
        return (model, info) if wants_info else model
