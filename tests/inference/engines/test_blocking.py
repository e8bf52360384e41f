"""An engine of the protocol driven without a loop gives what the core gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine_models import lively, prompts

from swift.config.sections.generation import GenerationSection
from swift.core.errors import ConfigError
from swift.inference.engines.base import Request, SamplingOptions
from swift.inference.engines.blocking import BlockingEngine
from swift.inference.engines.embedded import EmbeddedEngine
from swift.inference.engines.embedded_core import EmbeddedCore
from swift.inference.generate import Generator
from swift.models.load import ModelBundle

GREEDY = SamplingOptions(max_tokens=12, temperature=0)


def test_answers_streams_and_stop_words_are_the_same(make_bundle: Callable[..., ModelBundle]) -> None:
    # Two models: an engine writes in its own thread, and a cancelled answer may still be in its last step.
    bundle = lively(make_bundle())
    core = EmbeddedCore(bundle)
    engine = BlockingEngine(EmbeddedEngine(lambda: lively(make_bundle())))
    try:
        asked = [Request(str(i), text, GREEDY) for i, text in enumerate(prompts(9, 512))]
        expected = [answer.tokens for answer in core.generate(asked)]
        assert [answer.tokens for answer in engine.generate(asked)] == expected
        assert [token for delta in engine.stream(asked[3]) for token in delta.tokens] == expected[3]
        stream = engine.stream(asked[4])
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        options = GenerationSection(max_new_tokens=24)
        conversation = [{"role": "user", "content": "What is the answer?"}]
        (whole,) = Generator(bundle, core).batch([conversation], options)
        stopping = options.model_copy(update={"stop_words": [whole[5:8]]})
        for writer in (core, engine):
            generator = Generator(bundle, writer)
            assert generator.batch([conversation] * 3, stopping) == [whole[: whole.index(whole[5:8])]] * 3
            assert "".join(generator.stream(conversation, options)) == whole
        with pytest.raises(ConfigError, match="no tokens"):
            engine.generate([Request("x", [])])
    finally:
        engine.close()
