"""TRL's side of ``dpo_vs_trl.py``: ``python trl_dpo.py MODEL DATA OUT --steps N``; writes as ``trl_side.py`` says.

``--imports`` only imports what training imports, to tell its memory apart.
"""

from __future__ import annotations

from typing import Any

from settings import MAX_LENGTH, RLHF_LEARNING_RATE, SEED
from trl_side import COMMON, lora, read_rows, side_parser, train


def as_trl(row: dict[str, Any]) -> dict[str, Any]:
    *prompt, answer = row["messages"]
    return {
        "prompt": prompt,
        "chosen": [answer],
        "rejected": [{"role": "assistant", "content": row["rejected_response"]}],
    }


def main() -> None:
    parser = side_parser(__doc__)
    parser.add_argument("--imports", action="store_true")
    arguments = parser.parse_args()

    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(1)
    config = DPOConfig(
        output_dir=str(arguments.out / "trainer"),
        max_steps=arguments.steps,
        learning_rate=RLHF_LEARNING_RATE,
        beta=0.1,
        max_length=MAX_LENGTH,
        seed=SEED,
        logging_steps=1,
        **COMMON,
    )
    if arguments.imports:
        return
    rows = read_rows(arguments)
    trainer = DPOTrainer(
        model=arguments.model,
        args=config,
        train_dataset=rows.map(as_trl, remove_columns=rows.column_names),
        peft_config=lora(),
    )
    train(trainer, arguments.out)


if __name__ == "__main__":
    main()
