"""LoRA in the weights for a while: the same results, and a base that is untouched to the last bit."""

import pytest
import torch

from swift.config.sections.tuner import TunerSection
from swift.models.load import load_model
from swift.tuners.apply import apply_tuner
from swift.tuners.merged import MergedWeights


@pytest.fixture
def tuned(tiny_model_dir):
    model = load_model(tiny_model_dir, dtype=torch.float32, device="cpu")
    made = apply_tuner(model, TunerSection(lora_dropout=0.0), seed=1, param_dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in made.named_trainable().items():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)
    return made


def test_results_are_those_of_the_adapter_and_nothing_is_left_behind(tuned):
    ids = torch.arange(12)[None]
    model = tuned.model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        adapted = model(ids).logits
        with tuned.adapter_disabled():
            base = model(ids).logits
        merged = MergedWeights.of(tuned)
        for _ in range(2):
            with merged.applied():
                inside = model(ids).logits
            assert (inside - adapted).abs().max() < 1e-5 < (base - adapted).abs().max()
        assert torch.equal(model(ids).logits, adapted)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_error_inside_puts_the_weights_back(tuned):
    merged = MergedWeights.of(tuned)
    ids = torch.arange(5)[None]
    adapted = tuned.model(ids).logits
    with pytest.raises(RuntimeError), merged.applied():
        raise RuntimeError
    assert torch.equal(tuned.model(ids).logits, adapted)


def test_where_it_would_round_or_leave_something_out_it_is_not_done(tiny_model_dir):
    def of(model, **options):
        return MergedWeights.of(apply_tuner(model, TunerSection(**options), seed=1))

    half = load_model(tiny_model_dir, dtype=torch.bfloat16, device="cpu")
    assert of(half) is None
    full = load_model(tiny_model_dir, dtype=torch.float32, device="cpu")
    assert (
        MergedWeights.of(
            apply_tuner(full, TunerSection(tuner_type="full"), seed=1, param_dtype=torch.float32)
        )
        is None
    )
    saved = load_model(tiny_model_dir, dtype=torch.float32, device="cpu")
    assert of(saved, modules_to_save=["norm"]) is None
