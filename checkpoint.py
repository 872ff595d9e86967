"""What a run leaves behind: the states that --resume continues from, and the exports.

    OUT_DIR/state/step-000040/   policy, optimisers, critics and random generators as safetensors
    OUT_DIR/hf/                  the policy as a Hugging Face folder, with tokenizer and template
    OUT_DIR/adapter/             with LoRA, its adapters as peft reads them; in hf/ they are merged
    OUT_DIR/discriminators.pt    both critics with their running means, and how to build them

A state is written under another name, synced to the disk and then renamed. It counts only with its
manifest, which is written last and holds the size and SHA-256 of every file and what the run's
config.json says of data, models and settings. Older states are removed only when the new one is
complete. No file is a pickle except discriminators.pt, which is
read with weights_only. The weights that a run began with are known by a fingerprint, not by their
path.

Every function that takes a sharded model is collective: all ranks call it.
"""

import copy
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

import lora
import paired  # noqa: F401  it registers its critic, so that build_discriminator knows it
from data import ChatEncoder, InputError, input_error_for, shortened
from discriminator import build_discriminator
from distributed import Trained, from_rank_0, print0
from policy import WEIGHTS, first_names, generation_settings, weight_files
from report import MAY_CHANGE_ON_RESUME, check_same, read_config

MANIFEST = "manifest.json"
FILE_BYTES = 2**32  # size of a state's files at which another begins; a file is held in memory
EDGE_BYTES = 4096  # of each end of a tensor, which a fingerprint reads


# ---------------------------------------------------------------------- the folder of a run


def check_out_dir(args) -> Path:
    """Returns --out_dir, or the next free out/run-NNN, without creating it.

    Raises InputError if the folder holds a run and --resume was not given, or the reverse, or if
    nothing can be written there. A run that ended before its first result, because its weights were
    refused, does not count.
    """
    folder = Path(args.out_dir or "out")
    if not args.out_dir:
        used = [int(f.name[4:]) for f in folder.glob("run-*") if f.name[4:].isdigit()]
        folder = folder / f"run-{max(used, default=-1) + 1:03d}"
    config = read_config(folder)
    holds = [f for f in ("metrics.csv", "state", "config.json") if (folder / f).exists()]
    if config is None and holds:
        raise InputError(
            f"{folder} holds {' and '.join(holds)}, but its config.json is missing, damaged or not"
            " that of a run: pass another --out_dir"
        )
    if args.resume and config is None:
        raise InputError(f"{folder}: no run to resume")
    results = (f.stat().st_size for f in folder.rglob("*.jsonl"))  # of a game, apo.train_apo
    if not args.resume and (holds[:-1] or config and any(results)):
        raise InputError(f"{folder} holds a run: pass --resume, or another --out_dir")
    check_writable(folder, "--out_dir")
    return folder


def check_writable(folder: Path, flag: str):
    """Raises InputError, which names flag, if no file can be written to a folder, new or not."""
    nearest = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    with input_error_for(f"{flag} {folder}"), tempfile.TemporaryFile(dir=nearest):
        pass


def claim_out_dir(args, stack: ExitStack) -> Path:
    """Creates and returns check_out_dir's folder, on all ranks, and locks it until the stack ends.

    Raises InputError as check_out_dir does, and if another process has locked the folder.
    """

    def claim():
        folder = check_out_dir(args)
        stack.enter_context(locked(folder))
        return folder

    dist.barrier()  # until every rank has looked at the folder, before rank 0 changes it
    return from_rank_0(claim, "--out_dir")


