"""TRL's side of a measurement: ``python trl_sft.py MODEL DATA OUT --steps N``.

The settings are those of ``sft_vs_trl.py``. Writes ``OUT/marks.jsonl`` (see ``trl_side.py``) and the adapter in
``OUT/adapter``.
"""

from __future__ import annotations

from settings import LEARNING_RATE, MAX_LENGTH, SEED
from trl_side import COMMON, lora, read_rows, side_parser, train


def main() -> None:
    parser = side_parser(__doc__)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()

    import torch
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    config = SFTConfig(
        output_dir=str(arguments.out / "trainer"),
        max_steps=arguments.steps,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        max_length=MAX_LENGTH,
        assistant_only_loss=True,
        seed=arguments.seed,
        logging_steps=10,
        **COMMON,
    )
    trainer = SFTTrainer(
        model=arguments.model, args=config, train_dataset=read_rows(arguments), peft_config=lora()
    )
    train(trainer, arguments.out)
    trainer.save_model(str(arguments.out / "adapter"))


if __name__ == "__main__":
    main()
