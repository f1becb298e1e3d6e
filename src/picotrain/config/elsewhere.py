"""What a key is called elsewhere: `--batch-size 8` and `learning_rate=0.01` answered with the words that are right here.

The names are those of nanoGPT, nanochat, litgpt, torchtitan and Hugging Face's Trainer.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from picotrain.config.groups import GROUPS, choices
from picotrain.config.keys import leaves, nearest

# A key, or whole words with {} for the value. A name that is the last part of a key here needs no line.
NAMES: dict[str, str] = {
    "lr": "optimizer.matrix_lr",
    "learning_rate": "optimizer.matrix_lr",
    "embedding_lr": "optimizer.embed_lr",
    "unembedding_lr": "optimizer.head_lr",
    "batch_size": "train.device_batch_size",
    "micro_batch_size": "train.device_batch_size",
    "train_batch_size": "train.device_batch_size",
    "local_batch_size": "train.device_batch_size",
    "per_device_train_batch_size": "train.device_batch_size",
    "global_batch_size": "train.total_batch_size=TOKENS",
    "gradient_accumulation_steps": "train.total_batch_size=TOKENS",
    "grad_accum_steps": "train.total_batch_size=TOKENS",
    "grad_accum": "train.total_batch_size=TOKENS",
    "steps": "train.max_steps",
    "iters": "train.max_steps",
    "max_iters": "train.max_steps",
    "num_steps": "train.max_steps",
    "num_iterations": "train.max_steps",
    "training_steps": "train.max_steps",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "max_epochs": "train.num_train_epochs",
    "max_tokens": "train.target_tokens",
    "block_size": "train.seq_len",
    "context_length": "train.seq_len",
    "context_size": "train.seq_len",
    "max_length": "train.seq_len",
    "max_seq_len": "train.seq_len",
    "max_seq_length": "train.seq_len",
    "sequence_length": "train.seq_len",
    "sequence_len": "train.seq_len",
    "n_layer": "model.depth",
    "n_layers": "model.depth",
    "layers": "model.depth",
    "num_layers": "model.depth",
    "num_hidden_layers": "model.depth",
    "n_embd": "model.width",
    "d_model": "model.width",
    "dim": "model.width",
    "hidden_size": "model.width",
    "eval_steps": "train.eval_every",
    "eval_interval": "train.eval_every",
    "eval_freq": "train.eval_every",
    "eval_iters": "train.eval_tokens=TOKENS",
    "save_steps": "train.save_every",
    "save_interval": "train.save_every",
    "checkpoint_every": "train.save_every",
    "checkpoint_interval": "train.save_every",
    "log_interval": "logger.log_every",
    "log_freq": "logger.log_every",
    "logging_steps": "logger.log_every",
    "max_grad_norm": "train.grad_clip",
    "max_norm": "train.grad_clip",
    "gradient_clipping": "train.grad_clip",
    "clip": "train.grad_clip",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "optim": "optimizer={}",
    "lr_scheduler": "schedule={}",
    "lr_scheduler_type": "schedule={}",
    "warmup": "schedule.warmup_steps",
    "warmup_iters": "schedule.warmup_steps",
    "lr_warmup_steps": "schedule.warmup_steps",
    "bf16": "train.precision=bf16",
    "fp16": "train.precision=bf16",
    "fp32": "train.precision=fp32",
    "fp8": "train.precision=fp8",
    "dtype": "train.precision",
    "mixed_precision": "train.precision",
    "torch_compile": "hardware.compile",
    "gradient_checkpointing": "hardware.recompute=selective",
    "activation_checkpointing": "hardware.recompute=selective",
    "gpus": "hardware.nproc_per_node",
    "devices": "hardware.nproc_per_node",
    "num_gpus": "hardware.nproc_per_node",
    "num_processes": "hardware.nproc_per_node",
    "num_nodes": "launch.nnodes",
    "cuda": "hardware.device=cuda",
    "output": "run.dir",
    "output_dir": "run.dir",
    "out_dir": "run.dir",
    "out": "run.dir",
    "run_name": "run.name",
    "experiment_name": "run.name",
    "dataset": "data=files data.path={}",
    "dataset_name": "data=files data.path={}",
    "dataset_path": "data=files data.path={}",
    "data_dir": "data=files data.path={}",
    "data_path": "data=files data.path={}",
    "train_file": "data=files data.path={}",
    "tokenizer_name": "tokenizer.path",
    "tokenizer_dir": "tokenizer.path",
    "tokenizer_path": "tokenizer.path",
    "wandb": "logger.trackers=wandb",
    "wandb_log": "logger.trackers=wandb",
    "report_to": "logger.trackers",
    "data_seed": "run.seed",
    "random_seed": "run.seed",
}
GOES_ON = "there is nothing to set: the same `picotrain train` goes on where its run stopped, and `picotrain resume RUN` with any run"
NOTHING = {name: GOES_ON for name in ("resume", "resume_from_checkpoint", "resume_from", "init_from", "auto_resume", "load_checkpoint")}


def plain(name: str) -> str:
    """A name without dashes before it, in the letters that keys have."""
    return name.lstrip("-").replace("-", "_").lower()


def exact(name: str, value: str | None) -> str | None:
    """The words that are right where the name is known: a group, a key, a key's last part, or a name that it has elsewhere.
    value: what was given with it, None: nothing."""
    name = plain(name)
    if name in GROUPS:
        return _choice(name, value)
    if name in leaves():
        return _set(name, value)
    if name in NAMES:
        words = NAMES[name]
        return words.format("..." if value is None else value) if "=" in words else _set(words, value)
    last = [key for key in leaves() if key.rpartition(".")[2] == name]
    preferred = [key for key in last if key.startswith(("run.", "train.", "optimizer.", "hardware.", "data."))] or last
    if name.startswith("no_") and (positive := exact(name.removeprefix("no_"), "false")):
        return positive
    return _set(preferred[0], value) if preferred else None


def resembling(name: str, value: str | None) -> str | None:
    """The same for a name that is none of those, by the one most like it."""
    by_name = {key.rpartition(".")[2]: key for key in leaves()} | {key: key for key in (*leaves(), *GROUPS, *NAMES)}
    found = nearest(plain(name), by_name, 1)
    return exact(by_name[found[0]], value) if found else None


def _choice(group: str, value: str | None) -> str:
    known = choices(group)
    if value is None:
        return f"{group}=..., one of {', '.join(known)}"
    if value in known:
        return f"{group}={value}"
    if group == "model" and (found := nearest(f"d{value.lstrip('d')}", known, 1)):
        return f"model={found[0]}"
    if group in ("data", "tokenizer") and ("/" in value or "." in value or Path(value).exists()):
        return f"data=files data.path={value}" if group == "data" else f"tokenizer.path={value}"
    return f"{group}=..., one of {', '.join(known)}"


def _set(key: str, value: str | None) -> str:
    leaf = leaves()[key]
    if key == "train.precision" and value:
        value = {"bfloat16": "bf16", "float32": "fp32", "float16": "bf16", "fp16": "bf16"}.get(value, value)
    if value is None:
        return f"{key}={'true' if 'true' in leaf.words else '...'}"
    return shlex.quote(f"{key}={value}") if " " in value else f"{key}={value}"
