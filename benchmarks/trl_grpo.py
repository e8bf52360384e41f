"""TRL's side of ``grpo_vs_trl.py``: ``python trl_grpo.py MODEL DATA OUT --steps N``; writes as ``trl_side.py`` says."""

from __future__ import annotations

from grpo_reward import vowels
from settings import RLHF_LEARNING_RATE, SEED
from trl_side import COMMON, lora, read_rows, side_parser, train


def main() -> None:
    arguments = side_parser(__doc__).parse_args()

    import torch
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    config = GRPOConfig(
        output_dir=str(arguments.out / "trainer"),
        max_steps=arguments.steps,
        num_generations=8,
        max_completion_length=48,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=RLHF_LEARNING_RATE,
        seed=SEED,
        logging_steps=1,
        **COMMON,
    )
    rows = read_rows(arguments)
    trainer = GRPOTrainer(
        model=arguments.model,
        args=config,
        train_dataset=rows.map(lambda row: {"prompt": row["messages"]}, remove_columns=rows.column_names),
        reward_funcs=vowels,
        peft_config=lora(),
    )
    train(trainer, arguments.out)


if __name__ == "__main__":
    main()