@contextmanager
def locked(folder: Path):
    """Creates a folder and locks it for a `with` block; raises InputError if it is locked."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder} is in use by another process") from None
        yield


def claim_with_config(args, stack: ExitStack, fingerprint: str, **more) -> Path:
    """Claims --out_dir, writes its config.json and returns the folder.

    config.json holds args, `more`, and the fingerprints of data and --model. With --resume, raises
    InputError if these differ from those of the run.
    """
    folder = claim_out_dir(args, stack)
    more |= {"data_fingerprint": fingerprint} | model_fingerprints(model=args.model)
    config = json.loads(json.dumps(vars(args) | more))
    if args.resume:
        check_same(read_config(folder), config)
    text = json.dumps(config, indent=1) + "\n"
    from_rank_0(lambda: write_synced(folder / "config.json", text), "--out_dir")
    return folder


def open_run(out_dir: Path, config: dict, start: int, last: int, final_table: bool) -> bool:
    """Prepares the folder to go on from `start` finished steps to `last`; rank 0 calls it.

    Removes exports that are out of date and writes config.json. Returns False, and changes nothing,
    if all is done. final_table says whether the run ends with a final.csv.
    """
    exports = [out_dir / "hf"] + [out_dir / "final.csv"] * final_table
    exports += [out_dir / "adapter"] * bool(config.get("lora_rank"))
    if start >= last and all(path.exists() for path in exports):
        return False
    if start < last:  # exports of an earlier end, by --stop_after, are out of date
        for name in ("hf", "adapter"):
            shutil.rmtree(out_dir / name, ignore_errors=True)
        for name in ("discriminators.pt", "final.csv"):
            (out_dir / name).unlink(missing_ok=True)
    write_synced(out_dir / "config.json", json.dumps(config, indent=1) + "\n")
    return True


def room_needed(trained: Trained, keep: int, out_dir: Path) -> int:
    """Returns the bytes still to be written: `keep` + 1 states less those there, and the export."""
    there = len(list(Path(out_dir, "state").glob("step-*")))
    export = sum(p.numel() * max(4, p.element_size()) for p in trained.policy.parameters())
    return max(1, keep + 1 - there) * state_bytes(trained) + export


def check_space(out_dir: Path, needed: int):
    """Raises InputError on every rank if the disk of out_dir has less than that many bytes."""

    def check():
        free = shutil.disk_usage(out_dir).free
        if free < needed:
            raise InputError(f"need {needed / 1e9:.3g} GB, have {free / 1e9:.3g} GB")

    from_rank_0(check, f"{out_dir}: disk space:")


# ---------------------------------------------------------------------- whose weights they are


def model_fingerprints(**models: str | None) -> dict[str, str | None]:
    """Returns what a run's config.json keeps of the models that it begins with; all ranks call it.

    models are folders or Hub ids by the name of their flag; None is a model that is not used. The
    result has two hashes for each, NAME_weights and NAME_config. Raises InputError, which names the
    flag, if a file cannot be read.
    """

    def read():
        found = {}
        for flag, name in models.items():
            of_model = None, None
            if name is not None:
                with input_error_for(f"--{flag} {name}"):
                    of_model = weights_fingerprint(name), config_fingerprint(name)
            found |= zip((f"{flag}_weights", f"{flag}_config"), of_model, strict=True)
        return found

    return from_rank_0(read, "")


def config_fingerprint(name: str) -> str:
    """Returns a hash of a model's config.json and of how it generates, without what others than its
    author write there."""
    # what differs from transformers' defaults, because another version has settings more
    both = [PretrainedConfig.get_config_dict(name)[0], generation_settings(name).to_diff_dict()]
    for config in both:
        for key in ("_commit_hash", "_name_or_path", "transformers_version", "_from_model_config"):
            config.pop(key, None)
    return hashlib.sha256(json.dumps(both, sort_keys=True).encode()).hexdigest()[:16]


def weights_fingerprint(name: str | Path) -> str:
    """Returns a hash of the weights of a model's folder or Hub id, wherever they lie.

    It depends on each tensor's name, type, shape, and first and last 4 KiB. So it takes a moment
    for files of any size, and with safetensors it does not depend on their division into files.
    """
    tensors = []
    for path in weight_files(local_folder(name)):
        with path.open("rb") as file:
            for tensor, start, end in tensors_of(path):
                edges = []
                for first in (start, max(start, end - EDGE_BYTES)):
                    file.seek(first)
                    edges.append(file.read(min(EDGE_BYTES, end - first)).hex())
                tensors.append([tensor, edges])
    return hashlib.sha256(json.dumps(sorted(tensors)).encode()).hexdigest()[:16]


def tensors_of(path: Path) -> Iterator[tuple[list, int, int]]:
    """Yields what a file of weights says of each tensor, and the bytes where it begins and ends."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(begin - 8))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                yield [name, entry["dtype"], entry["shape"]], begin + start, begin + end
    elif zipfile.is_zipfile(path):  # torch.save's, where a record is a tensor, or says which
        with zipfile.ZipFile(path) as archive:
            records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        ends = [record.header_offset for record in records[1:]] + [path.stat().st_size]
        for record, end in zip(records, ends, strict=True):
            name = record.filename.split("/", 1)[-1]  # without the name that the file once had
            yield [path.name, name, record.file_size, record.CRC], record.header_offset, end
    else:  # before torch 1.6 all tensors were one pickle
        yield [path.name, sha256(path)], 0, 0


