"""Data sets of a hub: which hub is meant, where its files lie on this machine, and the download before a run.

A name stands for files of the hub client's cache (`swift.data.sources` reads them there), so that only this module and
`swift download` ever touch the network.
"""

from __future__ import annotations

from swift.config.schema import Resolved
from swift.config.sections.model import ModelSection
from swift.data.sources import DatasetSpec, cached_folder, hub_repo, parse_dataset_spec
from swift.hubs.clients import find_hub, wants_hf
from swift.hubs.fetch import fetch

__all__ = ["is_here", "pin_datasets", "with_hub"]


def pin_datasets(resolved: Resolved) -> None:
    """Write into every name of a hub which hub is meant (``HF::``, ``MS::``), and download what is not here.

    Raises:
        HubError: a data set is not here and cannot be fetched.
    """
    data, model = resolved.config.data, resolved.config.model
    data.dataset = [_fetched(text, model) for text in data.dataset]
    data.val_dataset = [_fetched(text, model) for text in data.val_dataset]


def with_hub(text: str, section: ModelSection) -> str:
    """``HF::NAME`` or ``MS::NAME`` for a name on a hub without such a prefix; other texts as they are.

    ``use_hf`` says which; a data set that is known to be on one hub only is meant there.
    """
    spec = parse_dataset_spec(text)
    if spec.is_local or spec.hub is not None:
        return text
    hub = "hf" if wants_hf(section.use_hf) else "ms"
    if spec.entry is not None and spec.entry.hub_id(hub) is None:
        hub = "ms" if hub == "hf" else "hf"
    return f"{hub.upper()}::{text}"


def is_here(spec: DatasetSpec) -> bool:
    """False for a data set of a hub that is not on this machine. Never touches the network."""
    return spec.is_local or cached_folder(spec) is not None


def _fetched(text: str, section: ModelSection) -> str:
    text = with_hub(text, section)
    spec = parse_dataset_spec(text)
    if not is_here(spec):
        fetch(find_hub(spec.hub == "hf", section.hub_token), hub_repo(spec))
    return text
