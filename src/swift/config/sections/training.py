"""The optimization itself."""

from __future__ import annotations

from typing import Literal

from swift.config.option import Section, option


class TrainingSection(Section):
    """Steps, batch, learning rate, regularisation, speed."""

    num_train_epochs: float = option(3.0, "Passes over the data.", essential=True, gt=0)
    max_steps: int = option(
        -1, "Optimizer steps; -1: as many as the epochs need.", unit="steps", essential=True, ge=-1
    )
    per_device_train_batch_size: int = option(
        1, "Samples (with packing: rows) per device and micro-batch.", essential=True, ge=1
    )
    gradient_accumulation_steps: int | None = option(
        None,
        "Micro-batches per optimizer step; default: so many that a step sees 16 samples.",
        essential=True,
        ge=1,
    )
    global_batch_size: int | None = option(
        None,
        "Samples (with packing: rows) per optimizer step, over all devices; sets gradient_accumulation_steps.",
        ge=1,
    )
    learning_rate: float | None = option(
        None, "Peak learning rate; default 1e-4 for LoRA, 1e-5 for full training.", essential=True, gt=0
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant", "wsd"] = option(
        "cosine", "Learning rate after warm-up: cosine, linear, constant, or warm-up-stable-decay."
    )
    warmup_ratio: float = option(
        0.0, "Share of the steps in which the learning rate rises.", ge=0, le=1, essential=True
    )
    warmup_steps: int | None = option(None, "Warm-up in steps; replaces warmup_ratio.", unit="steps", ge=0)
    lr_decay_ratio: float = option(
        0.1, "wsd: share of the steps, at the end, in which the rate falls.", gt=0, le=1
    )
    min_lr_ratio: float = option(0.0, "Learning rate at the end, as a share of the peak.", ge=0, le=1)
    min_lr: float | None = option(None, "The same as a rate; min_lr_ratio follows from it.", ge=0)
    weight_decay: float = option(
        0.1, "AdamW weight decay (matrices and embeddings; not biases and norms).", ge=0
    )
    adam_beta1: float = option(0.9, "AdamW beta1.", ge=0, lt=1)
    adam_beta2: float = option(0.95, "AdamW beta2.", ge=0, lt=1)
    adam_epsilon: float = option(1e-8, "AdamW epsilon.", gt=0)
    max_grad_norm: float = option(1.0, "Clip the gradient to this norm; 0: never.", ge=0)
    seed: int = option(
        42, "Seed of initialisation, dropout and (unless data_seed is set) data order.", essential=True
    )
    gradient_checkpointing: bool | None = option(
        None, "Recompute activations in the backward pass; default: on accelerators only."
    )
    recompute_num_layers: int | None = option(
        None, "Recompute only the first layers, so many; default: all.", ge=1
    )
    activation_cpu_offload: bool = option(
        False, "Keep activations in host memory until the backward pass (accelerators only; slower)."
    )
    neftune_noise_alpha: float = option(
        0.0, "Noise on input embeddings (NEFTune, arXiv 2310.05914); 0: none.", ge=0
    )
    enable_dft_loss: bool = option(
        False, "Weigh each token's loss by its probability (dynamic fine-tuning, arXiv 2508.05629)."
    )
    enable_channel_loss: bool = option(
        False, "Also report the loss of each group of rows, by their column channel."
    )
    torch_compile: bool = option(False, "Compile the model with torch.compile.")
    use_liger_kernel: bool = option(False, "Fused Triton kernels of liger-kernel (CUDA only).")
    logits_chunk_size: int = option(
        1024, "Label positions whose logits exist at the same time; bounds memory.", unit="tokens", ge=1
    )
    num_threads: int | None = option(
        None, "CPU threads of torch; default: OMP_NUM_THREADS, else the cores.", ge=1
    )