def local_folder(name: str | Path) -> Path:
    """Returns a model's folder; a Hub id's weights are fetched, if they are not in the cache."""
    if Path(name).is_dir():
        return Path(name)
    for file in WEIGHTS:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            if path.endswith(".json"):
                get_checkpoint_shard_files(name, path)
            return Path(path).parent
    return Path(name)


# ---------------------------------------------------------------------- states


def state_tensors(trained: Trained) -> dict[str, torch.Tensor]:
    """Returns everything that the next step depends on, by name, as the tensors that are in use.

    So loading a state means writing into them. The order of the data is not among them, because it
    is a function of the step. Tied weights are there once. Buffers are the vectors of spectral norm
    and the running means with their count.
    """
    rank, tensors = dist.get_rank(), {}
    modules = {
        "policy": (trained.policy, trained.optimizer),
        "critics": (trained.critics, trained.critic_optimizer),
    }
    for prefix, (module, optimizer) in modules.items():
        if module is None:
            continue
        for part in module.modules():  # after a forward alone the root's weights are still whole
            if isinstance(part, FSDPModule):
                part.reshard()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if getattr(module, "adapters", None) and ".lora_" not in name:
                continue  # frozen, and known by the fingerprint of --model
            tensors[f"{prefix}.{name}"] = tensor.detach()
            for key, value in optimizer.state.get(tensor, {}).items():
                tensors[f"{prefix}.{name}.{key}"] = value
    tensors[f"rng.{rank}"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[f"cuda_rng.{rank}"] = torch.cuda.get_rng_state()
    return tensors


def state_folder(out_dir: Path, step: int) -> Path:
    return Path(out_dir, "state", f"step-{step:06d}")


def file_numbers(tensors: dict, ranks: int) -> dict[str, int]:
    """Returns the number of the file, from 1, that each tensor goes to.

    The random generators of all ranks go to the first.
    """
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        bytes_of_it = tensor.numel() * tensor.element_size()
        if size and size + bytes_of_it > FILE_BYTES:
            number, size = number + 1, 0
        numbers[name], size = number, size + bytes_of_it
    return numbers | {f"{k}.{rank}": 1 for k in ("rng", "cuda_rng") for rank in range(ranks)}


def state_bytes(trained: Trained) -> int:
    """Returns the bytes of one state over all ranks: weights and AdamW's two moments; the rest is
    small."""
    modules = [trained.policy.adapters or trained.policy, trained.critics]
    weights = [p for m in modules if m is not None for p in m.parameters()]
    return 3 * sum(p.numel() * p.element_size() for p in weights)


def save_state(out_dir: Path, step: int, keep: int, trained: Trained):
    """Writes state/step-NNNNNN, step being the number of finished steps, and keeps `keep` states.

    Raises InputError if it cannot be written, and FloatingPointError if it is not finite; the older
    states are then as they were.
    """
    folder = state_folder(out_dir, step)
    unfinished = folder.with_name("unfinished")
    from_rank_0(lambda: remove_unfinished(folder.parent), "state:")
    tensors, ranks = state_tensors(trained), dist.get_world_size()
    refuse_tensors_that_are_not_finite(
        tensors, f"step {step}: no state is written, because it would hold"
    )
    try:
        check_space(out_dir, state_bytes(trained))
        writer = HuggingFaceStorageWriter(  # it syncs its files
            str(unfinished), file_numbers(tensors, ranks), save_distributed=True
        )
        dcp.save(tensors, storage_writer=writer)
        manifest = {"step": step, "ranks": ranks, "run": run_of(out_dir)}
        manifest["files"] = hash_files(unfinished)
        from_rank_0(lambda: complete(unfinished, folder, manifest, keep), "state:")
    except (CheckpointException, InputError) as error:
        from_rank_0(lambda: remove_unfinished(folder.parent), "state:")
        reason = f"the state of step {step} could not be written: {cause_of(error)}"
        raise InputError(f"{reason}; older states are intact") from None


def run_of(out_dir: Path) -> dict:
    """Returns what tells a run from any other: what the config.json in out_dir, or in a folder that
    holds it, says of data, models, settings and seed, and where in that folder out_dir lies."""
    for folder in (out_dir, *out_dir.parents):
        if config := read_config(folder):
            told = {k: v for k, v in config.items() if k not in MAY_CHANGE_ON_RESUME}
            return told | {"folder": str(out_dir.relative_to(folder))}
    return {}


def refuse_tensors_that_are_not_finite(tensors: dict[str, torch.Tensor], message: str):
    """Raises FloatingPointError on every rank, which begins with `message`, if a rank's part of a
    tensor holds a value that is not finite."""
    parts = {k: getattr(x, "to_local", lambda x=x: x)() for k, x in tensors.items()}
    parts = {k: x for k, x in parts.items() if x.is_floating_point() and x.numel()}
    bad = {k for k, x in parts.items() if not torch.stack(x.aminmax()).isfinite().all()}
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, bad)
    if bad := set().union(*everywhere):
        raise FloatingPointError(f"{message} numbers that are not finite: {first_names(bad)}")


