"""The training fixtures serve the fault tests as well."""

from tests.train.conftest import chat_file, run_training

__all__ = ["chat_file", "run_training"]
