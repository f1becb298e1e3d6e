"""TrainState -> checkpoint: copied to host memory while the loop waits, then written in the background.

Tensors are written by torch.distributed.checkpoint's safetensors storage. Under DDP every rank holds the same tensors, so
rank 0 writes them all and nobody else waits for the disk. Nothing is ever written into a folder that has its final name.
"""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from picotrain import disk
from picotrain.checkpoint.folder import describe, is_whole, read_json, set_aside, step_dir, write_json, write_pointer
from picotrain.checkpoint.retain import is_rolling, retain, sweep
from picotrain.config.schema import CheckpointConfig
from picotrain.errors import CheckpointError
from picotrain.state import TrainState, model_tensors, optimizer_tensors

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Saved:
    """How a save ended. stall_s: how long the loop was held; seconds: until it was whole; error: why it is not."""

    step: int
    path: Path
    stall_s: float
    seconds: float
    error: str | None = None


class Saver:
    """Saves one run's checkpoints, one at a time; for one rank only.

    What cannot be written (a full disk, a folder that is gone) raises nothing. `poll` hands out a Saved with its error, and the next
    save tries again. Anything else that goes wrong in the background is a bug, and the next call raises it. The host copies of the
    tensors are kept from save to save: memory of the size of a checkpoint.
    """

    def __init__(self, root: Path, section: CheckpointConfig):
        self.root, self._section = root, section
        self._staged: dict[str, Tensors] = {}
        self._thread: threading.Thread | None = None
        self._done: list[Saved] = []
        self._bug: BaseException | None = None
        self._begun_s = time.monotonic()
        sweep(root)

    @property
    def rolling_due(self) -> bool:
        """Whether a rolling checkpoint is due: so many minutes have gone by since the last save began."""
        minutes = self._section.rolling_minutes
        return minutes is not None and time.monotonic() - self._begun_s >= 60 * minutes

    @property
    def busy(self) -> bool:
        """Whether a save is under way in the background."""
        return self._thread is not None and self._thread.is_alive()

    def put_off(self) -> None:
        """Count a save that could not begin as begun. So the next rolling one is due after its minutes, not at every step."""
        self._begun_s = time.monotonic()

    def save(self, state: TrainState, metrics_bytes: int, rolling: bool = False) -> None:
        """Begin to save `state`, which may change as soon as this returns; waits for the save before it."""
        started = time.perf_counter()
        self.wait()
        self.put_off()
        self._stage(state)
        scalars = describe_state(state, metrics_bytes)
        if not self._section.background:
            self._run(scalars, rolling, started, None)
            return
        stall_s = time.perf_counter() - started
        self._thread = threading.Thread(target=self._run, args=(scalars, rolling, started, stall_s), name="picotrain-save")
        self._thread.start()

    def poll(self) -> list[Saved]:
        """The saves that have ended since the last call."""
        if self._bug is not None:
            bug, self._bug = self._bug, None
            raise RuntimeError("saving a checkpoint in the background failed") from bug
        done, self._done = self._done, []
        return done

    def wait(self) -> None:
        """Until no save is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def keep(self, step: int) -> None:
        """Make the rolling checkpoint of a step, if there is one, a permanent one."""
        self.wait()
        path = step_dir(self.root, step)
        with suppress(OSError):  # a full disk: it stays a rolling one, and whole
            if is_whole(path) and is_rolling(path):
                write_json(path / "manifest.json", {**read_json(path / "manifest.json"), "rolling": False})

    def tidy(self) -> None:
        """Remove what the rules of retention do not keep, as every save does."""
        self.wait()
        retain(self.root, self._section)

    def rescue(self, state: TrainState, metrics_bytes: int) -> Path:
        """Write the checkpoint into the system's temporary folder, as nothing else works. Raises OSError where that fails, too."""
        self._stage(state)
        place = Path(tempfile.mkdtemp(prefix=f"picotrain-{self.root.parent.name}-"))
        try:
            return write(place, self._staged, describe_state(state, metrics_bytes), self._section.shard_bytes)
        except OSError:
            shutil.rmtree(place, ignore_errors=True)
            raise

    def _stage(self, state: TrainState) -> None:
        """Copy every tensor to host memory, the same blocks at every save (pinned for CUDA, so that copies overlap)."""
        current = {"model": model_tensors(state.model), "optimizer": optimizer_tensors(state.model, state.optimizer)}
        on_gpu = False
        for part, tensors in current.items():
            kept = self._staged.get(part, {})
            self._staged[part] = {
                name: kept[name] if name in kept and kept[name].shape == tensor.shape else _host_like(tensor)
                for name, tensor in tensors.items()
            }
            for name, tensor in tensors.items():
                self._staged[part][name].copy_(tensor.detach(), non_blocking=True)
                on_gpu |= tensor.is_cuda
        if on_gpu:
            torch.cuda.current_stream().synchronize()

    def _run(self, scalars: dict[str, Any], rolling: bool, started: float, stall_s: float | None) -> None:
        path, error = step_dir(self.root, scalars["step"]), None
        try:
            write(self.root, self._staged, scalars, self._section.shard_bytes, rolling)
        except OSError as problem:
            error = f"{path} cannot be written: {problem.strerror or problem}"
        except BaseException as bug:
            self._bug = bug
            return
        seconds = time.perf_counter() - started
        if error is None:
            with suppress(OSError, CheckpointError):  # somebody removes them, too
                retain(self.root, self._section)
        self._done.append(Saved(scalars["step"], path, seconds if stall_s is None else stall_s, seconds, error))