def cause_of(error: Exception) -> str:
    """Returns the first rank's error in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).splitlines()[0]


def remove_unfinished(states: Path):
    """Removes what an interrupted save has left."""
    shutil.rmtree(states / "unfinished", ignore_errors=True)


def complete(unfinished: Path, folder: Path, manifest: dict, keep: int):
    """Writes the manifest, names the state, and removes older states but `keep`, and later ones."""
    write_synced(
        unfinished / MANIFEST, json.dumps(manifest | {"digest": digest(manifest)}, indent=1)
    )
    sync_folder(unfinished)
    shutil.rmtree(folder, ignore_errors=True)  # a damaged state of the same step
    unfinished.rename(folder)
    sync_folder(folder.parent)
    states = sorted(folder.parent.glob("step-*"))
    here = states.index(folder)
    # states of later steps are damaged: otherwise the run would have continued from them
    for other in states[: max(0, here + 1 - keep)] + states[here + 1 :]:
        shutil.rmtree(other)


def write_synced(path: Path, text: str):
    """Writes a whole text file. If that fails, the file is as it was before."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def sync_folder(path: Path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def hash_files(folder: Path) -> dict[str, list]:
    """Returns [size, SHA-256] of every file but the manifest, by name; all ranks call it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    files = sorted(f for f in Path(folder).iterdir() if f.name != MANIFEST)
    mine = {f.name: [f.stat().st_size, sha256(f)] for f in files[rank::ranks]}
    shares = [None] * ranks
    dist.all_gather_object(shares, mine)
    return {name: entry for share in shares for name, entry in share.items()}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict | None:
    """Returns a state's manifest without its digest, or None if it is missing or damaged."""
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text())
        return manifest if manifest.pop("digest") == digest(manifest) else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def newest_state(out_dir: Path) -> dict | None:
    """Returns the manifest of the newest state whose files are all as it says, or None.

    Damaged states are named on the terminal and passed over. Raises InputError if that state is not
    the run's own.
    """

    def candidates():
        folders = sorted(Path(out_dir, "state").glob("step-" + 6 * "[0-9]"), reverse=True)
        found = [(folder, read_manifest(folder)) for folder in folders]
        return [(f, m if m and state_folder(out_dir, m["step"]) == f else None) for f, m in found]

    for folder, manifest in from_rank_0(candidates, "state:"):
        found = hash_files(folder) if manifest else None
        if manifest and found == manifest["files"]:
            from_rank_0(partial(check_owner, folder, manifest.get("run", {}), out_dir), "")
            return manifest
        damage = "no whole manifest"
        if manifest:
            names = sorted({*found, *manifest["files"]})
            bad = [n for n in names if found.get(n) != manifest["files"].get(n)]
            damage = f"missing or changed: {', '.join(bad)}"
        print0(f"{folder} is damaged ({damage}): trying the state before it")
    return None


def check_owner(folder: Path, noted: dict, out_dir: Path):
    """Raises InputError if a state's folder was written by another run than out_dir's."""
    own = run_of(out_dir)
    others = [
        f"{k} {noted.get(k)} in place of {own.get(k)}"
        for k in sorted({*noted, *own})
        if noted.get(k) != own.get(k)
    ]
    if not noted:
        raise InputError(f"{folder} does not say of which run it is: remove it")
    if others:
        raise InputError(
            f"{folder} is the state of another run: {shortened('; '.join(others))}; remove it, or"
            " pass the --out_dir that it is of"
        )


