"""The device layer: one backend for each kind, refusals that say why."""

import pytest
import torch

from swift.core.backends.base import KINDS, backend_of
from swift.core.devices import memory_in_use, peak_memory, pick_device, pick_dtype
from swift.core.errors import ConfigError


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_backend(kind):
    backend = backend_of(kind)
    assert backend.kind == kind
    words = {"cuda": "nccl", "npu": "hccl", "xpu": "xccl", "mps": "gloo", "cpu": "gloo"}
    assert backend.communication == words[kind]
    count = backend.count()
    if count:
        described = backend.describe(0)
        assert described["name"] and described["memory_bytes"] > 1 << 28
    else:
        with pytest.raises(ConfigError) as caught:
            pick_device(kind)
        assert caught.value.why == backend.missing()
        assert kind in caught.value.message


def test_the_host():
    device = pick_device("cpu")
    assert pick_dtype("auto", device) == torch.float32
    assert memory_in_use(device) is None
    assert peak_memory(device) > 50 << 20
    with pytest.raises(ConfigError, match="no device 'cuda:99'"):
        pick_device("cuda:99")
