"""What `--help` says of groups and keys. Written down: to ask the config for it would take --help a second; a test compares the two."""

from __future__ import annotations

# Each group with its choices, the usual first. {1,8}x{a,b}: every one of them.
GROUP_CHOICES = {
    "model": "d2 d4 d6 d8 d12 d16 d20 d24 d26 d32 llama_d4 llama_d12",
    "data": "auto pystdlib files mixture climbmix fineweb_edu",
    "tokenizer": "bpe",
    "optimizer": "adamw muon",
    "schedule": "trapezoid cosine constant",
    "cadence": "default smoke none",
    "hardware": "auto cpu mps 1x4090 {1,8}x{a100,h100,h200}",
    "parallel": "ddp",
    "logger": "default",
    "experiment": "cpu_d4 cpu_speedrun speedrun",
}
KEYS = {
    "train.max_steps=500": "how long; or num_train_epochs, target_tokens",
    "train.seq_len=1024": "tokens a row",
    "train.total_batch_size=65536": "tokens a step",
    "train.device_batch_size=8": "rows at once on a device",
    "train.eval_every=100": "steps between validations",
    "train.save_every=1000": "steps between permanent checkpoints",
    "train.precision=bf16": "auto, fp32, bf16 or fp8",
    "optimizer.matrix_lr=0.02": "learning rate; embed_lr and head_lr, too",
    "schedule.warmup_steps=100": "steps until the full rate",
    "data.path=~/texts": "with data=files: a file, folder or URL",
    "tokenizer.vocab_size=16384": "tokens in the vocabulary",
    "hardware.device=cpu": "or cuda, mps",
    "run.name=mine": "the folder in runs/",
    "run.seed=1": "weights and order of the rows",
}
# "\b": click leaves the lines that follow as they are
EPILOG = "\n".join(
    [
        "\b",
        "Groups and their choices (model=d6):",
        *(f"  {group:<11} {choices}" for group, choices in GROUP_CHOICES.items()),
        "",
        "\b",
        "Keys, the most used (`picotrain config` prints all of them with their values):",
        *(f"  {key:<29} {what}" for key, what in KEYS.items()),
    ]
)
