"""What a run leaves behind: the state that --resume continues from, and the exports.

    OUT_DIR/state/step-000040/   policy, optimisers, critics, each rank's RNG, sharded
    OUT_DIR/hf/                  the policy as a Hugging Face folder, with tokenizer and template
    OUT_DIR/discriminators.pt    both critics with their running means, and how to build them

Every function that takes a sharded model is collective: all ranks call it.
"""

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import AutoModelForCausalLM

from discriminator import build_discriminator


def _state(policy, optimizer, critics, critic_optimizer):
    """Everything that the next step depends on but the data order, which is a function of the
    step."""
    state = {"torch_rng": {str(dist.get_rank()): torch.get_rng_state()}}
    if torch.cuda.is_available():
        state["cuda_rng"] = {str(dist.get_rank()): torch.cuda.get_rng_state()}
    state["policy"], state["optimizer"] = get_state_dict(policy, optimizer)
    if critics is not None:  # with buffers: spectral norm's vectors, running means, their count
        state["critics"], state["critic_optimizer"] = get_state_dict(critics, critic_optimizer)
    return state


def save_state(out_dir, step, policy, optimizer, critics, critic_optimizer):
    """Writes state/step-NNNNNN, `step` being the number of finished steps, and then drops the older
    ones. The folder takes its name only when it is whole."""
    folder = Path(out_dir, "state", f"step-{step:06d}")
    unfinished = folder.with_name("unfinished")
    dcp.save(_state(policy, optimizer, critics, critic_optimizer), checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        for older in folder.parent.glob("step-*"):
            if older != folder:
                shutil.rmtree(older)
    dist.barrier()


def latest_step(out_dir) -> int | None:
    """The number of finished steps of the newest state under out_dir, None if there is none."""
    steps = [int(f.name.removeprefix("step-")) for f in Path(out_dir, "state").glob("step-*")]
    return max(steps, default=None)


def load_state(out_dir, step, policy, optimizer, critics, critic_optimizer):
    """Puts everything back as save_state found it after `step` steps."""
    state = _state(policy, optimizer, critics, critic_optimizer)
    dcp.load(state, checkpoint_id=Path(out_dir, "state", f"step-{step:06d}"))
    set_state_dict(
        policy, optimizer, model_state_dict=state["policy"], optim_state_dict=state["optimizer"]
    )
    if critics is not None:
        set_state_dict(
            critics,
            critic_optimizer,
            model_state_dict=state["critics"],
            optim_state_dict=state["critic_optimizer"],
        )
    torch.set_rng_state(state["torch_rng"][str(dist.get_rank())])
    if "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"][str(dist.get_rank())])


def export_policy(policy, tokenizer, folder):
    """The policy as a Hugging Face folder in its own precision: the same logits when loaded
    again."""
    weights = {}
    for name, value in policy.model.state_dict().items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value  # collective
        if dist.get_rank() == 0:
            weights[name] = value.cpu()
    if dist.get_rank() == 0:
        with torch.device("meta"):  # a shell: the sharded model cannot save_pretrained itself
            shell = AutoModelForCausalLM.from_config(policy.model.config)
        shell.generation_config = policy.model.generation_config
        if policy.model.config.tie_word_embeddings:  # gathered twice, stored once
            for tied, source in shell.all_tied_weights_keys.items():
                weights[tied] = weights[source]
        shell.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
    dist.barrier()


def save_discriminators(path, critics, settings: dict):
    """settings: build_discriminator's arguments. Replicated on all ranks, so rank 0 writes."""
    if dist.get_rank() == 0:
        weights = {name: critic.state_dict() for name, critic in critics.items()}
        torch.save({"settings": settings, **weights}, path)


def load_discriminators(path, device="cpu"):
    """-> {"disc_pos": critic, "disc_neg": critic} in eval mode, as save_discriminators wrote
    them."""
    saved = torch.load(path, map_location=device, weights_only=True)
    critics = {}
    for name in ("disc_pos", "disc_neg"):
        critics[name] = build_discriminator(**saved["settings"]).to(device)
        critics[name].load_state_dict(saved[name])
        critics[name].eval()
    return critics
