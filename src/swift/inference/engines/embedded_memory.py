"""Memory: for how many tokens' keys and values there is some, and whether it has run out."""

from __future__ import annotations

import psutil
import torch

from swift.config.sections.engine import EngineSection
from swift.core.errors import ConfigError

__all__ = ["cache_tokens", "is_out_of_memory"]


def cache_tokens(
    options: EngineSection, bytes_per_token: int, max_model_len: int, device: torch.device
) -> int:
    """The limit of the cache: what the user says, else what the memory allows, and never more than can be used.

    Args:
        bytes_per_token: keys and values of one token in all layers; 0 where the model keeps something else.

    Raises:
        ConfigError: there is no memory for anything worth while.
    """
    useful = options.max_num_seqs * max_model_len
    if options.max_cache_tokens is not None:
        return min(useful, options.max_cache_tokens)
    if not bytes_per_token:
        return useful
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        room = free - round(total * (1 - options.memory_utilization))
    else:
        room = round(psutil.virtual_memory().available * options.memory_utilization)
    tokens = room // bytes_per_token
    if tokens < min(max_model_len, 64):
        raise ConfigError(
            "there is no memory left for the engine's cache",
            where=f"--memory_utilization {options.memory_utilization}",
            why=f"the keys and values of one token take {bytes_per_token} bytes",
            fix="a larger --memory_utilization, a smaller model, or --quant_method bnb",
        )
    return min(useful, tokens)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