def save(root: Path, state: TrainState, metrics_bytes: int, rolling: bool = False, **section: Any) -> Path:
    """Write the checkpoint of `state.step` below root at once and point `latest` at it; call on one rank only.

    section: keys of the config's `checkpoint`. Raises CheckpointError.
    """
    saver = Saver(root, CheckpointConfig(background=False, **section))
    saver.save(state, metrics_bytes, rolling)
    saved = saver.poll()[0]
    if saved.error:
        raise CheckpointError(saved.error)
    return saved.path


def describe_state(state: TrainState, metrics_bytes: int) -> dict[str, Any]:
    """What state.json holds."""
    return {
        "step": state.step,
        "val_bpb": state.loop.val_bpb,
        "val_bpb_step": state.loop.val_bpb_step,
        "dataloader_state_dict": state.loader,
        "loop_state": asdict(state.loop),
        "rng": {"torch": base64.b64encode(bytes(torch.get_rng_state().tolist())).decode()},
        "metrics_bytes": metrics_bytes,
    }


def write(root: Path, parts: dict[str, Tensors], scalars: dict[str, Any], shard_bytes: int, rolling: bool = False) -> Path:
    """Write tensors and scalars as the checkpoint of their step. Raises OSError.

    Files are written and flushed to disk under a temporary name, the manifest last. Then the folder is renamed. So a crash at any moment
    leaves the previous checkpoints whole, and no half one under a step's name.
    """
    final = step_dir(root, scalars["step"])
    if not root.parent.is_dir():
        raise FileNotFoundError(2, "the run directory is gone", str(root.parent))
    with _unmade(root, root.parent):
        root.mkdir(exist_ok=True)
        sweep(root)
        tmp = root / f".tmp-{final.name}"
        tmp.mkdir()
        try:
            write_json(tmp / "state.json", scalars)
            _write_tensors(tmp, parts, shard_bytes)
            if not (tmp / "state.json").is_file():  # torch's writer makes a folder that is gone anew, wherever that leads
                raise FileNotFoundError(2, "the run directory is gone", str(root.parent))
            files = {path.name: describe(path) for path in sorted(tmp.iterdir())}
            write_json(tmp / "manifest.json", {"rolling": rolling, "files": files})
            disk.fsync(tmp)
            if os.path.lexists(final):  # a damaged one of the same step: a whole one is never written twice
                set_aside(final)
            tmp.rename(final)
        except OSError:
            shutil.rmtree(tmp, ignore_errors=True)  # a full disk has no room for halves
            raise
    disk.fsync(root)
    write_pointer(root, "latest", final)
    return final


@contextmanager
def _unmade(*folders: Path) -> Generator[None]:
    """Where the body fails, remove those of the folders that came into being meanwhile, if they are empty. torch's writer makes folders
    anew that somebody removes. A folder that was there before stays. It is held open, so that no new folder gets its number."""
    held = {folder: os.open(folder, os.O_RDONLY | os.O_DIRECTORY) for folder in folders if folder.is_dir()}
    try:
        yield
    except OSError:
        for folder in folders:
            with suppress(OSError):
                if folder not in held or not os.path.samestat(os.fstat(held[folder]), os.stat(folder)):
                    folder.rmdir()
        raise
    finally:
        for fd in held.values():
            os.close(fd)


def _write_tensors(folder: Path, parts: dict[str, Tensors], shard_bytes: int) -> None:
    """Each part's tensors as `part-0000i-of-0000n.safetensors` and an index, as `transformers` cuts them."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # late: half a second of imports
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    place: dict[str, tuple[str, int]] = {}  # of a tensor: its part, its file within the part
    count = {}
    for part, tensors in parts.items():
        split = split_torch_state_dict_into_shards(tensors, filename_pattern=part + "{suffix}.safetensors", max_shard_size=shard_bytes)
        count[part] = len(split.filename_to_tensors)
        for number, names in enumerate(split.filename_to_tensors.values(), start=1):
            place |= {name: (part, number) for name in names}
    first = {part: sum(count[before] for before in list(parts)[:i]) for i, part in enumerate(parts)}
    index = {name: first[part] + number for name, (part, number) in place.items()}
    # Not catch_warnings: this is a thread, and the training thread has the same list of filters.
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # which is what one rank wants
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=index)
    try:
        dcp_save({name: tensor for tensors in parts.values() for name, tensor in tensors.items()}, storage_writer=writer, no_dist=True)
    except CheckpointException as error:  # by rank, each with its traceback
        raise next(cause for cause, _ in error.failures.values()) from error
    total = sum(count.values())
    for part, files in count.items():
        for number in range(1, files + 1):
            os.rename(folder / _file("model", first[part] + number, total), folder / f".{_file(part, number, files)}")
    for path in folder.glob(".*.safetensors"):
        os.rename(path, folder / path.name[1:])
    for part, tensors in parts.items():
        weight_map = {name: _file(part, place[name][1], count[part]) for name in tensors}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        write_json(folder / f"{part}.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def _file(part: str, number: int, count: int) -> str:
    return f"{part}-{number:05d}-of-{count:05d}.safetensors"


def _host_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
