"""A run cut in the middle and resumed, beside the uninterrupted one."""

import shutil

from swift.runs.metrics import read_metrics


def train_and_resume(run_training, tmp_path, **options):
    """The folder of a run of six steps that learned; its second half was done twice with the same result."""
    options = {"max_steps": 6, "save_steps": 3, "num_train_epochs": 9, **options}
    whole = run_training(run_name="whole", **options).folder
    losses = [row["loss"] for row in read_metrics(whole / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.05
    cut = tmp_path / "output" / "cut"
    shutil.copytree(whole, cut, symlinks=True)
    again = run_training(run_name="cut", resume_from_checkpoint=str(cut / "checkpoint-3"), **options)
    assert again.folder == cut
    files = [folder / "last" / "adapter_model.safetensors" for folder in (cut, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    return whole