def load_state(out_dir: Path, manifest: dict, trained: Trained):
    """Restores everything that save_state saved.

    Any number of ranks may have written the state. A rank that did not exist then has no state of a
    random generator to restore. Raises InputError if it is that of another model, and
    FloatingPointError if it holds what is not finite.
    """
    policy, optimizer, critics, critic_optimizer = trained
    get_optimizer_state_dict(policy, optimizer)  # creates the moments, to load into
    if critics is not None:
        get_optimizer_state_dict(critics, critic_optimizer)
    tensors, rank = state_tensors(trained), dist.get_rank()
    if rank >= manifest["ranks"]:
        tensors = {k: v for k, v in tensors.items() if k not in (f"rng.{rank}", f"cuda_rng.{rank}")}
    folder = state_folder(out_dir, manifest["step"])
    try:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    except CheckpointException:  # pages of names and shapes
        raise InputError(f"{folder} is the state of another model, or of other critics") from None
    refuse_tensors_that_are_not_finite(tensors, f"{folder}: remove it, because it holds")
    if f"rng.{rank}" in tensors:
        torch.set_rng_state(tensors[f"rng.{rank}"])
    if f"cuda_rng.{rank}" in tensors:
        torch.cuda.set_rng_state(tensors[f"cuda_rng.{rank}"])


# ---------------------------------------------------------------------- exports


def export_policy(policy: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path):
    """Writes the policy as a Hugging Face folder in its own precision.

    With LoRA the adapters are merged, in float32, and a folder `adapter` beside it has them alone.
    A model that is loaded from it gives identical logits, and generates with the settings that the
    policy was loaded with; the template's end of turn is among its stops. The folder appears whole
    or not at all.
    """
    weights, unfinished = {}, folder.with_name(".hf.unfinished")
    parts = policy.model.state_dict()
    refuse_tensors_that_are_not_finite(parts, "the policy is not exported, because it holds")
    for name, value in parts.items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value  # collective
        if dist.get_rank() == 0:
            weights[name] = value.cpu()
    if dist.get_rank() == 0:
        if policy.adapters:
            weights = lora.merged(weights, policy.adapters.scale)
            policy.adapters.save(folder.with_name("adapter"))
        with torch.device("meta"):  # a sharded model cannot save_pretrained; this one saves for it
            shell = type(policy.model)(policy.model.config)
        for tied, source in shell.all_tied_weights_keys.items():  # gathered twice, stored once
            weights[tied] = weights[source]
        shutil.rmtree(unfinished, ignore_errors=True)
        if policy.model.can_generate():  # a reward model cannot
            settings = with_stop(policy.model.generation_config, ChatEncoder(tokenizer).end_of_turn)
            shell.generation_config = GenerationConfig()
        shell.save_pretrained(unfinished, state_dict=weights)
        if policy.model.can_generate():  # written here, because save_pretrained refuses some faults
            settings.to_json_file(unfinished / GENERATION_CONFIG_NAME)
        add_older_names(unfinished / "config.json")
        tokenizer.save_pretrained(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    dist.barrier()


def add_older_names(path: Path):
    """Adds to a config.json the names that transformers 4 has for the angles of positions.

    It does not know the new one, and would take its own default angles without a word.
    """
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    scaling = dict(rope.get("full_attention", rope))  # some models have a set per type of layer
    if "rope_theta" in scaling:
        config["rope_theta"] = scaling.pop("rope_theta")
        if "partial_rotary_factor" in scaling:
            config["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
        if scaling.get("rope_type", "default") != "default":
            config["rope_scaling"] = scaling
    if "sliding_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    path.write_text(json.dumps(config, indent=2) + "\n")


def with_stop(settings: GenerationConfig, end_of_turn: int) -> GenerationConfig:
    """Returns a copy of settings in which generation also stops at end_of_turn."""
    settings, stops = copy.deepcopy(settings), settings.eos_token_id
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    if end_of_turn not in stops:
        settings.eos_token_id = [*stops, end_of_turn]
    return settings


def save_discriminators(path: Path, critics: torch.nn.ModuleDict, settings: dict):
    """Writes both critics. settings are the arguments of build_discriminator.

    Every rank has whole copies, so rank 0 writes.
    """
    if dist.get_rank() == 0:
        weights = {name: critic.state_dict() for name, critic in critics.items()}
        unfinished = path.with_name(f".{path.name}.unfinished")
        torch.save({"settings": settings, **weights}, unfinished)
        unfinished.rename(path)


def load_discriminators(
    path: Path, device: torch.device | str = "cpu"
) -> dict[str, torch.nn.Module]:
    """Returns {"disc_pos": critic, "disc_neg": critic} in eval mode, from save_discriminators."""
    saved = torch.load(path, map_location=device, weights_only=True)
    critics = {}
    for name in ("disc_pos", "disc_neg"):
        critics[name] = build_discriminator(**saved["settings"]).to(device)
        critics[name].load_state_dict(saved[name])
        critics[name].eval()
    return critics
