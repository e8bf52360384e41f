"""The OpenAPI description against the application: schemathesis sends what it allows and what it does not."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from scripted import ScriptedEngine

from swift.inference.server.app import create_app
from swift.inference.server.service import Service

CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def test_every_answer_is_one_that_the_description_knows(service: Service, engine: ScriptedEngine) -> None:
    engine.script = lambda request: "ok"
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service))
    bounded = settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    tried: dict[str, int] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        modes = (
            list(schemathesis.GenerationMode) if operation.body else [schemathesis.GenerationMode.POSITIVE]
        )
        for mode in modes:

            @bounded
            @given(case=operation.as_strategy(generation_mode=mode))
            def send(case: schemathesis.Case) -> None:
                answer = case.call_and_validate(checks=CHECKS)
                tried[case.path] = max(tried.get(case.path, 0), int(answer.status_code == 200))

            send()
    assert len(tried) == 13
    assert tried["/v1/completions"] and tried["/v1/models"]  # the examples get through to answers
    assert not engine.open
